"""The scripts under their launchers, as modules and programs, and copied alone to another place."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import safetensors.torch
from conftest import BOTH, ROOT, SCRIPTS, flags, free_port, make_model, read_json, sentences, write_lines

import run_mlm

STEPS = 6
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
ACCELERATE += [str(ROOT / "configs" / "accelerate_2_processes.yaml")]
# Notes which process tokenizes and which writes.
NOTING = """
import os, run_mlm


def note(name):
    owner, attribute = name
    function = getattr(owner, attribute)

    def noted(*args, **kwargs):
        with open(f"{attribute}-{os.environ['RANK']}", "a") as file:
            file.write("called\\n")
        return function(*args, **kwargs)

    setattr(owner, attribute, noted)


note((run_mlm, "encode_texts"))
note((run_mlm.transformers.TrainerState, "save_to_json"))
run_mlm.main()
"""
# Process 0 prepares text until process 1 has waited for it in Python: the limit of an operation is `--ddp_timeout`.
AWAITED = """
import os, sys, time, run_mlm

load, sleep = run_mlm.load_raw_datasets, time.sleep


def noted_sleep(seconds):
    if sys._getframe(1).f_code.co_name == "main_process_first":
        open("waits", "w").close()
    sleep(seconds)


def load_late(*args):
    deadline = time.monotonic() + 60
    while os.environ["RANK"] == "0" and not os.path.exists("waits"):
        assert time.monotonic() < deadline, "the other process does not wait in Python"
        sleep(0.1)
    return load(*args)


run_mlm.load_raw_datasets, time.sleep = load_late, noted_sleep
"""
# Breaks one process, in a place that the other one does not pass.
BREAKING = """
import os, run_mlm

place, rank, method = {"training": (run_mlm.MaskedLMTrainer, "1", "compute_loss"),
                       "tokenizing": (run_mlm, "0", "encode_texts")}[os.environ["BREAK"]]


def broken(*args, **kwargs):
    raise run_mlm.UserError(f"broken while {os.environ['BREAK']}")


if os.environ["RANK"] == rank:
    setattr(place, method, broken)
run_mlm.main()
"""
# Sends one rank a signal at the start of a step, or after the last one.
SIGNALLED = """
import os, signal, run_mlm

place, step = os.environ["SIGNAL"].split()
method = {"step": "training_step", "end": "save_model"}[place]
function, calls = getattr(run_mlm.MaskedLMTrainer, method), []


def signalled(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == int(step):
        os.kill(os.getpid(), signal.SIGTERM)
    return function(*args, **kwargs)


setattr(run_mlm.MaskedLMTrainer, method, signalled)
try:
    run_mlm.main()
except SystemExit as stop:
    with open(f"status-{os.environ['RANK']}", "w") as file:
        file.write(str(stop.code))
    raise
"""
# Counts the operations of several processes in the steps 3 to 5, of which none reports.
COUNTING = """
import collections, json, os, torch, run_mlm

profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
end = run_mlm.RunCallback.on_step_end


def counted(self, args, state, control, **kwargs):
    end(self, args, state, control, **kwargs)
    if state.global_step == 2:
        profile.start()
    if state.global_step == 5:
        profile.stop()
        names = [event.name for event in profile.events() if event.name.startswith("c10d::")]
        with open(f"counts-{os.environ['RANK']}", "w") as file:
            json.dump(collections.Counter(names), file)


run_mlm.RunCallback.on_step_end = counted
run_mlm.main()
"""
# What `xla_spawn` does with its arguments, and a `torch_xla` whose devices are processes on the CPU.
XLA_SPAWN = """
import argparse, importlib, sys
from pathlib import Path

import torch_xla.distributed.xla_multiprocessing as xmp


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--num_cores", type=int)
    parser.add_argument("training_script")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    script = Path(args.training_script)
    sys.path.append(str(script.parent.resolve()))
    module = importlib.import_module(script.stem)
    sys.argv = [args.training_script, *args.training_script_args, "--tpu_num_cores", str(args.num_cores)]
    xmp.spawn(module._mp_fn, args=(), nprocs=args.num_cores)


if __name__ == "__main__":
    main()
"""
XLA_MULTIPROCESSING = "from torch.multiprocessing import spawn\n"


@pytest.fixture
def work(tmp_path):
    """A folder with a tiny model and text."""
    make_model(tmp_path / "model", num_hidden_layers=2)
    write_lines(tmp_path / "train.txt", sentences(37))  # The fifth step of an epoch has five samples.
    write_lines(tmp_path / "validation.txt", sentences(13, seed=1))
    return tmp_path


def arguments(output, batch, **changes):
    """Return the command line of a run of 8 samples a step without dropout."""
    settings = {"model_name_or_path": "model", "train_file": "train.txt", "validation_file": "validation.txt"}
    settings |= {"output_dir": output, "cache_dir": "cache", "do_train": True, "do_eval": True, "max_seq_length": 16}
    settings |= {"line_by_line": "true", "train_batch_size": batch, "max_steps": STEPS, "dropout_rate": 0}
    settings |= {"learning_rate": 1e-3, "logging_steps": 1, "save_steps": 3, "report_to": "none"}
    return flags(**settings | changes)


def launch(work, command, **environment):
    """Run a launcher's command in the folder and return the completed process."""
    environment = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(work / "cache"), **environment}
    environment = {**os.environ, **environment}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=240)


