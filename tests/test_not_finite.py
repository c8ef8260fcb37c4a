"""A loss or a weight that is not finite ends the training at its step; what was saved before stays."""

import pytest
from conftest import flags


def diverging(model_folder, text_files, output, **changes):
    """Return the command line of a run whose learning rate is so high that its second loss is not a number."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "max_steps": 6}
    settings |= {"max_seq_length": 16, "line_by_line": "true", "train_batch_size": 4, "dropout_rate": 0}
    settings |= {"learning_rate": 1e30, "lr_scheduler_type": "constant", "save_steps": 1, **text_files}
    return flags(**settings | changes)


def error_of(script, arguments, capfd):
    """Run `main`, check that it ends with status 2, and return the error line."""
    with pytest.raises(SystemExit) as exit_:
        script.main(arguments)
    assert exit_.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("changes", [{"save_steps": 1}, {"save_steps": 4, "gradient_accumulation_steps": 2}], ids=str)
def test_a_loss_that_is_not_finite(script, model_folder, text_files, tmp_path, capfd, changes):
    output = tmp_path / "output"
    line = error_of(script, diverging(model_folder, text_files, output, **changes), capfd)
    assert "the loss is nan after step 1" in line or "the loss is nan after step 2" in line
    assert "--learning_rate" in line
    saved = [f"checkpoint-{step}" for step in (1,) if changes["save_steps"] == 1]
    assert [path.name for path in output.glob("checkpoint-*")] == saved
    assert [step for step, _ in script.list_checkpoints(str(output))] == [1] * len(saved)
    assert not (output / "model.safetensors").exists()
