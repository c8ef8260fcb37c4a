"""Flags that Transformers 5 has dropped work where the installed version has them, or this script declares them."""

import pytest
from conftest import flags, make_model, read_json, sentences, write_lines

import run_mlm

STEPS = 8
TRANSFORMERS_4 = run_mlm.transformers.__version__.startswith("4.")


@pytest.fixture
def run(tmp_path, capfd):
    """Return a function that trains a few steps in the folder `output` and returns (learning rates, error output)."""
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    settings = {"model_name_or_path": folder, "train_file": write_lines(tmp_path / "train.txt", sentences(40))}
    settings |= {"output_dir": tmp_path / "output", "do_train": True, "max_steps": STEPS, "max_seq_length": 16}
    settings |= {"logging_steps": 1, "lr_scheduler_type": "constant_with_warmup", "learning_rate": 1.0}

    def train(**changes):
        try:
            run_mlm.main(train.arguments(**changes))
        except SystemExit as stopped:
            assert stopped.code == 2
            return [], capfd.readouterr().err
        history = read_json(tmp_path, "output", "trainer_state.json")["log_history"]
        return [entry["learning_rate"] for entry in history if "learning_rate" in entry], ""

    train.arguments = lambda **changes: flags(**settings | changes)
    return train


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [({"warmup_ratio": 0.5}, 4), ({"warmup_ratio": 0.5, "warmup_steps": 2}, 2), ({"warmup_steps": 4}, 4)],
    ids=str,
)
def test_warmup(run, settings, warmup):
    rates, error = run(report_to="none", **settings)
    if "warmup_ratio" in settings and not TRANSFORMERS_4:
        assert "unknown argument --warmup_ratio" in error
    else:
        assert rates == pytest.approx([step / warmup if step < warmup else 1 for step in range(STEPS)])


def test_events_go_where_they_are_told(run, tmp_path):
    _, error = run(logging_dir=tmp_path / "events", learning_rate=1e-3, report_to="tensorboard")
    if TRANSFORMERS_4:
        assert [path.parent for path in tmp_path.rglob("events.out.*")] == [tmp_path / "events"]
    else:
        assert "unknown argument --logging_dir" in error


@pytest.mark.parametrize("task", ["do_train", "do_eval"])
def test_events_are_below_the_output_otherwise(run, tmp_path, monkeypatch, task):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    settings = {"do_train": "false", "validation_file": tmp_path / "train.txt"} if task == "do_eval" else {}
    settings |= {task: True, "learning_rate": 1e-3, "report_to": "tensorboard"}
    run_mlm.main(run.arguments(**settings))
    assert list((tmp_path / "work").iterdir()) == []
    (events,) = (tmp_path / "output" / "runs").rglob("events.out.*")
    assert events.stat().st_size > 100


def test_overwriting_the_output(run, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "notes.txt").write_text("mine")
    assert "--overwrite_output_dir" in run(report_to="none")[1]
    rates, _ = run(report_to="none", overwrite_output_dir=True)
    assert len(rates) == STEPS