def losses(output):
    """Return the losses of the steps and of the evaluation."""
    history = read_json(output, "trainer_state.json")["log_history"]
    found = [entry["loss"] for entry in history if "loss" in entry]
    assert len(found) == STEPS
    return [*found, read_json(output, "eval_results.json")["eval_loss"]]


@pytest.fixture
def alone(work, monkeypatch):
    """The losses of one process."""
    monkeypatch.chdir(work)
    run_mlm.main(arguments("alone", 8))
    return pytest.approx(losses(work / "alone"), rel=1e-5)


def calls(work):
    """Return how often each process has encoded."""
    return {path.name: len(path.read_text().splitlines()) for path in work.glob("encode_texts-*")}


def test_one_process_prepares_logs_and_writes_and_both_resume(work, alone):
    (work / "noting.py").write_text(NOTING)
    command = [*TORCHRUN, "--log_dir", "logs", "--redirects", "3", "noting.py", *arguments("output", 4)]
    done = launch(work, [*command, "--overwrite_cache"])  # The cache is that of `alone`.
    logs = {path.parent.name + path.stem: path.read_text() for path in (work / "logs").glob("*/*/*/*.log")}
    assert done.returncode == 0, logs
    assert losses(work / "output") == alone
    assert "(batch 4, accumulation 1, devices 2)" in logs["0stdout"]
    assert "step 6 of 6 (100%" in logs["0stdout"]
    assert logs["1stdout"] == "" and "%|" not in logs["1stderr"]
    noted = {path.name for path in work.glob("*-[01]")}
    assert noted == {"encode_texts-0", "save_to_json-0"}

    weights = safetensors.torch.load_file(work / "output" / "model.safetensors")
    shutil.rmtree(work / "output" / "checkpoint-6")
    before = calls(work)
    assert before == {"encode_texts-0": 2}  # The two splits, which process 1 finds in the cache.
    done = launch(work, [*TORCHRUN, "noting.py", *arguments("output", 4)])
    assert done.returncode == 0, done.stderr
    assert "Resuming from output/checkpoint-3" in done.stdout
    # The data was in the cache.
    assert calls(work) == before
    assert losses(work / "output") == alone
    resumed = safetensors.torch.load_file(work / "output" / "model.safetensors")
    assert all(resumed[name].equal(weight) for name, weight in weights.items())


def test_a_resume_on_another_number_of_processes(work, alone):
    done = launch(work, [*TORCHRUN, str(ROOT / "run_mlm.py"), *arguments("output", 4)])
    assert done.returncode == 0, done.stderr
    shutil.rmtree(work / "output" / "checkpoint-6")
    run_mlm.main(arguments("output", 8))  # In this process alone, the same samples a step.
    assert losses(work / "output") == alone


@pytest.mark.long
def test_batches_that_one_process_hands_out(work, alone):
    line = arguments("output", 4, accelerator_config='{"dispatch_batches": true}', pad_to_max_length=True)
    done = launch(work, [*TORCHRUN, str(ROOT / "run_mlm.py"), *line])
    assert done.returncode == 0, done.stderr
    assert losses(work / "output") == alone


def test_a_step_of_two_processes_exchanges_gradients_counts_and_signals(work):
    (work / "counting.py").write_text(COUNTING)
    done = launch(work, [*TORCHRUN, "counting.py", *arguments("output", 4, logging_steps=100, save_strategy="no")])
    assert done.returncode == 0, done.stderr
    # Per step: the number of masked tokens; the gradients, which parameters have one, and loss with signals. What
    # PyTorch does with the buffers before a forward pass is its own.
    expected = {"c10d::allgather_": 3 * 1, "c10d::allreduce_": 3 * 3, "c10d::broadcast_": 3 * 1}
    assert [read_json(work, f"counts-{rank}") for rank in (0, 1)] == [expected] * 2


