"""What a run does in a step follows from the step alone: whatever was evaluated, saved, stopped or split before."""

import collections
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    ROOT,
    finished_run,
    flags,
    history,
    optional_module,
    read_json,
    sentences,
    set_up,
    training_flags,
    weights,
    write_lines,
)

torch = optional_module("torch")
run_mlm = optional_module("run_mlm")
run_mlm_flax = optional_module("run_mlm_flax")


def evaluations(output):
    """Return {step: loss} of the evaluations during training."""
    entries = read_json(output, "trainer_state.json")["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}


@pytest.fixture
def signal_in_step(script, monkeypatch):
    """A function that has a signal sent while a step is computed, once."""
    place, name = script.MaskedLMTrainer, "training_step" if script is run_mlm else "read_steps"
    function, sent = getattr(place, name), []

    def install(step, number=signal.SIGTERM):
        def send(run, *args, **kwargs):
            done = run.state.global_step if script is run_mlm else run.step
            if done + 1 == step and not sent:
                sent.append(os.kill(os.getpid(), number))
            return function(run, *args, **kwargs)

        monkeypatch.setattr(place, name, send)

    return install


def stop_and_resume(script, arguments):
    """Run a command that a signal stops, and the same command again."""
    with pytest.raises(SystemExit, match="143"):
        script.main(arguments)
    script.main(arguments)


def test_an_evaluation_after_a_checkpoint_changes_no_dropout(script, model_folder, text_files, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "resumed"
    settings = {"save_steps": 8, "max_steps": 16, "eval_strategy": "epoch"}  # Epochs of 8 steps.
    script.main(training_flags(model_folder, text_files, whole, **settings))
    assert list(evaluations(whole)) == [8, 16]
    named = {"resume_from_checkpoint": whole / "checkpoint-8"}
    script.main(training_flags(model_folder, text_files, output, **settings, **named))
    assert history(output) == history(whole)
    assert weights(output) == weights(whole)


def test_a_stopped_run_whose_settings_are_those_of_its_folder(script, tmp_path, signal_in_step):
    output = tmp_path / "output"
    shutil.copytree(finished_run(script), output)
    signal_in_step(13)
    stop_and_resume(script, [str(output / "arguments.json"), *flags(output_dir=output, max_steps=14)])
    assert read_json(output, "trainer_state.json")["global_step"] == 14


def test_a_stop_delays_the_evaluation_that_is_due(script, model_folder, text_files, tmp_path, signal_in_step):
    settings = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "no", "max_steps": 16}
    script.main(training_flags(model_folder, text_files, tmp_path / "whole", **settings))
    assert list(evaluations(tmp_path / "whole")) == [5, 10, 15, 16]
    signal_in_step(10)
    stop_and_resume(script, training_flags(model_folder, text_files, tmp_path / "output", **settings))
    assert (tmp_path / "output" / "checkpoint-10").is_dir()
    assert history(tmp_path / "output") == history(tmp_path / "whole")


FALLING = {"learning_rate": 0.02}
RISING = {"learning_rate": 5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 15}


@pytest.mark.pytorch
@pytest.mark.parametrize(
    ("step", "best", "changes"),
    # In the last case, the best model is one of which no checkpoint is due, so that it cannot be loaded at the end.
    [(5, 5, RISING), (15, 15, FALLING), (5, 10, {**RISING, "save_steps": 10, "save_total_limit": 2})],
)
def test_a_stop_changes_no_best_model(model_folder, text_files, tmp_path, monkeypatch, step, best, changes):
    settings = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5, "max_steps": 15}
    settings |= {"load_best_model_at_end": True, "save_total_limit": 1, **changes}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "whole", **settings))
    training_step, sent = run_mlm.MaskedLMTrainer.training_step, []

    def send(trainer, *args, **kwargs):
        if trainer.state.global_step + 1 == step and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(run_mlm.MaskedLMTrainer, "training_step", send)
    stop_and_resume(run_mlm, training_flags(model_folder, text_files, tmp_path / "output", **settings))
    states = [read_json(tmp_path / name, "trainer_state.json") for name in ("whole", "output")]
    losses = evaluations(tmp_path / "whole")
    saved = [number for number in losses if number % settings["save_steps"] == 0 or number == 15]
    assert best == min(saved, key=losses.get) and step == min(losses, key=losses.get)
    assert states[0]["best_global_step"] == states[1]["best_global_step"] == best
    assert weights(tmp_path / "output") == weights(tmp_path / "whole")


