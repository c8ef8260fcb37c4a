"""A full disk ends a run with an error that says so, and earlier checkpoints stay whole."""

import subprocess

import pytest
from conftest import read_json
from test_resume import training_flags, weights


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of its own with room for some checkpoints of the tiny model, not for all."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(script, model_folder, text_files, tmp_path, small_disk, capsys):
    output = small_disk / "output"
    settings = {"save_steps": 1, "max_steps": 20}
    with pytest.raises(SystemExit, match="2"):
        script.main(training_flags(model_folder, text_files, output, **settings))
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no space left" in error
    assert str(output) in error
    left = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(left) >= 2
    assert not (output / ".unfinished").exists()
    for checkpoint in left:
        assert script.checkpoint_damage(checkpoint) is None
        assert read_json(checkpoint, "trainer_state.json")["global_step"] == int(checkpoint.name[11:])
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    script.main(training_flags(model_folder, text_files, output, **settings))
    script.main(training_flags(model_folder, text_files, tmp_path / "whole", **settings))
    assert weights(output) == weights(tmp_path / "whole")
