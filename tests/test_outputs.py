"""What a run leaves: TensorBoard charts with the logged values, and a true model card."""

import importlib
import math
import os

import pytest
from conftest import BOTH, INSTALLED, finished_run, flags, history, read_json, weights
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAGS = {f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")}
TAGS |= {f"eval/{name}" for name in ("loss", "accuracy", "perplexity")}


def run_flags(name, model_folder, text_files, output, **changes):
    """Return the command line of a run of six steps, evaluated after three, with reports every four steps."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "do_eval": True}
    settings |= {"max_seq_length": 16, "line_by_line": "false", "max_steps": 6, "logging_steps": 4, **text_files}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "dropout_rate": 0, "lr_scheduler_type": "linear"}
    settings |= {"learning_rate": 1e-3}
    if name == "run_mlm":
        settings |= {"report_to": "tensorboard"}
    return flags(**settings | changes)


@pytest.fixture(scope="module")
def runs():
    """{script: (output folder, its events)} of a finished run of both scripts."""
    folders = {name: finished_run(importlib.import_module(name)) for name in INSTALLED}
    return {
        name: (folder, EventAccumulator(str(next(folder.rglob("*tfevents*")).parent)).Reload())
        for name, folder in folders.items()
    }


@pytest.mark.flax
@pytest.mark.pytorch
def test_readers_of_the_trainers_state_find_the_settings(runs):
    names = ("logging_steps", "eval_steps", "save_steps", "train_batch_size", "max_steps", "global_step", "epoch")
    states = [read_json(folder, "trainer_state.json") for folder, _ in runs.values()]
    assert [states[0][name] for name in names] == [states[1][name] for name in names]


@pytest.mark.parametrize("name", BOTH)
def test_all_files_follow_the_umask(runs, name):
    modes = {path.name: path.stat().st_mode & 0o777 for path in runs[name][0].rglob("*") if path.is_file()}
    os.umask(mask := os.umask(0))
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~mask}, modes


def points(events, tag):
    """Return the (step, value) pairs of a chart in the order of time."""
    # The Trainer opens a second file for the last evaluation; TensorBoard reads files in the order of their names.
    found = sorted(events.Scalars(tag), key=lambda point: point.wall_time)
    return [point.step for point in found], [point.value for point in found]


@pytest.mark.parametrize("name", BOTH)
def test_charts_hold_the_logged_values(runs, name):
    output, events = runs[name]
    assert set(events.Tags()["scalars"]) >= TAGS
    entries = read_json(output, "trainer_state.json")["log_history"]
    for tag in sorted(TAGS):
        chart, name = tag.split("/")
        key = f"eval_{name}" if chart == "eval" and name != "perplexity" else name
        expected = [(entry["step"], entry[key]) for entry in entries if key in entry]
        assert [step for step, _ in expected] == ([8, 12] if chart == "eval" else list(range(1, 13)))
        steps, values = points(events, tag)
        assert steps == [step for step, _ in expected]
        assert values == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.flax
@pytest.mark.pytorch
def test_both_scripts_draw_the_same_charts(model_folder, text_files, tmp_path):
    drawn = []
    for name in INSTALLED:
        changes = {"max_steps": 7, "logging_steps": 2, "dataloader_drop_last": "false"}
        importlib.import_module(name).main(run_flags(name, model_folder, text_files, tmp_path / name, **changes))
        drawn.append(EventAccumulator(str(next((tmp_path / name).rglob("*tfevents*")).parent)).Reload())
    one, other = drawn
    # The Trainer also estimates its operations.
    assert set(one.Tags()["scalars"]) - {"train/total_flos"} == set(other.Tags()["scalars"])
    for tag in TAGS - {"train/tokens_per_second"}:
        (steps, values), (other_steps, others) = points(one, tag), points(other, tag)
        assert steps == other_steps == ([3, 6, 7] if tag.startswith("eval") else [2, 4, 6, 7])
        assert values[0] == pytest.approx(others[0], rel=1e-4)
        assert values[-1] == pytest.approx(others[-1], rel=1e-3)


def test_the_last_step_is_reported_and_evaluated_once(script, model_folder, text_files, tmp_path):
    for strategy, changes in (("steps", {}), ("epoch", {"max_steps": -1, "num_train_epochs": 2})):
        output = tmp_path / strategy
        changes |= {"eval_strategy": strategy}
        script.main(run_flags(script.__name__, model_folder, text_files, output, **changes))
        entries, last = history(output), read_json(output, "trainer_state.json")["global_step"]
        assert [entry["step"] for entry in entries if "eval_loss" in entry] == [last // 2, last]
        assert [entry["step"] for entry in entries if "loss" in entry] == sorted({*range(4, last, 4), last})


@pytest.mark.parametrize("name", BOTH)
def test_no_token_is_on_the_charts(runs, name):
    files = list(runs[name][0].rglob("*events*"))
    assert files
    assert not any(b"hf_secretofmine" in path.read_bytes() for path in files)


@pytest.mark.flax
def test_without_the_package_nothing_is_drawn(model_folder, text_files, tmp_path, monkeypatch):
    script = importlib.import_module("run_mlm_flax")
    monkeypatch.setattr(script, "EventFileWriter", None)
    metrics = script.main(run_flags(script.__name__, model_folder, text_files, tmp_path / "output"))
    assert math.isfinite(metrics["eval_loss"])
    assert not list(tmp_path.rglob("*events*"))


def card_flags(model_folder, text_files, output, **changes):
    """Return the command line of a run of three steps."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "do_eval": True}
    settings |= {"max_steps": 3, "max_seq_length": 16, "line_by_line": "true", "lr_scheduler_type": "linear"}
    return flags(**settings | text_files | changes)


@pytest.mark.parametrize("name", BOTH)
def test_the_metadata_is_what_the_hub_reads(runs, name):
    data = ModelCard.load(runs[name][0] / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "fill-mask"
    assert data.base_model is None  # A folder of this machine.
    assert "masked-language-modeling" in data.tags


@pytest.mark.parametrize("name", BOTH)
def test_the_results_are_true(runs, name):
    text = (runs[name][0] / "README.md").read_text(encoding="utf-8")
    results = read_json(runs[name][0], "eval_results.json")
    for shown, key in (("Loss", "eval_loss"), ("Accuracy", "eval_accuracy"), ("Perplexity", "perplexity")):
        (line,) = [line for line in text.lower().splitlines() if line.startswith(f"- {shown.lower()}: ")]
        assert float(line.split(": ")[1]) == pytest.approx(results[key], rel=1e-3)
    assert "# tiny-mlm" in text


@pytest.mark.parametrize("name", BOTH)
def test_perplexity_has_one_name(runs, name):
    folder, _ = runs[name]
    evaluated = [entry for entry in history(folder) if "eval_loss" in entry]
    results = [read_json(folder, f"{part}_results.json") for part in ("eval", "all")]
    for entry in (*evaluated, *results):
        assert entry["perplexity"] == math.exp(entry["eval_loss"]) and "eval_perplexity" not in entry


@pytest.mark.parametrize("name", BOTH)
def test_nothing_of_this_machine_is_in_a_card(runs, name):
    text = (runs[name][0] / "README.md").read_text(encoding="utf-8")
    assert "hf_secretofmine" not in text
    assert str(runs[name][0].parent.parent) not in text


@pytest.mark.parametrize("source", ["config_name", "model_type"])
def test_a_new_model_is_not_called_fine_tuned(script, model_folder, text_files, tmp_path, source):
    settings = {"config_name": model_folder} if source == "config_name" else {"model_type": "bert"}
    if source == "model_type":
        sizes = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64"
        settings["config_overrides"] = f"{sizes},max_position_embeddings=64"
    settings |= {"tokenizer_name": model_folder, "output_dir": tmp_path / "o"}
    settings |= {"do_train": True, "max_steps": 1, "max_seq_length": 16, **text_files}
    script.main(flags(**settings))
    assert "fine-tuned" not in (tmp_path / "o" / "README.md").read_text(encoding="utf-8")


def test_a_card_and_the_arguments_make_the_run_again(script, model_folder, text_files, tmp_path):
    line = card_flags(
        model_folder, text_files, tmp_path / "one", eval_strategy="steps", eval_steps=2, mlm_probability=0.3
    )
    script.main([*line, "--token", "hf_secretofmine"])
    arguments = (tmp_path / "one" / "arguments.json").read_text()
    assert "hf_secretofmine" not in arguments
    script.main([str(tmp_path / "one" / "arguments.json"), *flags(output_dir=tmp_path / "two")])
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    (entry,) = [entry for entry in history(tmp_path / "one") if entry["step"] == 2 and "eval_loss" in entry]
    assert f"| 2 | {entry['eval_loss']:.6g} | {entry['eval_accuracy']:.6g} | {entry['perplexity']:.6g} |" in card
    assert (
        "It started from model." in card and "| mlm_probability | 0.3 |" in card and "| max_seq_length | 16 |" in card
    )
    assert "- train: train.txt, " in card and "--train_file train.txt" in card and str(tmp_path) not in card


def test_a_finished_run_keeps_its_card(script, model_folder, text_files, tmp_path):
    written = [tmp_path / "output" / name for name in ("README.md", "arguments.json")]
    script.main(card_flags(model_folder, text_files, tmp_path / "output"))
    before = [path.read_bytes() for path in written]
    script.main(card_flags(model_folder, text_files, tmp_path / "output", learning_rate=0.5, mlm_probability=0.4))
    assert [path.read_bytes() for path in written] == before
    written[0].unlink()  # As if the run had been killed before it wrote the card.
    script.main(card_flags(model_folder, text_files, tmp_path / "output"))
    assert "## Settings" in written[0].read_text(encoding="utf-8")


def test_an_evaluation_writes_no_card(script, model_folder, text_files, tmp_path):
    script.main(card_flags(model_folder, text_files, tmp_path / "output", do_train="false"))
    assert not (tmp_path / "output" / "README.md").exists()
