"""What costs time on a GPU, counted on the CPU: waits for the device, graphs, collectives."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from conftest import flags, history, make_model, sentences, training_flags, weights, write_lines
from torch.utils._python_dispatch import TorchDispatchMode

import run_mlm

# Operations whose result the host has to know: its value, or its shape.
WAITING = "_local_scalar_dense nonzero masked_select _unique _unique2 unique_dim unique_consecutive equal is_nonzero"


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count, self.steps, self.batches = 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        chosen = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += chosen or name in WAITING.split()
        return function(*args, **kwargs or {})


@pytest.fixture
def waits():
    """Counts of the waits since the end of the step before, in `steps`; and of each batch of an evaluation."""
    with Waits() as counted:

        def count(owner, name, found):
            function = getattr(owner, name)

            def counting(*args, **kwargs):
                before = counted.count
                result = function(*args, **kwargs)
                found(before)
                return result

            return mock.patch.object(owner, name, counting)

        def after_step(before):
            counted.steps.append(counted.count)
            counted.count = 0

        def after_batch(before):
            counted.batches.append(counted.count - before)

        with (
            count(run_mlm.RunCallback, "on_step_end", after_step),
            count(run_mlm.MaskedLMTrainer, "prediction_step", after_batch),
        ):
            yield counted


@pytest.mark.parametrize(("line_by_line", "limit"), [("false", 0), ("true", 1)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_step_waits_between_two_reports(tmp_path, waits, line_by_line, limit, accumulation):
    settings = {
        "model_name_or_path": make_model(tmp_path / "model"),
        "train_file": write_lines(tmp_path / "train.txt", sentences(100)),
        "validation_file": write_lines(tmp_path / "validation.txt", sentences(20, seed=1)),
        **{"output_dir": tmp_path / "output", "do_train": True, "do_eval": True, "line_by_line": line_by_line},
        **{"max_seq_length": 16, "max_steps": 12, "logging_steps": 5, "train_batch_size": 4, "max_grad_norm": 0.1},
        **{"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 5},
    }
    run_mlm.main(flags(**settings))
    # The first one is from the start of the run; those after the fifth and the tenth have the reports.
    between = waits.steps[1:5] + waits.steps[6:10] + waits.steps[11:]
    assert between == [limit * accumulation] * 9
    assert len(waits.batches) > 4 and max(waits.batches) <= limit


# Both scripts share this process: JAX and Python warn of a fork beside its threads, which the workers do not use.
@pytest.mark.filterwarnings("ignore:.*fork\\(\\):RuntimeWarning", "ignore:.*fork\\(\\):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")  # On two cores.
def test_any_number_of_loader_workers_makes_the_same_run(model_folder, text_files, tmp_path):
    found = []
    for workers in (0, 1, 3):
        output = tmp_path / str(workers)
        for steps in (5, 8):  # The second run resumes in the middle of the first epoch.
            settings = {"max_steps": steps, "line_by_line": "true", "dataloader_num_workers": workers}
            run_mlm.main(training_flags(model_folder, text_files, output, **settings))
        found.append((weights(output), history(output)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 0), (3, 1, 2), (16, 1, 4), (16, 8, 1)])
def test_a_few_workers_make_the_batches_of_a_gpu(cores, processes, workers):
    with (
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(processes)),
        mock.patch.object(os, "sched_getaffinity", lambda pid: range(cores)),
    ):
        assert run_mlm.default_workers() == 0  # Without a GPU.
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            assert run_mlm.default_workers() == workers


def test_one_process_for_several_gpus_is_told_what_to_run(caplog):
    run_mlm.log_devices(SimpleNamespace(n_gpu=4, dataloader_num_workers=3))
    assert "3 loader workers" in caplog.messages[0]
    assert "torchrun --nproc_per_node 4 " in caplog.messages[1]


def test_example_predictions_that_fail_do_not_end_a_run(model_folder, text_files, tmp_path, caplog):
    arguments = training_flags(model_folder, text_files, tmp_path / "output", max_steps=1)
    with mock.patch.object(transformers.PreTrainedTokenizerBase, "decode", side_effect=RuntimeError("no words")):
        metrics = run_mlm.main(arguments)
    assert "the example predictions: no words" in caplog.text
    assert metrics["eval_loss"] > 0
