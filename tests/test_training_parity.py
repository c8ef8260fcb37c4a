"""One configuration file, two backends, the same numbers: losses, gradient norms and learning rates of every step."""

import json

import pytest
from conftest import flags, make_model, read_json, sentences, write_lines

import run_mlm
import run_mlm_flax

STEPS = 50


@pytest.fixture
def train(tmp_path):
    """Return a function that trains with a script on one configuration file; the rest overrides it."""
    settings = {
        "model_name_or_path": make_model(tmp_path / "model"),
        "train_file": write_lines(tmp_path / "train.txt", sentences(120)),
        "do_train": True,
        "line_by_line": False,
        "max_seq_length": 16,
        "train_batch_size": 8,
        "max_steps": STEPS,
        "logging_steps": 1,
        "dataloader_drop_last": True,
        "dropout_rate": 0.0,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))

    def run(script, name, **changes):
        output = tmp_path / name
        script.main([str(config), *flags(output_dir=output, **changes)])
        history = read_json(output, "trainer_state.json")["log_history"]
        history = [entry for entry in history if "loss" in entry]
        steps = changes.get("max_steps", STEPS)
        assert [entry["step"] for entry in history] == list(range(1, steps + 1))
        return {name: [entry[name] for entry in history] for name in ("loss", "grad_norm", "learning_rate", "epoch")}

    return run


def test_both_backends_give_the_same_numbers_at_every_step(train):
    pytorch, flax = train(run_mlm, "pytorch"), train(run_mlm_flax, "flax")
    assert flax["loss"][0] == pytest.approx(pytorch["loss"][0], rel=1e-5)
    assert flax["loss"] == pytest.approx(pytorch["loss"], rel=1e-3)
    assert flax["grad_norm"][0] == pytest.approx(pytorch["grad_norm"][0], rel=1e-4)
    assert flax["grad_norm"] == pytest.approx(pytorch["grad_norm"], rel=1e-2)
    assert flax["learning_rate"] == pytest.approx(pytorch["learning_rate"], rel=1e-5)
    assert flax["learning_rate"][:6] == pytest.approx([0, 4e-4, 8e-4, 1.2e-3, 1.6e-3, 2e-3])
    assert flax["epoch"] == pytest.approx(pytorch["epoch"])
    assert flax["loss"][-1] < flax["loss"][0] - 0.5


def test_losses_do_not_depend_on_how_a_step_is_split(script, train):
    # Micro-batches hold unequal numbers of masked tokens: a mean over their means would be another number. An epoch
    # ends in a batch that is not full.
    settings = {"dataloader_drop_last": "false", "max_steps": 20}
    whole = train(script, "8x1", **settings)
    splits = ((4, 2), (2, 4)) if script is run_mlm else ((2, 4),)  # In Flax, each one is a compilation.
    for batch_size, accumulation in splits:
        split = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        other = train(script, f"{batch_size}x{accumulation}", **settings, **split)
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
