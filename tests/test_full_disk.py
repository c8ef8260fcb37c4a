"""A full disk ends a run with an error that says so, and earlier checkpoints stay whole."""

import subprocess

import pytest
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
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # Whoever still has a file open there.


def test_full_disk(script, model_folder, text_files, tmp_path, small_disk, capsys):
    output = small_disk / "output"
    settings = {"save_steps": 1, "max_steps": 20}
    with pytest.raises(SystemExit, match="2"):
        script.main(training_flags(model_folder, text_files, output, **settings))
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"--output_dir {output}" in error and "is the disk full?" in error
    steps = [step for step, _ in script.list_checkpoints(str(output))]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    script.main(training_flags(model_folder, text_files, output, **settings))
    script.main(training_flags(model_folder, text_files, tmp_path / "whole", **settings))
    assert weights(output) == weights(tmp_path / "whole")