@pytest.mark.parametrize("logging", [{"logging_steps": 7}, {"logging_steps": 100}])
def test_a_resumed_run_reports_the_losses_of_all_its_steps(script, model_folder, text_files, tmp_path, logging):
    settings = {**logging, "save_steps": 3, "max_steps": 11}
    whole, output = tmp_path / "whole", tmp_path / "resumed"
    script.main(training_flags(model_folder, text_files, whole, **settings))
    every = [entry["loss"] for entry in history(finished_run(script)) if "loss" in entry][:11]
    reported = {entry["step"]: entry["loss"] for entry in history(whole) if "loss" in entry}
    expected = {7: np.mean(every[:7]), 11: np.mean(every[7:])} if 7 in reported else {11: np.mean(every)}
    assert reported == pytest.approx(expected, rel=1e-6)
    assert read_json(whole, "train_results.json")["train_loss"] == pytest.approx(np.mean(every), rel=1e-6)
    named = {"resume_from_checkpoint": whole / "checkpoint-3"}
    script.main(training_flags(model_folder, text_files, output, **settings, **named))
    assert history(output) == history(whole)


@pytest.mark.pytorch
def test_the_mean_loss_needs_no_report(model_folder, text_files, tmp_path):
    settings = {"logging_strategy": "no", "save_steps": 3, "max_steps": 11}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "whole", **settings))
    every = [entry["loss"] for entry in history(finished_run(run_mlm)) if "loss" in entry][:11]
    named = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-9"}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "output", **settings, **named))
    for name in ("whole", "output"):
        results = read_json(tmp_path / name, "train_results.json")
        assert results["train_loss"] == pytest.approx(np.mean(every), rel=1e-6)


@pytest.fixture
def trained(script, monkeypatch):
    """Count (epoch, index) of the samples that are read for training, those without labels left out."""
    counts, fetch = collections.Counter(), script.TokenizedDataset.__getitems__

    def record(self, keys):
        samples = fetch(self, keys)
        if not self.fixed_masks:
            counts.update((sample["epoch"], sample["index"]) for sample in samples if sample["labelled"])
        return samples

    monkeypatch.setattr(script.TokenizedDataset, "__getitems__", record)
    return counts


@pytest.mark.parametrize("more", [{}, {"line_by_line": "true", "group_by_length": True}])
@pytest.mark.parametrize("drop", ["true", "false"])
def test_another_batch_size_goes_on_behind_the_last_sample(
    script, model_folder, text_files, tmp_path, trained, more, drop
):
    settings = {"gradient_accumulation_steps": 1, "dataloader_drop_last": drop, "do_eval": "false", **more}
    settings |= {"eval_strategy": "no", "num_train_epochs": 2, "save_steps": 5}
    first = {"train_batch_size": 8, "max_steps": 5}
    script.main(training_flags(model_folder, text_files, tmp_path / "output", **{**settings, **first}))
    assert len(trained) == 40
    then = {"train_batch_size": 6, "max_steps": -1}
    script.main(training_flags(model_folder, text_files, tmp_path / "output", **{**settings, **then}))
    epochs = collections.Counter(epoch for epoch, _ in trained)
    assert set(trained.values()) == {1}  # No sample of an epoch is repeated ...
    # ... and none is left out, but for the incomplete last step of 60 - 60 % 8 samples.
    assert epochs == {0: 40 + 12, 1: 60} if drop == "true" else {0: 60, 1: 60}
    # 5 steps of 8, then steps of 6: the rest of the first epoch, and 10 of the second.
    steps = 5 + (2 if drop == "true" else 4) + 10
    assert read_json(tmp_path / "output", "trainer_state.json")["global_step"] == steps


def test_a_finished_run_is_finished_with_any_batch_size(script, model_folder, text_files, tmp_path):
    settings = {"dataloader_drop_last": "true", "max_steps": -1, "num_train_epochs": 1, "do_eval": "false"}
    settings |= {"eval_strategy": "no", "save_steps": 100}
    script.main(training_flags(model_folder, text_files, tmp_path / "output", **settings))
    before = weights(tmp_path / "output")
    for batch_size in (3, 5, 7):
        script.main(
            training_flags(
                model_folder, text_files, tmp_path / "output", **{**settings, "train_batch_size": batch_size}
            )
        )
    assert read_json(tmp_path / "output", "trainer_state.json")["global_step"] == 60 // 8
    assert weights(tmp_path / "output") == before


