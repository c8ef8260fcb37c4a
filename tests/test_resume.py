"""A stopped, killed or failed run goes on where it was, and ends as one that was never stopped."""

import contextlib
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
from conftest import ROOT, error_line, finished_run, flags, history, optional_module, read_json, training_flags, weights

run_mlm = optional_module("run_mlm")


@pytest.mark.parametrize("line_by_line", ["false", "true"])
@pytest.mark.parametrize("step", [3, 9])
def test_resumed_run_equals_the_uninterrupted_one(script, model_folder, text_files, tmp_path, line_by_line, step):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    if line_by_line == "false":
        whole = finished_run(script)
    else:
        script.main(training_flags(model_folder, text_files, whole, line_by_line=line_by_line))
    assert {f"checkpoint-{step}" for step in (3, 6, 9, 12)} <= set(os.listdir(whole))
    shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
    script.main(training_flags(model_folder, text_files, resumed, line_by_line=line_by_line))
    assert history(resumed) == history(whole)
    assert weights(resumed) == weights(whole)
    results = read_json(resumed, "train_results.json"), read_json(whole, "train_results.json")
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-4)  # Of rounded reports.
    steps = results[0]["train_steps_per_second"] * results[0]["train_runtime"]
    assert steps == pytest.approx(12 - step, rel=0.02)  # Those before the resume do not count; rounded.
    (logged,) = [entry for entry in read_json(resumed, "trainer_state.json")["log_history"] if "train_loss" in entry]
    assert {name: results[0][name] for name in logged if name != "step"} == {
        name: value for name, value in logged.items() if name != "step"
    }


