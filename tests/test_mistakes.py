"""Each flag at its edges is a run, or one error line that names it; a bug of a script is always a traceback."""

import errno
import subprocess
import sys

import pytest
from conftest import BOTH, ROOT

# Flags whose values were found wrong in the middle of a run, or with a traceback, or by nobody.
FLAGS = {
    "run_mlm": "data_seed dataloader_persistent_workers debug eval_accumulation_steps eval_on_start fsdp optim_args "
    "lr_scheduler_kwargs neftune_noise_alpha",
    "run_mlm_flax": "lr_scheduler_kwargs",
}
# Functions that libraries call, or that run where errors of libraries are reported in a line.
CALLED = {
    "run_mlm": "TrainingArguments.__post_init__ read_texts encode_batch encode_texts read_rows "
    "fill_new_rows SparseHead.select MaskedLMCollator.__call__",
    "run_mlm_flax": "TrainingArguments.__post_init__ create_schedule encode_batch MaskedLMTrainer.save_checkpoint",
}


def check(kind, script, *more):
    """Run `mistakes.py`, which must find nothing."""
    command = [sys.executable, str(ROOT / "tests" / "mistakes.py"), kind, "--script", script, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def only(names):
    """Return the options that choose some flags or functions."""
    return [word for name in names.split() for word in ("--only", name)]


@pytest.mark.parametrize("name", BOTH)
def test_each_flag_at_its_edges_is_parsed_or_named(name):
    check("flags", name, "--task", "parse")


@pytest.mark.parametrize("name", BOTH)
def test_a_flag_that_a_step_would_trip_over_is_found_before(name):
    check("flags", name, "--task", "train and evaluate", *only(FLAGS[name]))


@pytest.mark.parametrize("name", BOTH)
def test_a_bug_in_a_function_that_libraries_call_is_a_traceback(name):
    count = len(CALLED[name].split())
    assert f"{count} of {count} functions reached" in check("bugs", name, *only(CALLED[name]))


@pytest.mark.shared
def test_only_a_full_disk_is_called_full(script, tmp_path):
    """`test_full_disk` writes to one."""
    with pytest.raises(script.UserError) as caught, script.write_errors(tmp_path, "the model"):
        raise OSError(errno.EIO, "Input/output error")
    assert str(caught.value) == f"--output_dir {tmp_path}: the model cannot be written: Input/output error"


@pytest.mark.shared
def test_a_cause_is_told_if_it_says_more(script):
    def fail(error, cause):
        try:
            raise cause
        except Exception as raised:
            raise error from raised

    for error, cause, told in (
        (RuntimeError("the data cannot be read"), ValueError("line 3 is cut off"), "line 3 is cut off"),
        (RuntimeError("no mode is named nonsense"), KeyError("nonsense"), "no mode is named nonsense"),
    ):
        with pytest.raises(script.UserError, match=f"^--flag: {told}$"), script.user_errors("--flag"):
            fail(error, cause)