def test_an_incomplete_last_step_counts_each_sample_once(script, model_folder, text_files, tmp_path, trained):
    settings = {"max_train_samples": 13, "max_steps": -1, "num_train_epochs": 2, "do_eval": "false"}
    settings["eval_strategy"] = "no"
    script.main(training_flags(model_folder, text_files, tmp_path / "output", **settings))
    assert trained == {(epoch, index): 1 for epoch in range(2) for index in range(13)}
    assert read_json(tmp_path / "output", "trainer_state.json")["global_step"] == 4


@pytest.mark.parametrize("drop", ["true", "false"])
def test_what_is_dropped_is_drawn_before_grouping_by_length(script, model_folder, tmp_path, drop):
    texts = ["boats " * count for count in (*[9] * 20, 1)]  # One short text would be the last one of each epoch.
    settings = {"model_name_or_path": model_folder, "output_dir": tmp_path / "output", "max_seq_length": 16}
    path = write_lines(tmp_path / "train.txt", texts)
    settings |= {"train_file": path, "validation_file": path, "train_batch_size": 5}
    settings |= {"line_by_line": "true", "group_by_length": True, "num_train_epochs": 10, "dataloader_drop_last": drop}
    run = set_up(script, flags(**settings))
    steps = [{key.index for key in keys if key.labelled} for keys in run.plan.steps()]
    per_epoch = 4 if drop == "true" else 5
    assert len(steps) == 10 * per_epoch
    epochs = [set().union(*steps[i : i + per_epoch]) for i in range(0, len(steps), per_epoch)]
    assert {len(epoch) for epoch in epochs} == {20 if drop == "true" else 21}
    assert 5 < sum(20 in epoch for epoch in epochs) <= 10  # 20 / 21 of the epochs train the short text.


CHANGES = [
    ({"seed": 7, "max_train_samples": 50}, ["seed 42 (now 7)", "samples 60 (now 50)"]),
    (
        {"max_seq_length": 24, "whole_word_mask": True},
        ["max_seq_length 16 (now 24)", "whole_word_mask False (now True)"],
    ),
    ({"line_by_line": "true"}, ["line_by_line False (now True)"]),
]


@pytest.mark.parametrize(("changes", "named_changes"), CHANGES)
def test_changed_settings_of_a_resume_are_named(
    script, model_folder, text_files, tmp_path, caplog, changes, named_changes
):
    named = {"resume_from_checkpoint": finished_run(script) / "checkpoint-9", "max_steps": 10}
    script.main(training_flags(model_folder, text_files, tmp_path / "same", **named))
    assert "(now" not in caplog.text
    script.main(training_flags(model_folder, text_files, tmp_path / "other", **{**named, **changes}))
    (line,) = [record.getMessage() for record in caplog.records if "(now" in record.getMessage()]
    assert "checkpoint-9 has" in line and all(change in line for change in named_changes)


def test_other_text_of_a_resume_is_named(script, model_folder, text_files, tmp_path, caplog):
    text_files["train_file"] = write_lines(tmp_path / "other.txt", sentences(110, seed=5))
    named = {"resume_from_checkpoint": finished_run(script) / "checkpoint-9", "max_steps": 10}
    script.main(training_flags(model_folder, text_files, tmp_path / "output", **named))
    (line,) = [record.getMessage() for record in caplog.records if "(now" in record.getMessage()]
    assert "checkpoint-9 has text_checksum " in line and line.count("(now") == 1  # There are as many samples.


@pytest.mark.pytorch
@pytest.mark.parametrize("name", ["perplexity", "eval_perplexity"])
def test_the_lowest_perplexity_is_the_best(model_folder, text_files, tmp_path, name):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": name}
    settings |= {"load_best_model_at_end": True}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "output", **settings))
    losses = evaluations(tmp_path / "output").values()
    state = read_json(tmp_path / "output", "trainer_state.json")
    assert state["best_metric"] == pytest.approx(np.exp(min(losses)), rel=1e-5)
    assert min(losses) < 0.999 * max(losses)