def test_incomplete_checkpoints_are_ignored_with_a_warning(script, model_folder, text_files, tmp_path, caplog):
    whole, resumed = finished_run(script), tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-12"))
    state = resumed / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text()[: state.stat().st_size // 2])
    (resumed / "checkpoint-6" / "trainer_state.json").unlink()
    script.main(training_flags(model_folder, text_files, resumed, save_total_limit=1))
    for name in ("checkpoint-9", "checkpoint-6"):
        assert f"{resumed / name}" in caplog.text
    assert f"Resuming from {resumed / 'checkpoint-3'}" in caplog.text
    assert weights(resumed) == weights(whole)
    assert [step for step, _ in script.list_checkpoints(str(resumed))] == [12]


def test_a_checkpoint_with_broken_weights_is_an_error(script, model_folder, text_files, tmp_path, capsys):
    output = tmp_path / "output"
    script.main(training_flags(model_folder, text_files, output, max_steps=3))
    path = output / "checkpoint-3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match="2"):
        script.main(training_flags(model_folder, text_files, output))
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(output / "checkpoint-3") in error


@pytest.mark.flax
def test_a_checkpoint_of_the_flax_classes_of_transformers_is_refused(model_folder, text_files, tmp_path, capfd):
    """Their optimizer state has other names: {"bert": {"encoder": {"layer": {"0": ... {"kernel": ...}}}}}."""
    from flax import serialization
    from flax.traverse_util import flatten_dict, unflatten_dict

    script, checkpoint = importlib.import_module("run_mlm_flax"), tmp_path / "output" / "checkpoint-3"
    arguments = training_flags(model_folder, text_files, tmp_path / "output")
    script.main([*arguments, "--max_steps", "3"])
    path = checkpoint / "optimizer.msgpack"
    saved = serialization.msgpack_restore(path.read_bytes())
    adam = saved["1"]["0"]
    for moment in ("mu", "nu"):
        parts = {(*".".join(path[:-1]).split("."), path[-1]): leaf for path, leaf in flatten_dict(adam[moment]).items()}
        adam[moment] = unflatten_dict(parts)
    assert "kernel" in adam["mu"]["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    path.write_bytes(serialization.msgpack_serialize(saved))
    before = weights(checkpoint)
    line = error_line(script, arguments, capfd)
    assert line.startswith(f"error: the optimizer state in {checkpoint}: "), line
    assert weights(checkpoint) == before


def test_a_named_checkpoint_is_resumed_in_another_folder(script, model_folder, text_files, tmp_path):
    whole, resumed = finished_run(script), tmp_path / "resumed"
    named = training_flags(model_folder, text_files, resumed, resume_from_checkpoint=whole / "checkpoint-6")
    script.main(named)
    assert history(resumed) == history(whole)
    assert weights(resumed) == weights(whole)
    assert sorted(path.name for path in resumed.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


def test_a_named_checkpoint_does_not_overwrite_another_model(script, model_folder, text_files, tmp_path, capfd):
    settings = {"max_steps": 3, "eval_strategy": "no"}
    script.main(training_flags(model_folder, text_files, tmp_path / "first", **settings))
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    settings |= {"resume_from_checkpoint": tmp_path / "first" / "checkpoint-3", "max_steps": 4}
    line = error_line(script, training_flags(model_folder, text_files, other, **settings), capfd)
    assert f"--output_dir {other} is not empty" in line
    assert weights(other) == weights(model_folder)
    script.main(training_flags(model_folder, text_files, other, overwrite_output_dir=True, **settings))
    assert weights(other) != weights(model_folder)


def test_overwriting_with_a_named_checkpoint_starts_from_it(script, model_folder, text_files, tmp_path, caplog, capfd):
    other = tmp_path / "other"
    script.main(training_flags(model_folder, text_files, other, max_steps=9, seed=7))
    named = {"resume_from_checkpoint": finished_run(script) / "checkpoint-3"}
    script.main(training_flags(model_folder, text_files, other, overwrite_output_dir=True, **named))
    assert f"Resuming from {named['resume_from_checkpoint']}" in caplog.text
    assert weights(other) == weights(finished_run(script))
    assert sorted(path.name[11:] for path in other.glob("checkpoint-*")) == ["12", "6", "9"]
    # A mistake deletes nothing.
    arguments = training_flags(model_folder, text_files, other, overwrite_output_dir=True, max_steps=3)
    line = error_line(script, [*arguments, *flags(resume_from_checkpoint=other / "checkpoint-6")], capfd)
    assert "already past" in line
    assert sorted(path.name[11:] for path in other.glob("checkpoint-*")) == ["12", "6", "9"]
    # Within its own folder, the run goes back to the checkpoint.
    (tmp_path / "link").symlink_to(other)
    named = {"resume_from_checkpoint": tmp_path / "link" / "checkpoint-6", "save_strategy": "no"}
    script.main(training_flags(model_folder, text_files, other, overwrite_output_dir=True, **named))
    assert weights(other) == weights(finished_run(script))
    assert [path.name for path in other.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("changes", [{"learning_rate": 4e-3}, {"max_steps": 9, "lr_scheduler_type": "linear"}])
def test_a_resumed_run_has_the_schedule_of_its_flags(script, model_folder, text_files, tmp_path, changes):
    named = {"resume_from_checkpoint": finished_run(script) / "checkpoint-6"}
    output = tmp_path / "output"
    script.main(training_flags(model_folder, text_files, output, **named, **changes))
    rates = [entry["learning_rate"] for entry in history(output) if entry["step"] > 6 and "loss" in entry]
    expected = [4e-3] * 6 if "learning_rate" in changes else [1e-3 * left / 9 for left in (3, 2, 1)]
    assert rates == pytest.approx(expected)


def test_save_total_limit_keeps_the_newest(script, model_folder, text_files, tmp_path):
    output = tmp_path / "output"
    script.main(training_flags(model_folder, text_files, output, save_steps=2, save_total_limit=2))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]


def test_a_checkpoint_after_each_epoch(script, model_folder, text_files, tmp_path):
    output = tmp_path / "output"
    settings = {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    script.main(training_flags(model_folder, text_files, output, **settings))
    steps = read_json(output, "trainer_state.json")["global_step"]
    assert [step for step, _ in script.list_checkpoints(str(output))] == [steps // 2, steps]


def test_a_run_killed_in_its_first_checkpoint_starts_again(script, model_folder, text_files, tmp_path, caplog):
    checkpoint = tmp_path / "output" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"")
    script.main(training_flags(model_folder, text_files, tmp_path / "output", max_steps=3))
    assert f"{checkpoint} is ignored" in caplog.text
    assert weights(checkpoint) == weights(finished_run(script) / "checkpoint-3")
    assert script.list_checkpoints(str(tmp_path / "output")) == [(3, str(checkpoint))]


def test_finished_run_is_not_trained_further(script, model_folder, text_files, tmp_path, capsys, caplog):
    output = tmp_path / "output"
    shutil.copytree(finished_run(script), output)
    caplog.clear()
    before = weights(output), history(output), read_json(output, "eval_results.json")["eval_loss"]
    loss = read_json(output, "train_results.json")["train_loss"]
    script.main(training_flags(model_folder, text_files, output))
    assert "The run is finished." in caplog.text
    assert (weights(output), read_json(output, "eval_results.json")["eval_loss"]) == (before[0], before[2])
    assert read_json(output, "train_results.json")["train_loss"] == pytest.approx(loss, rel=1e-4)
    for changes in ({"max_steps": 7}, {"resume_from_checkpoint": output / "checkpoint-3"}):
        with pytest.raises(SystemExit, match="2"):
            script.main(training_flags(model_folder, text_files, output, **changes))
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "checkpoint-12" in error
    assert weights(output) == before[0]


def test_batch_size_may_change_on_resume(script, model_folder, text_files, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"dropout_rate": 0, "max_steps": 12}
    script.main(training_flags(model_folder, text_files, whole, **settings))
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    split = {"train_batch_size": 2, "gradient_accumulation_steps": 4}
    script.main(training_flags(model_folder, text_files, resumed, **settings, **split))
    losses = [[entry["loss"] for entry in history(output) if "loss" in entry] for output in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_mean_loss_of_a_resumed_run_counts_all_steps(script, model_folder, text_files, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"logging_steps": 6, "save_steps": 6, "max_steps": 11}
    script.main(training_flags(model_folder, text_files, whole, **settings))
    shutil.copytree(whole / "checkpoint-6", resumed / "checkpoint-6")
    script.main(training_flags(model_folder, text_files, resumed, **settings))
    results = [read_json(output, "train_results.json")["train_loss"] for output in (whole, resumed)]
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.flax
@pytest.mark.pytorch
def test_the_other_script_does_not_resume_it(model_folder, text_files, tmp_path, capsys):
    names = {"run_mlm": tmp_path / "run_mlm", "run_mlm_flax": tmp_path / "run_mlm_flax"}
    for name, output in names.items():
        script = importlib.import_module(name)
        script.main(training_flags(model_folder, text_files, output, max_steps=2, save_steps=2))
    for name, output in zip(names, reversed(names.values())):
        before = weights(output)
        named = {"resume_from_checkpoint": output / "checkpoint-2"}
        for changes, flag in (({}, f"--output_dir {output}"), (named, f"--resume_from_checkpoint {output}")):
            with pytest.raises(SystemExit, match="2"):
                importlib.import_module(name).main(training_flags(model_folder, text_files, output, **changes))
            assert f"error: {flag}" in capsys.readouterr().err
        assert weights(output) == before


@pytest.fixture
def signal_in_the_second_epoch(script, monkeypatch):
    """A function that has a signal sent when the first sample of the second epoch is fetched: in or before step 8."""
    fetch = script.TokenizedDataset.__getitems__

    def install(number):
        sent = []

        def send_signal(self, keys):
            if not self.fixed_masks and max(key.epoch for key in keys) == 1 and not sent:
                sent.append(True)
                os.kill(os.getpid(), number)
            return fetch(self, keys)

        monkeypatch.setattr(script.TokenizedDataset, "__getitems__", send_signal)

    return install


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_at_the_next_step_and_exits(
    script, model_folder, text_files, tmp_path, signal_in_the_second_epoch, number, status
):
    whole, stopped = finished_run(script), tmp_path / "stopped"
    handler = signal.getsignal(number)
    signal_in_the_second_epoch(number)
    with pytest.raises(SystemExit) as exit_info:
        script.main(training_flags(model_folder, text_files, stopped, save_strategy="no"))
    assert exit_info.value.code == status
    assert signal.getsignal(number) is handler
    (checkpoint,) = stopped.glob("checkpoint-*")
    assert 6 < int(checkpoint.name[11:]) < 10
    assert not (stopped / "train_results.json").exists()
    script.main(training_flags(model_folder, text_files, stopped))
    assert weights(stopped) == weights(whole)


def test_a_signal_saves_before_the_evaluation_that_is_due(
    script, model_folder, text_files, tmp_path, signal_in_the_second_epoch
):
    signal_in_the_second_epoch(signal.SIGTERM)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
    with pytest.raises(SystemExit, match="143"):
        script.main(training_flags(model_folder, text_files, tmp_path / "output", **settings))
    (checkpoint,) = (tmp_path / "output").glob("checkpoint-*")
    step = int(checkpoint.name[11:])
    entries = read_json(checkpoint, "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == list(range(1, step))


@pytest.mark.pytorch
def test_a_stop_saves_the_optimizer_of_a_run_that_saves_only_models(
    model_folder, text_files, tmp_path, monkeypatch, caplog
):
    predict, settings = run_mlm.MaskedLMTrainer.prediction_step, {"save_only_model": True, "save_steps": 2}

    def send_signal(trainer, *args, **kwargs):  # In the evaluation at the end of the first epoch.
        if not trainer.callback_handler.callbacks[-1].signals.number:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(run_mlm.MaskedLMTrainer, "prediction_step", send_signal)
        run_mlm.main(training_flags(model_folder, text_files, tmp_path / "output", **settings))
    lines = [record.getMessage() for record in caplog.records if "Saved" in record.getMessage()]
    assert [line.endswith(", without an optimizer state: it cannot be resumed.") for line in lines] == [True] * 3 + [
        False
    ]
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "output", **settings))
    assert f"Resuming from {tmp_path / 'output' / 'checkpoint-8'}" in caplog.text
    assert weights(tmp_path / "output") == weights(finished_run(run_mlm))


@pytest.mark.shared
def test_a_further_sigterm_changes_nothing_and_a_late_ctrl_c_ends_the_program(script):
    with pytest.raises(SystemExit, match="143"), script.StopSignals() as signals, signals.defer():
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            assert signals.number == signal.SIGTERM
    patch = mock.patch("os.kill")
    with patch as kill, pytest.raises(SystemExit, match="130"), script.StopSignals() as signals, signals.defer():
        for _ in range(2):  # A key that was hit twice.
            signal.raise_signal(signal.SIGINT)
        kill.assert_not_called()
        signals.time -= 3
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        kill.assert_called_once_with(os.getpid(), signal.SIGINT)


@pytest.mark.pytorch
def test_a_late_ctrl_c_leaves_no_loader_worker(monkeypatch):
    """Python would wait forever for a worker that is left."""
    killed, handlers = [], {number: signal.getsignal(number) for number in run_mlm.STOP_SIGNALS}

    class Worker:
        def kill(self):
            signal.raise_signal(signal.SIGINT)
            killed.append(self)

    monkeypatch.setattr(run_mlm.multiprocessing, "active_children", lambda: [Worker(), Worker()])
    try:
        run_mlm.leave_process_group()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert len(killed) == 2


@pytest.mark.shared
def test_a_signal_whose_exit_is_swallowed_ends_the_program_later(script):
    """As in a callback of the garbage collector, after the training."""
    swallow = contextlib.suppress(SystemExit)
    with pytest.raises(SystemExit, match="143"), script.StopSignals(), swallow:
        signal.raise_signal(signal.SIGTERM)


def test_output_dir_rules(script, model_folder, text_files, tmp_path, capsys, caplog):
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        script.main(training_flags(model_folder, text_files, output))
    assert "--overwrite_output_dir" in capsys.readouterr().err
    script.main(training_flags(model_folder, text_files, output, overwrite_output_dir=True))
    assert "Starting a new run" in caplog.text
    assert (output / "notes.txt").read_text() == "mine"
    caplog.clear()
    script.main(training_flags(model_folder, text_files, output))
    assert f"Resuming from {output / 'checkpoint-12'}" in caplog.text
    script.main(training_flags(model_folder, text_files, output, overwrite_output_dir=True, save_steps=5))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-5",
    ]


def test_a_model_folder_initialises_and_is_not_resumed(script, model_folder, text_files, tmp_path, caplog):
    first, second = finished_run(script), tmp_path / "second"
    caplog.clear()
    script.main(training_flags(first / "checkpoint-6", text_files, second))
    assert "Starting a new run" in caplog.text and "Resuming" not in caplog.text
    assert read_json(second, "trainer_state.json")["log_history"][0]["step"] == 1


@pytest.mark.pytorch
def test_best_model_is_loaded_and_kept(model_folder, text_files, tmp_path):
    output = tmp_path / "output"
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 1, "load_best_model_at_end": True}
    # The first steps are the best, and each one after them makes it worse.
    settings |= {"learning_rate": 5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 12}
    run_mlm.main(training_flags(model_folder, text_files, output, **settings))
    state = read_json(output, "trainer_state.json")
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=lambda step: (losses[step], step))
    assert best < 12
    assert state["best_model_checkpoint"] == str(output / f"checkpoint-{best}")
    assert weights(output) == weights(output / f"checkpoint-{best}")
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-12"}


@pytest.mark.pytorch
def test_the_best_model_moves_with_its_folder(model_folder, text_files, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    settings |= {"learning_rate": 5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 12}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "before", **settings))
    best = read_json(tmp_path / "before", "trainer_state.json")["best_global_step"]
    assert best < 12
    os.rename(tmp_path / "before", tmp_path / "after")
    shutil.copytree(tmp_path / "after" / "checkpoint-12", tmp_path / "before" / f"checkpoint-{best}")  # Another run.
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "after", **settings))
    state = read_json(tmp_path / "after", "trainer_state.json")
    assert state["best_model_checkpoint"] == str(tmp_path / "after" / f"checkpoint-{best}")
    assert weights(tmp_path / "after") == weights(tmp_path / "after" / f"checkpoint-{best}")


