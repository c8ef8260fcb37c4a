"""A few cases of the fuzzer of whole runs; `python tests/fuzz_runs.py` tries more."""

import subprocess
import sys

import pytest
from conftest import BOTH, ROOT


def fuzz(*arguments):
    """Run the fuzzer and return what it prints; it must end with status 0."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz_runs.py"), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.parametrize("name", BOTH)
def test_runs_that_must_agree(name):
    kinds, case = (("stop", "kill"), "12") if name == "run_mlm" else (("kill",), "9")
    printed = fuzz("--script", name, "--case", case, *(word for kind in kinds for word in ("--kind", kind)))
    for kind in kinds:
        assert f"{kind} {name}: 1 cases, 0 disagreements" in printed
