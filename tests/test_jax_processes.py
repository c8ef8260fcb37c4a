"""run_mlm_flax.py in several processes: 2 with 2 devices each train as 1 with 4 or 1 does, and end together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, flags, free_port, make_model, read_json, sentences, write_lines
from safetensors.numpy import load_file

import run_mlm_flax

STEPS = 4
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "here", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
# Counts the samples that a process collates, and names its calls of the encoder; STOP_AT is the step of a signal, FAULT
# what goes wrong.
WATCHED = """
import os, signal, sys, threading, time
import run_mlm_flax

collated, collate = [], run_mlm_flax.MaskingCollator.collate
run_mlm_flax.MaskingCollator.collate = lambda self, rows, *args: collated.extend(rows) or collate(self, rows, *args)
encode = run_mlm_flax.encode_texts  # Counting would change its key in the cache.
run_mlm_flax.encode_texts = lambda *args, **settings: print("encodes") or encode(*args, **settings)
stop_at, batch = int(os.environ.get("STOP_AT", 0)), run_mlm_flax.MaskedLMTrainer.batch
fault, load, sleep = os.environ.get("FAULT"), run_mlm_flax.load_raw_datasets, time.sleep
batches, exchanges, allgather = [], [], run_mlm_flax.multihost_utils.process_allgather


def noted_allgather(*args, **settings):
    exchanges.append(args)
    return allgather(*args, **settings)


def watched(*args):
    batches.append(1)
    if len(batches) == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    if fault == "crash" and len(batches) == 2:
        raise RuntimeError("this process crashed")
    if fault == "kill" and len(batches) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow step" and len(batches) == 1:
        sleep(35)
    return batch(*args)


def load_late(*args):
    if fault == "slow text":
        sleep(35)
    deadline = time.monotonic() + 60
    while fault == "awaited" and not os.path.exists("waits"):
        assert time.monotonic() < deadline, "the other process does not wait in Python"
        sleep(0.1)
    return load(*args)


def noted_sleep(seconds):
    if sys._getframe(1).f_code.co_name == "wait_until_done":
        open("waits", "w").close()
        if fault == "stopped while it waits":
            # Another one follows, while this process waits for the others to end.
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            os.kill(os.getpid(), signal.SIGTERM)
    sleep(seconds)


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


run_mlm_flax.MaskedLMTrainer.batch, run_mlm_flax.load_raw_datasets, time.sleep = watched, load_late, noted_sleep
run_mlm_flax.multihost_utils.process_allgather = noted_allgather
if fault == "full disk":
    run_mlm_flax.save_file = full_disk
try:
    run_mlm_flax.main()