@pytest.mark.long
def test_accelerate_launch(work, alone):
    done = launch(work, [*ACCELERATE, str(ROOT / "run_mlm.py"), *arguments("output", 4)])
    assert done.returncode == 0, done.stderr
    assert "(batch 4, accumulation 1, devices 2)" in done.stdout
    assert losses(work / "output") == alone


@pytest.mark.long
def test_xla_spawn(work, alone):
    (work / "torch_xla" / "distributed").mkdir(parents=True)
    (work / "torch_xla" / "distributed" / "xla_multiprocessing.py").write_text(XLA_MULTIPROCESSING)
    (work / "xla_spawn.py").write_text(XLA_SPAWN)
    command = [sys.executable, "xla_spawn.py", "--num_cores", "1", str(ROOT / "run_mlm.py"), *arguments("output", 8)]
    done = launch(work, command, USE_TORCH_XLA="0")
    assert done.returncode == 0, done.stderr
    assert losses(work / "output") == alone


@pytest.mark.parametrize("place", ["training", pytest.param("tokenizing", marks=pytest.mark.long)])
def test_an_error_of_one_process_is_a_line_in_each(work, place):
    (work / "breaking.py").write_text(BREAKING)
    command = [*TORCHRUN, "--log_dir", "logs", "--redirects", "3", "breaking.py", *arguments("output", 4)]
    done = launch(work, command, BREAK=place)
    assert done.returncode != 0
    errors = [path.read_text() for path in sorted((work / "logs").glob("*/*/*/stderr.log"))]
    broken = {"training": 1, "tokenizing": 0}[place]
    assert error_lines(errors[broken]) == [f"error: broken while {place}"]
    # The launcher ends the other one, if its lost connection does not.
    assert error_lines(errors[1 - broken]) in ([], ["error: another process of this run has ended; see its error"])
    assert not (work / "output" / "all_results.json").exists()


def error_lines(errors):
    """Return the error lines of a process, which has no traceback."""
    assert "Traceback" not in errors, errors
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def launch_nodes(work, script, *lines, **environment):
    """Run a launcher with one process for each command line, as on machines of their own; return [(status, stdout)]."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(work / "cache"), **environment}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(lines)), "--nproc_per_node", "1"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    processes = []
    for rank, line in enumerate(lines):
        with open(work / f"errors-{rank}", "w") as errors:
            command = [*launcher, "--node_rank", str(rank), script, *line]
            options = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
            processes.append(subprocess.Popen(command, cwd=work, env=environment, **options))
    try:
        return [(process.returncode, out) for process in processes for out, _ in [process.communicate(timeout=240)]]
    finally:
        for process in processes:
            process.kill()


def test_on_two_machines_one_process_prepares_and_logs(work, alone):
    shutil.rmtree(work / "cache")
    (work / "noting.py").write_text(AWAITED + NOTING)
    line = arguments("output", 4, disable_tqdm="true")
    (status, log), (other_status, other_log) = launch_nodes(work, "noting.py", line, line)
    assert (status, other_status) == (0, 0), (work / "errors-0").read_text() + (work / "errors-1").read_text()
    assert losses(work / "output") == alone
    assert log.count("Starting a new run") == 1 and ": loss " in log
    assert other_log == ""
    assert calls(work) == {"encode_texts-0": 2}  # The two splits, which process 1 finds in the cache.


@pytest.mark.long
def test_machines_that_share_no_cache_tokenize_and_may_log_each(work, alone):
    (work / "noting.py").write_text(AWAITED + NOTING)
    lines = [arguments("output", 4, cache_dir=f"cache-{rank}", log_on_each_node=True) for rank in (0, 1)]
    (status, log), (other_status, other_log) = launch_nodes(work, "noting.py", *lines)
    assert (status, other_status) == (0, 0), (work / "errors-0").read_text() + (work / "errors-1").read_text()
    assert losses(work / "output") == alone
    assert calls(work) == {"encode_texts-0": 2, "encode_texts-1": 2}
    assert "Starting a new run" in log and "Starting a new run" in other_log


@pytest.mark.long
def test_an_error_on_one_machine_is_a_line_on_each(work):
    (work / "breaking.py").write_text(BREAKING)
    line = arguments("output", 4)
    (status, _), (other_status, _) = launch_nodes(work, "breaking.py", line, line, BREAK="training")
    assert status != 0 and other_status != 0
    for rank, cause in enumerate(["another process of this run has ended; see its error", "broken while training"]):
        errors = (
            (work / f"errors-{rank}").read_text().split("\nTraceback")[0]
        )  # The launcher has a traceback of its own.
        assert [text for text in errors.splitlines() if text.startswith("error: ")] == [f"error: {cause}"]


@pytest.mark.long
def test_a_mistake_of_the_user_ends_all(work):
    done = launch(work, [*TORCHRUN, str(ROOT / "run_mlm.py"), *arguments("output", 4, text_column_name="body")])
    assert done.returncode != 0
    assert "--text_column_name body is not one of the columns text" in done.stderr


@pytest.mark.parametrize(
    ("when", "checkpoints"),
    [
        ("step 2", [2]),
        pytest.param(f"step {STEPS}", [STEPS], marks=pytest.mark.long),
        pytest.param("end 1", [], marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(work, when, checkpoints):
    (work / "signalled.py").write_text(SIGNALLED)
    done = launch(work, [*TORCHRUN, "signalled.py", *arguments("output", 4, save_strategy="no")], SIGNAL=when)
    assert done.returncode != 0
    assert [(work / f"status-{rank}").read_text() for rank in (0, 1)] == ["143", "143"], done.stderr
    assert [path.name for path in (work / "output").glob("checkpoint-*")] == [f"checkpoint-{n}" for n in checkpoints]
    if not checkpoints:
        assert (work / "output" / "model.safetensors").exists()


# Notes with which status each rank ends.
STATUS = """
import os, run_mlm