@pytest.mark.pytorch
def test_another_optimizer_does_not_resume(model_folder, text_files, tmp_path, capfd):
    named = {"resume_from_checkpoint": finished_run(run_mlm) / "checkpoint-9", "optim": "adafactor"}
    line = error_line(run_mlm, training_flags(model_folder, text_files, tmp_path / "output", **named), capfd)
    assert "checkpoint-9 is of another optimizer than --optim adafactor" in line


def test_a_folder_may_have_the_name_of_a_tensorflow_checkpoint(script, text_files, tmp_path, caplog):
    model, output = shutil.copytree(finished_run(script), tmp_path / "model.ckpt"), tmp_path / "output.ckpt"
    for steps in (2, 3):
        script.main(training_flags(model, text_files, output, max_steps=steps, save_steps=1))
    assert f"Resuming from {output / 'checkpoint-2'}" in caplog.text


@pytest.mark.pytorch
def test_signal_in_the_last_evaluation_still_saves(model_folder, text_files, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "loss"}
    run_mlm.main(training_flags(model_folder, text_files, whole, **settings))
    predict = run_mlm.MaskedLMTrainer.prediction_step

    def send_signal(self, *args, **kwargs):
        if self.state.global_step == 12 and not self.callback_handler.callbacks[-1].signals.number:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_mlm.MaskedLMTrainer, "prediction_step", send_signal)
        with pytest.raises(SystemExit, match="143"):
            run_mlm.main(training_flags(model_folder, text_files, stopped, save_strategy="no", **settings))
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-12"]
    run_mlm.main(training_flags(model_folder, text_files, stopped, **settings))
    assert weights(stopped) == weights(whole)


