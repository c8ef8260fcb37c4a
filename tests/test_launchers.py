"""The scripts as modules, as programs, without PyTorch, and copied alone to another place."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, flags, make_model, read_json, sentences, write_lines

# What TPU launchers such as `xla_spawn` do with the path and the arguments they are given.
LAUNCHER = """
import importlib, sys
from pathlib import Path

script = Path(sys.argv[1])
sys.path.append(str(script.parent.resolve()))
module = importlib.import_module(script.stem)
sys.argv = [sys.argv[1], *sys.argv[2:]]
module._mp_fn(0)
"""
# Runs a file as a program and then looks at what it imported.
AS_A_PROGRAM = """
import runpy, sys

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not {"torch", "jax"} <= set(sys.modules)
"""
HIDE_TORCH = """
import importlib.machinery, importlib.util

find_spec = importlib.machinery.PathFinder.find_spec


def find_all_but_torch(name, path=None, target=None):
    return None if name.split(".")[0] == "torch" else find_spec(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(find_all_but_torch)
assert importlib.util.find_spec("torch") is None
"""
# The libraries have effects of their own: they come first.
IMPORT_ONLY = """
import importlib, logging, os, sys
import accelerate, datasets, flax, jax, optax, tensorboard, torch, transformers
from flax.training import train_state
from jax._src import xla_bridge
from transformers import AutoModelForMaskedLM, FlaxAutoModelForMaskedLM, Trainer


def state():
    root = logging.getLogger()
    return dict(os.environ), os.getcwd(), os.listdir(), root.level, list(root.handlers), list(sys.argv)


before = state()
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    assert callable(importlib.import_module(name).main)
assert state() == before
assert not xla_bridge._backends, "a device was started"
"""


def run_python(code, *arguments, cwd):
    """Run code in a new interpreter that finds modules nowhere but where they are installed, and return the process."""
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HOME": str(cwd.parent / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def job(tmp_path):
    """A function that puts a script alone into an empty folder, and returns (folder, arguments of a short run)."""

    def prepare(name):
        work = tmp_path / "work"
        work.mkdir()
        model = make_model(tmp_path / "model", num_hidden_layers=1)
        lines = write_lines(tmp_path / "train.txt", sentences(60))
        shutil.copy(ROOT / f"{name}.py", work)
        arguments = flags(model_name_or_path=model, train_file=lines, output_dir="output", do_train=True)
        arguments += flags(do_eval=True, max_steps=2, max_seq_length=16, line_by_line="false", dropout_rate=0)
        arguments += flags(learning_rate=1e-3, lr_scheduler_type="linear")
        return work, [f"{name}.py", *arguments]

    return prepare


def assert_trained_and_evaluated(done, work, name):
    """Check that the job of a process was done, with nothing else in its folder."""
    assert done.returncode == 0, done.stderr
    results = read_json(work / "output", "all_results.json")
    assert results["train_loss"] > 0 < results["eval_loss"]
    assert read_json(work / "output", "trainer_state.json")["global_step"] == 2
    assert (work / "output" / "model.safetensors").exists()
    assert {path.name for path in work.iterdir()} - {"__pycache__"} == {name, "output"}


def test_a_launcher_imports_the_copied_script_and_calls_its_entry_point(job):
    work, arguments = job("run_mlm")
    assert_trained_and_evaluated(run_python(LAUNCHER, *arguments, cwd=work), work, arguments[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_copied_alone_trains_there_with_one_framework(job, name):
    assert importlib.util.find_spec("torch") and importlib.util.find_spec("jax")
    work, arguments = job(name)
    assert_trained_and_evaluated(run_python(AS_A_PROGRAM, *arguments, cwd=work), work, arguments[0])


def test_the_copied_flax_program_runs_where_there_is_no_torch(job):
    work, arguments = job("run_mlm_flax")
    assert_trained_and_evaluated(run_python(HIDE_TORCH + AS_A_PROGRAM, *arguments, cwd=work), work, arguments[0])


def test_importing_has_no_side_effect(tmp_path):
    done = run_python(IMPORT_ONLY, ROOT, *SCRIPTS, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
