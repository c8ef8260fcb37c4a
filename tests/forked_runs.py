"""Runs of a script in forked children, and the comparison of what they wrote: for `fuzz_runs.py`."""

import atexit
import contextlib
import faulthandler
import glob
import importlib
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import ClassVar

from conftest import read_json
from safetensors.numpy import load_file
from tqdm import tqdm

TIMEOUT = 180  # Seconds after which a run counts as one that never ends.
SIGNALS = (signal.SIGTERM, signal.SIGINT)


# ---- 1. Processes ---------------------------------------------------------------------------------------------------
# Texts of some thousand characters are long ones, and a table of a stream holds few texts.
SHORT_CALLS = {"CALL_LENGTH": 1500, "OVERLAP": 600, "SAME_TOKENS": 20}


class Process:
    """A forked child that runs the `main` of an imported script, in a session of its own.

    What it prints goes to `log`. `samples` gets a line "epoch index" for each sample that is made ready.
    """

    running: ClassVar[set] = set()

    def __init__(self, script, arguments, log, samples, environment):
        self.log, self.samples = Path(log), Path(samples)
        for path in (self.log, self.samples):
            path.write_bytes(b"")
        self.status, self.start, self.seconds = None, time.monotonic(), 0.0
        sys.stdout.flush()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # The child must not leave `_run`.
        self.pid = os.fork()
        if not self.pid:
            self._run(importlib.import_module(script), arguments, environment)
        self.running.add(self)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with contextlib.suppress(PermissionError):  # The child has become the leader of its own session.
            os.setpgid(self.pid, self.pid)

    def _run(self, script, arguments, environment):
        status = 1
        try:
            with contextlib.suppress(PermissionError):
                os.setsid()
            output = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            faulthandler.enable(sys.__stderr__)
            os.environ.update(environment)
            tqdm.set_lock(multiprocessing.RLock())  # A killed run would leave a common one locked.
            note_samples(script, self.samples)
            vars(script).update(SHORT_CALLS)
            script.main(arguments)
            status = 0
        except SystemExit as error:
            status = error.code
        except KeyboardInterrupt:  # As Python does.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        """Return whether the process has ended; `status` is then negative for death by a signal."""
        if self.status is None and (end := os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
            self.status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            self.seconds = time.monotonic() - self.start
        return self.status is not None

    def wait(self, seconds, samples=math.inf):
        """Wait until the process ends, has noted `samples` bytes, or `seconds` are over; kill it after TIMEOUT."""
        stop = time.monotonic() + seconds
        while not self.poll() and self.size() <= samples and time.monotonic() < stop:
            time.sleep(0.003)
            if time.monotonic() > self.start + TIMEOUT:
                self.send(signal.SIGABRT, group=False)  # Python prints where it is.
                time.sleep(1)
                self.end()
                raise Disagreement(f"the run does not end in {TIMEOUT} s: {self.log}")

    def end(self):
        """Kill what is left of the process and its children."""
        if self in self.running:
            os.killpg(self.pid, signal.SIGKILL)  # Its group exists until it is waited for.
            while not self.poll():
                time.sleep(0.003)
            os.waitpid(self.pid, 0)
            self.running.remove(self)

    def handles_sigterm(self):
        """Return whether the process handles SIGTERM itself."""
        with contextlib.suppress(OSError):
            caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{self.pid}/status").read_text())
            return bool(int(caught[1], 16) >> signal.SIGTERM - 1 & 1)
        return False

    def size(self):
        """Return the size of the notes about samples: how far the run is."""
        return self.samples.stat().st_size

    def trained(self):
        """Return [(epoch, index)] of the noted samples that are not for evaluation."""
        noted = [line.split() for line in self.samples.read_text().splitlines()]
        return [(int(epoch), int(index)) for epoch, index in noted if epoch != "None" and int(epoch) < 2**62]

    def text(self):
        """Return what the process has printed."""
        return self.log.read_text(errors="replace")

    def last_line(self):
        """Return the line that says why the process has ended."""
        lines = [line for line in re.split(r"[\r\n]", self.text()) if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return [*lines, *errors][-1] if lines else "nothing was printed"

    def send(self, number, group):
        """Send a signal to the process, or to all of its group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)


def note_samples(script, path):
    """Have the collator of a script note the epoch and index of each sample with labels."""
    mask, file = script.MaskingCollator.mask, open(path, "ab", buffering=0)  # noqa: SIM115 (until the process ends)

    def noted(self, sample):
        if sample.get("labelled", True):
            file.write(f"{sample.get('epoch')} {sample.get('index')}\n".encode())
        return mask(self, sample)

    script.MaskingCollator.mask = noted


def free_port():
    """Return a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- 2. What is compared, and what may differ -----------------------------------------------------------------------
class Disagreement(Exception):  # noqa: N818
    """What a case found."""


# Times, and what the Trainer last thought due, which each step decides anew.
TIMES = ("runtime", "per_second", "total_flos", "TrainerControl")
EVENTS = ("runs", "logs")  # TensorBoard: the names of the files hold the time, and each start writes one.
# Settings of one process; its random state, which nothing depends on; and the bias of the keys: attention does not
# depend on it, so that its gradient is 0 but for rounding, which Adam scales up. Rounding also decides which of two
# equal evaluations is the better one.
SPLIT = ("train_batch_size", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth", "key.bias")
SPLIT += ("best_global_step", "best_model_checkpoint")


def without(content, names):
    """Return nested JSON without the entries whose names end with one of `names`."""
    if isinstance(content, dict):
        return {name: without(value, names) for name, value in content.items() if not name.endswith(names)}
    return [without(value, names) for value in content] if isinstance(content, list) else content


def read_folder(folder, left_out):
    """Return {"weights", "files", each JSON report} of an output folder or a checkpoint."""
    folder = Path(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files]
    names = [name for name in names if not name.startswith(("checkpoint-", *EVENTS)) and not name.endswith(left_out)]
    found = {"files": sorted(names)}
    for name in ("trainer_state.json", "train_results.json", "eval_results.json", "all_results.json"):
        if name in names:
            found[name] = without(read_json(folder / name), left_out)
    if best := found.get("trainer_state.json", {}).get("best_model_checkpoint"):
        found["trainer_state.json"]["best_model_checkpoint"] = os.path.basename(best)
    if "model.safetensors" in names:
        weights = load_file(folder / "model.safetensors")
        found["weights"] = {name: array for name, array in weights.items() if not name.endswith(left_out)}
    return found


def checkpoints(folder):
    """Return {step: path} of the checkpoints that a run could resume."""
    paths = {int(path.name[11:]): path for path in Path(folder).glob("checkpoint-*")}
    needed = ("trainer_state.json", "model.safetensors", "optimizer.*")
    return {step: paths[step] for step in sorted(paths) if all(glob.glob(f"{paths[step]}/{name}") for name in needed)}


def compare(expected, found, left_out=TIMES, tolerance=0.0, checkpoints_of="same", limit=None):
    """Raise `Disagreement` at the first difference of two output folders.

    `checkpoints_of` says which checkpoints the second one has: the "same"; "more" (a stop writes one, which pushes
    others out with a `limit`; it is written before the evaluation of its step, so only files and weights are compared);
    or "newer", after a resume from a copy of one in the middle.
    """
    steps = [set(checkpoints(folder)) for folder in (expected, found)]
    kept = {"same": steps[0], "more": steps[0] | steps[1], "newer": {s for s in steps[0] if s >= min(steps[1])}}
    if limit and checkpoints_of == "more" and len(steps[1]) <= limit:
        kept["more"] = steps[1] | set(sorted(steps[0])[-1:])
    if steps[1] != kept[checkpoints_of]:
        raise Disagreement(f"checkpoints: {sorted(steps[0])}, {sorted(steps[1])}")
    for name in ["", *(f"checkpoint-{step}" for step in sorted(steps[0] & steps[1]))]:
        folders = [read_folder(Path(folder, name), left_out) for folder in (expected, found)]
        if checkpoints_of != "same":
            allow_extra_checkpoints(name, *folders)
        if difference := first_difference(*folders, tolerance, name or "output_dir"):
            raise Disagreement(difference)


def allow_extra_checkpoints(name, expected, found):
    """Leave out what depends on which checkpoints there are."""
    states = expected["trainer_state.json"], found["trainer_state.json"]
    for state in states:
        state.pop("stateful_callbacks", None)  # To the Trainer, those of the last checkpoint.
    if not states[0].get("best_model_checkpoint"):  # The Trainer names one if it happens to exist.
        states[1].pop("best_model_checkpoint", None)
        states[0].pop("best_model_checkpoint", None)
    if name:
        del expected["trainer_state.json"], found["trainer_state.json"]


def compare_backends(pytorch, flax, left_out, tolerance=1e-3):
    """Raise `Disagreement` at the first difference of what the two scripts report alike."""
    steps = [sorted(checkpoints(folder)) for folder in (pytorch, flax)]
    if steps[0] != steps[1]:
        raise Disagreement(f"checkpoints: {steps[0]} != {steps[1]}")
    found = []
    for folder in (pytorch, flax):
        state = without(read_json(folder, "trainer_state.json"), left_out)
        results = without(read_json(folder, "all_results.json"), left_out)
        history = [{name: entry[name] for name in sorted(entry)} for entry in state["log_history"]]
        state = {name: state[name] for name in ("global_step", "max_steps", "epoch")}
        found.append({"trainer_state.json": {**state, "log_history": history}, "all_results.json": results})
    if difference := first_difference(*found, tolerance, "output_dir"):
        raise Disagreement(difference)


def first_difference(one, other, tolerance, place):
    """Return a line about the first difference of two nested values, or None."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *(name for name in other if name not in one)]:
            if name not in one or name not in other:
                return f"{place} {name}: only in the {'first' if name in one else 'second'}"
            if difference := first_difference(one[name], other[name], tolerance, f"{place} {name}"):
                return difference
        return None
    if isinstance(one, list) and isinstance(other, list):
        for i, (left, right) in enumerate(zip(one, other)):
            step = f" step {left['step']}" if isinstance(left, dict) and "step" in left else f"[{i}]"
            if difference := first_difference(left, right, tolerance, place + step):
                return difference
        rest = (one if len(one) > len(other) else other)[min(len(one), len(other)) :]
        return f"{place}: {len(one)} and {len(other)} entries, the first too many is {rest[0]}" if rest else None
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{place}: {one.dtype}{one.shape} != {other.dtype}{other.shape}"
        if one.tobytes() == other.tobytes() or (apart := float(abs(one - other).max())) < tolerance:
            return None
        return f"{place}: weights differ by {apart:.3g}"
    near = tolerance * 10 if place.endswith(("grad_norm", "perplexity")) else tolerance
    if isinstance(one, float) and isinstance(other, (int, float)) and math.isclose(one, other, rel_tol=near):
        return None
    return None if one == other or (one != one and other != other) else f"{place}: {one} != {other}"