@pytest.mark.pytorch
def test_an_evaluation_at_the_start_is_not_repeated(model_folder, text_files, tmp_path):
    settings = {"eval_on_start": True, "max_steps": 6}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "whole", **settings))
    named = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3"}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "output", **settings, **named))
    assert list(evaluations(tmp_path / "output")) == [0, 6]
    assert history(tmp_path / "output") == history(tmp_path / "whole")


@pytest.mark.pytorch
@pytest.mark.parametrize("setting", ["auto_find_batch_size"])
def test_a_resumed_stream_needs_nothing_of_the_trainers_skipping(model_folder, text_files, tmp_path, setting):
    settings = {"streaming": True, "shuffle_buffer_size": 20, setting: True}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "whole", **settings))
    named = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-6"}
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "output", **settings, **named))
    assert history(tmp_path / "output") == history(tmp_path / "whole")
    assert weights(tmp_path / "output") == weights(tmp_path / "whole")


@pytest.mark.pytorch
@pytest.mark.parametrize("more", [{}, {"streaming": True, "shuffle_buffer_size": 20}])
def test_a_batch_size_that_is_found_trains_as_if_it_were_given(model_folder, text_files, tmp_path, monkeypatch, more):
    training_step, settings = run_mlm.MaskedLMTrainer.training_step, {"eval_strategy": "no", **more}

    def run_out_of_memory(trainer, *args, **kwargs):
        if trainer.args.train_batch_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_mlm.MaskedLMTrainer, "training_step", run_out_of_memory)
        found = training_flags(model_folder, text_files, tmp_path / "found", **settings, auto_find_batch_size=True)
        run_mlm.main(found)
    size = read_json(tmp_path / "found", "trainer_state.json")["train_batch_size"]
    assert size < 4
    run_mlm.main(training_flags(model_folder, text_files, tmp_path / "given", **settings, train_batch_size=size))
    assert history(tmp_path / "found") == history(tmp_path / "given")
    assert weights(tmp_path / "found") == weights(tmp_path / "given")


@pytest.mark.flax
@pytest.mark.parametrize("steps", [50_000, 2**31 - 1])  # The numbers of so many steps alone take 17 GB.
def test_the_log_names_the_peak_of_the_learning_rate(model_folder, text_files, tmp_path, caplog, steps):
    settings = {"max_steps": steps, "warmup_steps": 7, "learning_rate": 5e-5}
    schedule = {"lr_scheduler_type": "constant * linear_warmup * rsqrt_decay"}
    run = set_up(
        run_mlm_flax, training_flags(model_folder, text_files, tmp_path / "output", **{**settings, **schedule})
    )
    run.resume(None)
    assert f"peak learning rate {5e-5 / 7**0.5:.3g}" in caplog.text


@pytest.mark.parametrize("workers", [pytest.param(2, marks=pytest.mark.pytorch), 0])
def test_a_signal_to_the_group_and_a_second_one_leave_a_checkpoint(script, model_folder, text_files, tmp_path, workers):
    """As systemd, `scancel`, `timeout` and torchrun do it: workers get the signal too, and more than one comes."""
    output, whole = tmp_path / "output", tmp_path / "whole"
    more = {"dataloader_num_workers": workers} if workers else {}
    if workers and script is run_mlm_flax:
        return  # It has no workers.
    settings = {"max_steps": 300, "save_strategy": "no", "eval_strategy": "no"}
    command = [sys.executable, str(ROOT / f"{script.__name__}.py")]
    command += training_flags(model_folder, text_files, output, **settings, **more)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True, "env": environment}
    with subprocess.Popen(command, **options) as process:
        for printed in process.stdout:
            if "grad_norm" in printed:
                for _ in range(3):
                    os.killpg(process.pid, signal.SIGTERM)
                break
        rest, _ = process.communicate(timeout=240)
    assert process.returncode == 143, rest
    (checkpoint,) = output.glob("checkpoint-*")
    step = int(checkpoint.name[11:])
    assert f"Stopped by SIGTERM; checkpoint-{step} is saved." in rest
    for folder in (output, whole):
        script.main(training_flags(model_folder, text_files, folder, **{**settings, "max_steps": step + 3}))
    assert weights(output) == weights(whole)