finally:
    print(f"exchanges {len(exchanges)}, collated {len(collated)}", flush=True)
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a model and text; the last batches of both splits are not full."""
    folder = tmp_path_factory.mktemp("processes")
    make_model(folder / "model", num_hidden_layers=1)
    write_lines(folder / "train.txt", sentences(58))
    write_lines(folder / "validation.txt", sentences(21, seed=1))
    return folder


def command(folder, output, samples, **settings):
    """Return the flags of a run of 16 samples a step without dropout."""
    settings = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.txt",
        "validation_file": folder / "validation.txt",
        "cache_dir": folder / "cache",
        "output_dir": output,
        "do_train": True,
        "do_eval": True,
        "line_by_line": "true",
        "max_seq_length": 24,
        "train_batch_size": samples,
        "eval_batch_size": samples,
        "max_steps": STEPS,
        "dropout_rate": 0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "dataloader_drop_last": "false",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        **settings,
    }
    return flags(**settings)


def start(arguments, devices, cwd, **environment):
    """Start a process with some devices and return it."""
    environment = {
        **environment,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes):
    """Return [(status, output, errors)] of processes when all have ended; none outlives the test."""
    try:
        return [(process.returncode, *texts) for process in processes for texts in [process.communicate(timeout=240)]]
    finally:
        for process in processes:
            process.kill()


def run_one(arguments, devices, cwd):
    """Run one process and return its output."""
    ((status, output, errors),) = finish([start(arguments, devices, cwd)])
    assert status == 0, errors
    return output


def run_together(arguments, folder, environments=({}, {})):
    """Run processes with two devices each, by default two; return [(status, output, errors)]."""
    address, processes = f"127.0.0.1:{free_port()}", []
    for i, environment in enumerate(environments):
        joined = flags(coordinator_address=address, num_processes=len(environments), process_id=i)
        processes.append(start([*arguments, *joined], 2, folder, **environment))
    return finish(processes)


def error_lines(done):
    """Return the error line of each process, which says no more than that and has status 2."""
    found = []
    for status, _, errors in done:
        assert status == 2, errors
        assert "Traceback" not in errors and "stack trace" not in errors
        found += [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(found) == len(done), done
    return found


def losses(output):
    return [entry["loss"] for entry in read_json(output, "trainer_state.json")["log_history"] if "loss" in entry]


def assert_same(one, other):
    """Check the losses, the metrics and the final weights of two runs."""
    assert len(losses(one)) == STEPS
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    results = [read_json(output, "eval_results.json") for output in (one, other)]
    for name in ("eval_loss", "eval_accuracy", "perplexity"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4)
    assert results[0]["eval_samples"] == results[1]["eval_samples"]
    weights = [load_file(output / "model.safetensors") for output in (one, other)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], atol=2e-5)


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        ([1], {"line_by_line": "true"}),
        pytest.param([1, 4], {"line_by_line": "false", "whole_word_mask": True}, marks=pytest.mark.long),
    ],
)
def test_two_processes_train_as_one(material, tmp_path, devices, settings):
    for count in devices:
        run_one(command(material, tmp_path / f"alone-{count}", 16 // count, **settings), count, tmp_path)
    # Process 0 tokenizes until the other one waits in Python: in an operation of the devices, Gloo waits 30 seconds.
    arguments = command(material, "output", 4, **settings, overwrite_cache=True)
    done = run_together(arguments, tmp_path, ({"FAULT": "awaited"}, {}))
    assert [status for status, _, _ in done] == [0, 0], done[0][2] + done[1][2]
    for count in devices:
        assert_same(tmp_path / "output", tmp_path / f"alone-{count}")
    # Process 0 alone logs, and each collates its half of every step, missing samples included.
    assert "Starting a new run" in done[0][1]
    assert "INFO" not in done[1][1]
    counts = [int(output.split("collated ")[1]) for _, output, _ in done]
    eval_samples = read_json(tmp_path / "alone-1", "eval_results.json")["eval_samples"]
    # The evaluation is counted before it is made, and some of its first 30 samples are shown.
    assert counts == [8 * (STEPS + 2 * -(-eval_samples // 16)) + min(30, eval_samples)] * 2
    # Where they meet, before the first step, at the end of the training, before the evaluation: none in a step.
    assert [int(re.search(r"exchanges (\d+)", output)[1]) for _, output, _ in done] == [4, 4]
    # Process 1 finds both splits in the cache.
    assert [output.count("encodes") for _, output, _ in done] == [2, 0]


def test_a_signal_to_one_stops_both_and_they_resume(material, tmp_path):
    arguments = command(material, "output", 4)
    arguments += flags(dropout_rate=0.2, max_steps=6)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert [status for status, _, _ in run_together(arguments, whole)] == [0, 0]
    done = run_together(arguments, parts, ({}, {"STOP_AT": "3"}))
    assert [status for status, _, _ in done] == [128 + signal.SIGTERM] * 2, done[0][2] + done[1][2]
    (checkpoint,) = (parts / "output").glob("checkpoint-*")
    done = run_together(arguments, parts)
    assert [status for status, _, _ in done] == [0, 0], done[0][2] + done[1][2]
    assert f"Resuming from output/{checkpoint.name}" in done[0][1]
    assert losses(parts / "output") == losses(whole / "output")
    weights = [load_file(folder / "output" / "model.safetensors") for folder in (parts, whole)]
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.long
def test_two_processes_stream_as_one(material, tmp_path):
    settings = {"streaming": True, "shuffle_buffer_size": 20}
    run_one(command(material, tmp_path / "one", 16, **settings), 1, tmp_path)
    done = run_together(command(material, "output", 4, **settings), tmp_path)
    assert [status for status, _, _ in done] == [0, 0], done[0][2] + done[1][2]
    assert_same(tmp_path / "output", tmp_path / "one")


def test_a_mistake_is_reported_by_each_process(material, tmp_path):
    line, other = error_lines(run_together(command(material, "output", 4, text_column_name="body"), tmp_path))
    assert "train.txt: --text_column_name body is not one of the columns text" in line
    assert other == line.replace("error: ", "error: process 0: ")


@pytest.mark.long
def test_a_process_may_take_longer_than_gloo_waits(material, tmp_path):
    # Process 1 waits 35 seconds for tokenized text, and then process 0 as many for the first step of process 1.
    arguments = command(material, "output", 4, do_eval="false")
    done = run_together(arguments, tmp_path, ({"FAULT": "slow text"}, {"FAULT": "slow step"}))
    assert [status for status, _, _ in done] == [0, 0], done[0][2] + done[1][2]


@pytest.mark.long
def test_a_signal_before_the_training_stops_both(material, tmp_path):
    arguments = command(material, "output", 4)
    done = run_together(arguments, tmp_path, ({"FAULT": "awaited"}, {"FAULT": "stopped while it waits"}))
    assert [status for status, _, _ in done] == [128 + signal.SIGTERM] * 2, done[0][2] + done[1][2]
    assert "error: process 1: stopped by a signal" in done[0][2]


def test_an_error_of_one_process_ends_the_other_in_a_step(material, tmp_path):
    arguments = command(material, "output", 4, save_strategy="steps", save_steps=2)
    line, other = error_lines(run_together(arguments, tmp_path, ({"FAULT": "full disk"}, {})))
    assert line.startswith("error: --output_dir output") and "No space left on device" in line
    assert other == line.replace("error: ", "error: process 0: ")


@pytest.mark.long
def test_a_resume_on_another_number_of_devices(material, tmp_path):
    schedule = {"lr_scheduler_type": "constant"}  # It does not depend on the number of steps to come.
    saving = {"save_strategy": "steps", "save_steps": 2, **schedule}
    run_one(command(material, "output", 8, **saving, max_steps=2), 2, tmp_path)
    run_one(command(material, "whole", 8, **schedule), 2, tmp_path)
    done = run_one(command(material, "output", 4, **saving), 4, tmp_path)
    assert "Resuming from output/checkpoint-2" in done
    assert_same(tmp_path / "output", tmp_path / "whole")


@pytest.mark.long
def test_a_crash_of_one_process_ends_both(material, tmp_path):
    done = run_together(command(material, "output", 4), tmp_path, ({}, {"FAULT": "crash"}))
    assert "RuntimeError: this process crashed" in done[1][2] and "Traceback" in done[1][2]
    assert error_lines(done[:1]) == ["error: process 1: RuntimeError: this process crashed"]
    assert done[1][0] == 2


@pytest.mark.long
def test_a_process_that_is_killed_ends_the_others(material, tmp_path):
    done = run_together(command(material, "output", 2), tmp_path, ({}, {}, {"FAULT": "kill"}))
    assert done[2][0] == -signal.SIGKILL
    for line in error_lines(done[:2]):
        assert line.startswith("error: another process of this run has ended; see its error (")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, "--coordinator_address"),
        ({"coordinator_address": "localhost:1", "process_id": 0}, "--coordinator_address localhost:1: "),
    ],
)
def test_wrong_flags_are_one_line(material, tmp_path, capsys, settings, message):
    with pytest.raises(SystemExit) as caught:
        run_mlm_flax.main(command(material, tmp_path / "output", 4, **settings))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def meet(*processes, port=None):
    """Return what processes, given as (process_id, num_processes), are told at the start; "" if nothing is wrong."""
    address = f"127.0.0.1:{port or free_port()}"

    def told(place):
        process_id, count = place
        try:
            return run_mlm_flax.meet_processes(address, count, process_id) or ""
        except run_mlm_flax.UserError as error:
            return str(error).removeprefix(f"--coordinator_address {address}: ")

    with ThreadPoolExecutor() as pool:
        return list(pool.map(told, processes))


def test_processes_meet_before_jax_connects_them(monkeypatch):
    assert meet((2, 3), (0, 3), (1, 3)) == ["", "", ""]
    assert set(meet((1, 3), (0, 3), (1, 3))) == {"--process_id 1 is given twice, or is not below --num_processes 3"}
    assert set(meet((0, 2), (2, 2))) == {"--process_id 2 is given twice, or is not below --num_processes 2"}
    assert set(meet((0, 2), (1, 3))) == {"--num_processes is 2 in process 0 and 3 in process 1"}
    monkeypatch.setattr(run_mlm_flax, "MEETING_SECONDS", 1)
    assert set(meet((0, 3), (1, 3))) == {"process 2 did not report in 1 seconds; check its output and address"}
    (alone,) = meet((1, 2))
    assert alone.startswith("process 0 did not answer in 1 seconds (") and "refused" in alone


def test_a_run_meets_the_others_before_jax_connects_it(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_mlm_flax, "MEETING_SECONDS", 1)
    monkeypatch.setattr(run_mlm_flax.jax.distributed, "initialize", lambda *args, **kwargs: pytest.fail("not met"))
    place = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 2, "process_id": 1}
    with pytest.raises(SystemExit, match="2"):
        run_mlm_flax.main(command(material, tmp_path / "output", 4, **place))
    *_, line = capsys.readouterr().err.splitlines()
    assert f"--coordinator_address {place['coordinator_address']}: process 0 did not answer in 1 seconds" in line


def test_a_single_task_of_slurm_is_a_single_process(material, monkeypatch):
    for name, value in {**SLURM, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run_mlm_flax.jax.distributed, "initialize", lambda *args, **kwargs: pytest.fail("connected"))
    run_mlm_flax.connect_processes(*run_mlm_flax.parse_args(command(material, "output", 4))[1:])


def test_a_process_with_an_address_keeps_its_devices_under_slurm(material):
    program = "import sys, jax, run_mlm_flax as script; script.connect_processes(*script.parse_args(sys.argv[1:])[1:])"
    program += "; print(jax.process_count(), jax.config.values['jax_cuda_visible_devices'])"
    place = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 1, "process_id": 0}
    line = [sys.executable, "-c", program, *command(material, "output", 4, **place)]
    environment = {**os.environ, **SLURM, "SLURM_NTASKS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "all"], done.stderr


def test_a_visitor_is_not_a_process(monkeypatch):
    monkeypatch.setattr(run_mlm_flax, "MEETING_SECONDS", 20)
    port, visited = free_port(), threading.Event()

    def visit():
        with contextlib.closing(connect(port)) as visitor:
            visitor.sendall(b"GET / HTTP/1.1")
            visited.set()
        return ""

    with ThreadPoolExecutor() as pool:
        visiting = pool.submit(visit)
        process_0 = pool.submit(meet, (0, 2), port=port)
        visited.wait(20)
        assert meet((1, 2), port=port) == process_0.result(20) == [""]
        visiting.result(20)


def connect(port):
    """Return a connection to a port, as soon as it answers."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost", "must be HOST:PORT, where process 0 is reached"),
        ("nowhere:1234", "Name or service not known"),
    ],
)
def test_an_address_that_cannot_be_right_is_an_error_at_once(monkeypatch, address, message):
    unknown = mock.Mock(side_effect=socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(run_mlm_flax.UserError, match=f"^--coordinator_address {address}: {message}$"):
        run_mlm_flax.meet_processes(address, 2, 1)


def test_an_address_in_use_is_an_error_at_once():
    with socket.create_server(("", 0)) as server:
        (line,) = meet((0, 2), port=server.getsockname()[1])
    assert line.startswith("Address already in use")
