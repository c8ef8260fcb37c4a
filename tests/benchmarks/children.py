"""Measure in a process of its own: start it, read its memory, time its steps.

A benchmark program starts itself again as `bench_x.py --child SPEC`, once per variant and round, so that every
measurement has a fresh backend and a fresh memory high-water mark. The parent imports no framework. A child imports
the scripts from the folder that its SPEC names under "scripts", or those of this checkout, in the interpreter that it
names under "python", or in that of the parent.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHILD = "--child"
TIMEOUT = 3600  # Seconds that a child may take.


class MeasuredError(BaseException):
    """Raised when all is measured, to leave a training loop from inside; no `except Exception` holds it up."""


class Clock:
    """Times the steps after the warm-up, from their ends.

    `wait` blocks until the device is done; it is called before the first and after the last measured step only, so
    that the host may run ahead in between. `batches` collects (tokens, places) of each batch as it is made.
    """

    def __init__(self, warm_up, steps, wait=lambda: None):
        self.warm_up, self.steps, self.wait = warm_up, steps, wait
        self.begin = time.perf_counter()
        self.count, self.batches, self.compilations, self.result = 0, [], 0, {}

    def step_done(self):
        """Note the end of a step; raises `MeasuredError` at the last one."""
        self.count += 1
        if self.count == 1:
            self.wait()
            self.first_step = seconds_since_start()
        if self.count == self.warm_up:
            self.wait()
            self.compilations = 0
            self.start = time.perf_counter()
        elif self.count == self.warm_up + self.steps:
            self.wait()
            seconds = time.perf_counter() - self.start
            self.result = {"seconds_per_step": seconds / self.steps, "start_up_seconds": self.start - self.begin}
            self.result |= peak_memory() | {"compilations_while_measured": self.compilations}
            self.result["first_step_seconds"] = self.first_step
            tokens, places = (sum(column) for column in zip((0, 0), *self.batches[self.warm_up : self.count]))
            if tokens:
                self.result |= {"tokens_per_second": tokens / seconds, "padding_share": 1 - tokens / places}
            raise MeasuredError

    def count_compilation(self, event, duration, **details):
        """Listen to `jax.monitoring`."""
        self.compilations += event == "/jax/core/compile/backend_compile_duration"

    def count_batch(self, batch):
        """Note the tokens and the places of a collated batch (NumPy or PyTorch) and return it."""
        rows, length = batch["input_ids"].shape
        mask = batch.get("attention_mask")  # Left out of batches without padding.
        self.batches.append((rows * length if mask is None else int(mask.sum()), rows * length))
        return batch


def status_bytes(name):
    """Return a memory value of /proc/self/status in bytes, such as VmHWM: the peak of resident memory.

    Not `ru_maxrss`: that begins with the size of the process that started this one.
    """
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", file.read(), re.M)[1])


def peak_memory():
    """Return the peak of this process's resident memory and, where a GPU is in use, of its device memory, in bytes."""
    peak = {"peak_memory": status_bytes("VmHWM")}
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["peak_device_memory"] = torch.cuda.max_memory_allocated()
    elif jax and jax.default_backend() == "gpu":
        peak["peak_device_memory"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return peak


class AnonymousPeak:
    """Within, samples the anonymous memory of this process: what it allocated, without the files it has mapped."""

    def __init__(self, interval=0.01):
        self.interval, self.peak, self.stop = interval, 0, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self):
        """Keep the largest value seen."""
        while not self.stop.wait(self.interval):
            self.peak = max(self.peak, status_bytes("RssAnon"))

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()


def seconds_since_start():
    """Return the wall time since the parent started this child."""
    return time.time() - float(os.environ["BENCH_STARTED"])


def run_child(spec, folder, environment=None, timeout=TIMEOUT):
    """Run this program again as a child with `spec` (a dict for JSON); return its result, or {"error": a line}."""
    folder = Path(tempfile.mkdtemp(dir=folder, prefix="child-"))
    spec = {**spec, "child_folder": str(folder)}
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [spec.get("python") or sys.executable, sys.argv[0], CHILD, str(folder / "spec.json")]
    with open(folder / "log.txt", "w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        child_environment = {**os.environ, **(environment or {}), "BENCH_STARTED": repr(time.time())}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=child_environment, timeout=timeout)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    lines = [line for line in (folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
    if os.environ.get("BENCH_DEBUG"):
        print("\n".join(lines[-60:]), file=sys.stderr)
    return {"error": lines[-1][:300] if lines else f"no output within {timeout:.0f} s"}


def child_main(measure):
    """As a child: write what `measure(spec)` returns and end the process, whatever threads are left.

    Returns only where this process is no child.
    """
    if CHILD not in sys.argv[1:2]:
        return
    spec = json.loads(Path(sys.argv[2]).read_text())
    sys.path.insert(1, spec.get("scripts") or str(ROOT))
    status = 1
    try:
        write_result(spec, measure(spec))
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def add_previous_option(parser):
    """Add `--previous` and `--former_python` to the options of a benchmark."""
    parser.add_argument("--previous", type=scripts_folder, help="folder of other run_mlm*.py to measure as well")
    parser.add_argument("--former_python", help="interpreter with Transformers 4.57, for --previous and stock_flax.py")


def former_python(args, side, backend):
    """Return the interpreter that runs a side if it is not this one: older scripts need older libraries."""
    return args.former_python if side == "previous" or (side, backend) == ("stock", "flax") else None


def scripts_folder(name):
    """Return the full path of a folder with the two scripts."""
    if not all((Path(name) / f"{script}.py").is_file() for script in ("run_mlm", "run_mlm_flax")):
        raise argparse.ArgumentTypeError(f"{name} does not hold run_mlm.py and run_mlm_flax.py")
    return str(Path(name).resolve())


def finish(spec, result):
    """End the child here, from whatever thread, with its result."""
    write_result(spec, result)
    os._exit(0)


def write_result(spec, result):
    """Write the result that the parent reads."""
    path = Path(spec["child_folder"]) / "result.json"
    path.with_suffix(".tmp").write_text(json.dumps(result))
    path.with_suffix(".tmp").rename(path)
