"""Both scripts draw the same TensorBoard charts, with the values of trainer_state.json."""

import importlib
import math
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, flags, make_model, read_json, sentences, write_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

import run_mlm

TAGS = {f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")}
TAGS |= {f"eval/{name}" for name in ("loss", "accuracy", "perplexity")}


def run_flags(name, model_folder, text_files, output, **changes):
    """Return the command line of a run of seven steps with two evaluations before the last."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "do_eval": True}
    settings |= {"max_seq_length": 16, "line_by_line": "false", "max_steps": 7, "logging_steps": 2, **text_files}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "dropout_rate": 0, "lr_scheduler_type": "linear"}
    settings |= {"learning_rate": 1e-3, "token": "hf_chartsecret"}
    if name == "run_mlm":
        settings |= {"report_to": "tensorboard", "logging_dir": output / "logs"}
    return flags(**settings | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{script: (output folder, its events)} of the same run of both scripts."""
    folder = tmp_path_factory.mktemp("charts")
    files = {"train_file": write_lines(folder / "train.txt", sentences(110))}
    files["validation_file"] = write_lines(folder / "validation.txt", sentences(30, seed=1))
    model, made = make_model(folder / "model"), {}
    for name in SCRIPTS:
        importlib.import_module(name).main(run_flags(name, model, files, folder / name))
        made[name] = folder / name, EventAccumulator(str(folder / name / "logs")).Reload()
    return made


def points(events, tag):
    """Return the (step, value) pairs of a chart in the order of time."""
    # The Trainer opens a second file for the last evaluation; TensorBoard reads files in the order of their names.
    found = sorted(events.Scalars(tag), key=lambda point: point.wall_time)
    return [point.step for point in found], [point.value for point in found]


def texts(events, tag):
    """Return the (step, text) pairs of a text in the order of time."""
    found = sorted(events.Tensors(f"{tag}/text_summary"), key=lambda point: point.wall_time)
    return [(point.step, point.tensor_proto.string_val[0].decode()) for point in found]


def session(events):
    """Return the hyperparameters as TensorBoard's plugin reads them."""
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    read = plugin_data_pb2.HParamsPluginData.FromString(content)
    kinds = {name: value.WhichOneof("kind") for name, value in read.session_start_info.hparams.items()}
    return {name: getattr(read.session_start_info.hparams[name], kind) for name, kind in kinds.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_charts_hold_the_logged_values(runs, name):
    output, events = runs[name]
    assert set(events.Tags()["scalars"]) >= TAGS
    history = read_json(output, "trainer_state.json")["log_history"]
    for tag in sorted(TAGS):
        chart, name = tag.split("/")
        key = f"eval_{name}" if chart == "eval" else name
        expected = [(entry["step"], entry[key]) for entry in history if key in entry]
        assert [step for step, _ in expected][:3] == ([3, 6, 7] if chart == "eval" else [2, 4, 6])
        steps, values = points(events, tag)
        assert steps == [step for step, _ in expected]
        assert values == pytest.approx([value for _, value in expected], rel=1e-6)


def test_both_scripts_draw_the_same_charts(runs):
    (_, one), (_, other) = runs.values()
    assert set(one.Tags()["scalars"]) == set(other.Tags()["scalars"])
    for tag in TAGS - {"train/tokens_per_second"}:
        (steps, values), (other_steps, others) = points(one, tag), points(other, tag)
        assert steps == other_steps == ([3, 6, 7] if tag.startswith("eval") else [2, 4, 6, 7])
        assert values[0] == pytest.approx(others[0], rel=1e-4)
        assert values[-1] == pytest.approx(others[-1], rel=1e-3)


def test_tokens_per_second_are_those_of_the_steps(script, model_folder, text_files, tmp_path, monkeypatch):
    """A step takes one second, an evaluation a hundred and a checkpoint a thousand, which do not count."""
    now = [0.0]

    def passing(function, seconds):
        def timed(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return timed

    class Progress(script.tqdm):
        def __iter__(self):
            for item in super().__iter__():
                now[0] += (self.desc or "").startswith("Training")
                yield item

    monkeypatch.setattr(script.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(script, "mean_metrics", passing(script.mean_metrics, 100))
    monkeypatch.setattr(script, "publish_checkpoint", passing(script.publish_checkpoint, 1000))
    if script is run_mlm:
        trainer = script.MaskedLMTrainer
        monkeypatch.setattr(trainer, "training_step", passing(trainer.training_step, 1))
    else:
        monkeypatch.setattr(script, "tqdm", Progress)
    output = tmp_path / "output"
    script.main(run_flags(script.__name__, model_folder, text_files, output, save_steps=5))
    entries = read_json(output, "trainer_state.json")["log_history"]
    speeds = {entry["step"]: entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry}
    assert speeds == {step: pytest.approx(8 * 16) for step in (2, 4, 6, 7)}  # Full rows: 8 samples of 16 tokens.


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_guesses_of_each_evaluation_are_shown(runs, name):
    _, events = runs[name]
    shown = texts(events, "eval/guesses")
    assert [step for step, _ in shown] == [step for step, _ in zip(*points(events, "eval/loss"))]
    for _, text in shown:
        head, line, *rows = text.splitlines()
        assert (head, line) == ("| masked sentence | best guesses | the text |", "| --- | --- | --- |")
        assert len(rows) == 5
        for row in rows:
            sentence, guesses, _ = row.strip("| ").split(" | ")
            assert sentence.count("[MASK]") == 1
            assert guesses.count("%") == 3
    assert shown[0][1] != shown[-1][1]  # It has learned.


def test_both_scripts_guess_the_same(runs):
    """A model that both trained alike: the same words hidden, the same first guesses."""
    tables = [
        [[cell.split("%")[0].rsplit(" ", 1)[0] for cell in row.split(" | ")] for row in shown[0][1].splitlines()[2:]]
        for shown in (texts(events, "eval/guesses") for _, events in runs.values())
    ]
    assert tables[0] == tables[1]


def test_both_scripts_tell_their_hyperparameters(runs):
    one, other = (session(events) for _, events in runs.values())
    assert (one.pop("framework"), other.pop("framework")) == ("torch", "jax")
    assert one == other
    assert one["learning_rate"] == pytest.approx(1e-3)
    assert (one["train_batch_size"], one["max_steps"], one["lr_scheduler_type"]) == (8, 7, "linear")
    for output, events in runs.values():
        assert (f'"output_dir": "{output}"') in texts(events, "args")[0][1]
        assert '"model_type": "bert"' in texts(events, "model_config")[0][1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_token_is_on_the_charts(runs, name):
    files = list((runs[name][0] / "logs").rglob("*events*"))
    assert files
    assert not any(b"hf_chartsecret" in path.read_bytes() for path in files)


@pytest.mark.parametrize("report_to", ["none", "codecarbon"])
def test_guesses_need_no_tensorboard(model_folder, text_files, tmp_path, monkeypatch, caplog, report_to):
    if report_to != "none":  # Any reporter without a TensorBoard writer.
        monkeypatch.setattr(
            run_mlm.transformers.trainer,
            "get_reporting_integration_callbacks",
            lambda names: [run_mlm.TrainerCallback] * len(names),
        )
    arguments = run_flags("run_mlm", model_folder, text_files, tmp_path / "output", report_to=report_to)
    run_mlm.main(arguments)
    assert not list(tmp_path.rglob("*events*"))
    assert caplog.text.count("[MASK]") == 5


def test_without_the_package_nothing_is_drawn(script, model_folder, text_files, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "hparams_pb", None)
    if script is not run_mlm:
        monkeypatch.setattr(script, "EventFileWriter", None)
    metrics = script.main(run_flags(script.__name__, model_folder, text_files, tmp_path / "output"))
    assert math.isfinite(metrics["eval_loss"])
    assert bool(list(tmp_path.rglob("*events*"))) == (script is run_mlm)


def test_the_picture_is_drawn_from_the_event_files(runs, tmp_path):
    program = [sys.executable, str(ROOT / "tests" / "benchmarks" / "plot_runs.py"), str(tmp_path / "picture.png")]
    named = [f"{name}={output / 'logs'}" for name, (output, _) in runs.items()]
    pictures = []
    for part in (named[:1], named[1:], named):
        subprocess.run([*program, *part], check=True, timeout=120)
        pictures.append((tmp_path / "picture.png").read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(set(pictures)) == 3  # Each run changes what is drawn.