try:
    run_mlm.main()
except SystemExit as stop:
    with open(f"status-{os.environ['RANK']}", "w") as file:
        file.write(str(stop.code))
    raise
"""


@pytest.mark.parametrize("to", ["group", *(pytest.param(to, marks=pytest.mark.long) for to in ("timeout", "all"))])
def test_a_launcher_that_is_stopped_leaves_a_checkpoint(work, monkeypatch, to):
    """SIGTERM to the launcher's group, to `timeout`, and to every process with its workers, as from `scancel`."""
    (work / "status.py").write_text(STATUS)
    line = arguments("output", 4, max_steps=2000, save_strategy="no", dataloader_num_workers=2)
    command = [*(["timeout", "240"] if to == "timeout" else []), *TORCHRUN, "status.py", *line]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(work / "cache")}
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True, "env": environment, "cwd": work}
    with subprocess.Popen(command, **options) as launcher:
        next(printed for printed in launcher.stdout if "grad_norm" in printed)
        if to == "all":
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.terminate()
        if to == "group":
            os.killpg(launcher.pid, signal.SIGTERM)
        else:
            launcher.terminate()
        rest, _ = launcher.communicate(timeout=240)
    assert [(work / f"status-{rank}").read_text() for rank in (0, 1)] == ["143", "143"], rest
    (checkpoint,) = (work / "output").glob("checkpoint-*")
    assert f"Stopped by SIGTERM; {checkpoint.name} is saved." in rest
    monkeypatch.chdir(work)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    run_mlm.main(arguments("output", 8, max_steps=step + 1, save_strategy="no"))
    history = read_json(work / "output", "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, step + 2))


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
assert ("jax" in sys.modules) == (sys.argv[0] == "run_mlm_flax.py")  # Transformers imports PyTorch itself.
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
from transformers import AutoModelForMaskedLM, Trainer


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


@pytest.mark.parametrize("name", BOTH)
def test_a_script_copied_alone_trains_there_with_one_framework(job, name):
    work, arguments = job(name)
    assert_trained_and_evaluated(run_python(AS_A_PROGRAM, *arguments, cwd=work), work, arguments[0])


@pytest.mark.flax
def test_the_copied_flax_program_runs_where_there_is_no_torch(job):
    work, arguments = job("run_mlm_flax")
    assert_trained_and_evaluated(run_python(HIDE_TORCH + AS_A_PROGRAM, *arguments, cwd=work), work, arguments[0])


@pytest.mark.flax
def test_importing_has_no_side_effect(tmp_path):
    done = run_python(IMPORT_ONLY, ROOT, *SCRIPTS, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