def test_a_signal_that_a_library_turns_into_an_error_is_a_stop(script, model_folder, text_files, tmp_path, caplog):
    """As from compiled code that loads weights, which raises what it likes when Python raises inside it."""
    line = training_flags(model_folder, text_files, tmp_path / "output")

    def load(*args, **kwargs):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise RuntimeError("could not determine the shape of an object") from None

    with mock.patch.object(script.AutoConfig, "from_pretrained", load), pytest.raises(SystemExit, match="143"):
        script.main(line)
    assert "Stopped by SIGTERM." in caplog.text


def test_full_disk(script, model_folder, text_files, tmp_path):
    """A disk that is full from some moment on: a limit to the size of files, set from outside on a running program."""
    output = tmp_path / "output"
    line = training_flags(model_folder, text_files, output, save_steps=1, max_steps=15)
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *line]
    # A cache of its own: what is compiled under such a limit could crash the others that read it.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        for printed in process.stdout:
            if "Saved " in printed and "checkpoint-2" in printed:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
                break
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"--output_dir {output}" in error and "is the disk full?" in error
    steps = [step for step, _ in script.list_checkpoints(str(output))]
    assert steps == list(range(1, len(steps) + 1)) and 2 <= len(steps) < 15
    script.main(line)
    script.main(training_flags(model_folder, text_files, tmp_path / "whole", save_steps=1, max_steps=15))
    assert weights(output) == weights(tmp_path / "whole")


