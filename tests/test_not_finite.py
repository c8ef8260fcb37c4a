"""A loss or a weight that is not finite ends the training at its step; what was saved before stays."""

import pytest
from conftest import flags


def diverging(model_folder, text_files, output, **changes):
    """Return the command line of a run whose learning rate is so high that its second loss is not a number."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "max_steps": 6}
    settings |= {"max_seq_length": 16, "line_by_line": "true", "train_batch_size": 4, "dropout_rate": 0}
    settings |= {"learning_rate": 1e30, "lr_scheduler_type": "constant", "save_steps": 1, **text_files}
    return flags(**settings | changes)


@pytest.fixture
def seen(script, monkeypatch):
    """The indices of the training samples in the order in which they are masked."""
    indices, mask_samples = [], script.MaskingCollator.mask_samples

    def record(collator, samples, *args):
        indices.extend(sample["index"] for sample in samples)
        return mask_samples(collator, samples, *args)

    monkeypatch.setattr(script.MaskingCollator, "mask_samples", record)
    return indices


def error_of(script, arguments, capfd):
    """Run `main`, check that it ends with status 2, and return the error line."""
    with pytest.raises(SystemExit) as exit_:
        script.main(arguments)
    assert exit_.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("changes", [{"save_steps": 1}, {"save_steps": 4, "gradient_accumulation_steps": 2}], ids=str)
def test_a_loss_that_is_not_finite(script, model_folder, text_files, tmp_path, capfd, seen, changes):
    output = tmp_path / "output"
    line = error_of(script, diverging(model_folder, text_files, output, **changes), capfd)
    assert "the loss is nan at step 2 " in line
    assert "learning rate 1e+30" in line
    size = 4 * changes.get("gradient_accumulation_steps", 1)
    steps = seen[2:]  # The first two try the sparse head.
    assert f"samples {', '.join(map(str, steps[size : 2 * size]))})" in line
    saved = ["checkpoint-1"] if changes.get("save_steps") != 4 else []
    assert [path.name for path in output.glob("*") if path.name not in ("logs", "runs")] == saved
    assert all(script.checkpoint_damage(output / name) is None for name in saved)


def test_a_weight_that_is_not_finite(script, model_folder, text_files, tmp_path, capfd):
    output = tmp_path / "output"
    arguments = diverging(model_folder, text_files, output, learning_rate=1e38, weight_decay=1e4)
    assert "a weight is not finite at step 1 " in error_of(script, arguments, capfd)
    assert list(output.glob("checkpoint-*")) == []
    assert not (output / "model.safetensors").exists()
