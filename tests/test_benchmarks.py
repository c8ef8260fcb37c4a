"""The GPU benchmark runs from end to end where there is no GPU."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.long
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "bench_gpu.py"), "--device", "cpu", "--tiny"]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run([*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "gpu.md").read_text()
    assert "failed" not in report, report
    assert report.count("| run_mlm") == 4 and report.count("| stock Trainer") == 2
    assert report.count("equal, bit for bit") == 2