def test_ctrl_c_stops_the_program_and_the_same_command_resumes(script, model_folder, text_files, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = {"max_steps": 300, "save_strategy": "no", "eval_strategy": "no"}
    command = [sys.executable, str(ROOT / f"{script.__name__}.py")]
    command += training_flags(model_folder, text_files, stopped, **settings)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        for printed in process.stdout:
            if "grad_norm" in printed:
                os.killpg(process.pid, signal.SIGINT)  # As the terminal does.
                break
        rest, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "SIGINT: stopping after this step; a second Ctrl-C stops without a checkpoint." in errors.splitlines()
    (checkpoint,) = stopped.glob("checkpoint-*")
    step = int(checkpoint.name[11:])
    assert f"Stopped by SIGINT; checkpoint-{step} is saved." in rest
    for output in (stopped, whole):
        script.main(training_flags(model_folder, text_files, output, **{**settings, "max_steps": step + 3}))
    assert weights(stopped) == weights(whole)


def test_a_run_in_a_thread_that_gets_no_signals(script, model_folder, text_files, tmp_path):
    """As in a notebook, or in the worker of a scheduler."""
    arguments = training_flags(model_folder, text_files, tmp_path / "output", max_steps=2)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(script.main, arguments).result()["train_loss"] > 0


@pytest.mark.flax
@pytest.mark.pytorch
def test_a_checkpoint_is_a_model_for_the_other_script(model_folder, text_files, tmp_path):
    for name in ("run_mlm", "run_mlm_flax"):
        script = importlib.import_module(name)
        other = importlib.import_module("run_mlm" if name == "run_mlm_flax" else "run_mlm_flax")
        settings = {"max_steps": 3, "dropout_rate": 0}
        script.main(training_flags(model_folder, text_files, tmp_path / name, **settings))
        loss = read_json(tmp_path / name, "eval_results.json")["eval_loss"]
        arguments = training_flags(tmp_path / name / "checkpoint-3", text_files, tmp_path / f"{name}-other")
        metrics = other.main([*arguments, "--do_train", "false"])
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
