"""What tests need of a run that `main` has set up and not begun."""

from unittest import mock


class NotTrainedError(Exception):
    """Raised in place of the training, with what was about to be trained."""


def set_up(script, arguments):
    """Return what `main` would train with the arguments: the `Trainer` of run_mlm.py, the `Run` of run_mlm_flax.py."""

    def stop(run, *others):
        raise NotTrainedError(run)

    with mock.patch.object(script, "train", stop):
        try:
            script.main([*arguments, "--do_train"])
        except NotTrainedError as caught:
            return caught.args[0]
    raise AssertionError("main ended without training")
