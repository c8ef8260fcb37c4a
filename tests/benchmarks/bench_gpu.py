"""Speed and correctness on one GPU, in one report: the stock Trainer, `run_mlm.py` and `run_mlm_flax.py`.

    python tests/benchmarks/bench_gpu.py
    python tests/benchmarks/bench_gpu.py --device cpu --tiny

Needs no network, and what is installed of PyTorch, Transformers and JAX. Each part runs in a process of its own with a
time limit; a part that fails is a row that says so. Within `--minutes`, the rounds of the timed parts are repeated.

The share of the peak counts 6 floating-point operations per parameter used and token: those of the encoder's matrices,
and those of the head for the 15 % of the tokens that are predicted.
"""

import argparse
import concurrent.futures
import json
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import children
import material
import numpy as np
import ours
import report
import stock
from safetensors.numpy import load_file

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # Dense bfloat16 operations a second.
LIMIT = 150  # Seconds that one process may take.
SHARE = 0.15  # Of the tokens are predicted.


@dataclass
class Variant:
    """What is timed: the side, the backend, and flags for PyTorch."""

    side: str = "ours"
    backend: str = "torch"
    flags: list = field(default_factory=list)
    patches: tuple = ()
    changes: tuple = ()


WORKERS = ["--dataloader_num_workers", "4"]
VARIANTS = {
    "stock Trainer": Variant("stock"),
    "stock Trainer, compiled, 4 workers": Variant("stock", flags=["--torch_compile", *WORKERS]),
    "run_mlm.py": Variant(),
    "run_mlm.py, no workers": Variant(flags=["--dataloader_num_workers", "0"]),
    "run_mlm.py, compiled": Variant(flags=["--torch_compile"]),
    "run_mlm_flax.py": Variant(backend="flax"),
}


# ---- In a child -----------------------------------------------------------------------------------------------------
def measure(spec):
    """Do what a spec says and return the measurements."""
    if spec["kind"] == "model":
        return material.write_model(spec["model"], spec["shape"]) or {}
    if spec["kind"] == "run":
        return run(spec)
    variant = VARIANTS[spec["variant"]]
    if spec["tiny"] and "--torch_compile" in variant.flags:
        variant.flags += ["--torch_compile_backend", "aot_eager"]  # Nothing to build for a C++ compiler.
    return stock.train({**spec, "flags": variant.flags}) if variant.side == "stock" else ours.train(spec, variant)


def run(spec):
    """Run a script to its end, or kill this process when a step begins."""
    script = ours.load(spec["backend"])
    if spec.get("kill_at"):
        step, calls = script.MaskedLMTrainer.training_step, []

        def killed(*args, **kwargs):
            calls.append(1)
            if len(calls) == spec["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args, **kwargs)

        script.MaskedLMTrainer.training_step = killed
    script.main(spec["flags"])
    return {"done": 1}


# ---- In the parent --------------------------------------------------------------------------------------------------
class Bench:
    """The parts of the benchmark, which fill the tables of a report."""

    def __init__(self, args, made, folder):
        self.args, self.report, self.folder = args, made, folder
        self.end = time.monotonic() + 60 * args.minutes
        self.environment = {name: str(folder / name.lower()) for name in ("HF_HOME", "HF_DATASETS_CACHE")}
        self.environment |= {"HF_HUB_OFFLINE": "1", "MLM_DEBUG": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if args.device == "cpu":
            self.environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self.model, self.shape = str(folder / "model"), "tiny" if args.tiny else "base"
        self.texts = {split: str(folder / f"{split}.txt") for split in ("train", "validation")}
        material.write_text(self.texts["train"], 0.1 if args.tiny else 12, 1)
        material.write_text(self.texts["validation"], 0.05, 2)

    def child(self, spec, **environment):
        """Run a child within what is left of the time, and return its result."""
        left = self.end - time.monotonic()
        if left < 10:
            return {"error": "no time was left"}
        settings = {"device": self.args.device, "model": self.model, "shape": self.shape, "tiny": self.args.tiny}
        environment = {**self.environment, **environment}
        return children.run_child({**settings, **spec}, self.folder, environment, timeout=min(LIMIT, left))

    def time(self, name, batch, length, index):
        """Time the steps of a variant."""
        spec = {"kind": "train", "variant": name, "batch": batch, "length": length, "mode": "concat", "bf16": True}
        spec |= {"backend": VARIANTS[name].backend, "train_file": self.texts["train"], "samples": None}
        spec |= {"validation_file": self.texts["validation"], "device": self.args.device}
        spec |= {"warm_up": 2, "steps": 2} if self.args.tiny else {"warm_up": 10, "steps": 40}
        result = self.child(spec)
        if "error" not in result:
            result["tokens_per_second"] = batch * length / result["seconds_per_step"]
        self.report.add(result, work=f"{batch}x{length}", variant=name, round=index)

    def run(self, output, *flags, backend="torch", kill_at=0, **environment):
        """Run a script on the text and return its error or None; `output` is the name of a folder."""
        steps = 6 if self.args.tiny else 20
        given = {
            "model_name_or_path": self.model,
            "train_file": self.texts["train"],
            "output_dir": self.folder / output,
        }
        given |= {"max_seq_length": 64, "line_by_line": "false", "train_batch_size": 8, "max_steps": steps}
        given |= {"logging_steps": 1, "save_steps": steps // 2, "learning_rate": 1e-4, "lr_scheduler_type": "linear"}
        line = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        spec = {"kind": "run", "backend": backend, "flags": [*line, "--do_train", *flags], "kill_at": kill_at}
        return self.child(spec, **environment).get("error")

    def losses(self, output):
        """Return the losses that a run has logged."""
        state = json.loads((self.folder / output / "trainer_state.json").read_text())
        return np.array([entry["loss"] for entry in state["log_history"] if "loss" in entry])

    def equal_losses(self):
        """Compare the losses of both scripts in float32."""
        exact = {"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        for backend in ("torch", "flax"):
            if error := self.run(backend, "--dropout_rate", "0", backend=backend, **exact):
                return f"failed: {backend}: {error}"
        one, other = self.losses("torch"), self.losses("flax")
        return f"largest relative difference of {len(one)} losses: {np.abs(one / other - 1).max():.1e}"

    def resumed(self, *flags):
        """Compare a run that was killed and resumed with an uninterrupted one."""
        name, kill_at = "-".join(("resume", *flags)), 5 if self.args.tiny else 15
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if flags else {}
        errors = [self.run(f"{name}-whole", *flags, **environment)]
        self.run(f"{name}-killed", *flags, kill_at=kill_at, **environment)
        if (self.folder / f"{name}-killed" / "model.safetensors").exists():
            return "failed: the run was not killed"
        errors.append(self.run(f"{name}-killed", *flags, **environment))
        if any(errors):
            return f"failed: {next(filter(None, errors))}"
        whole, killed = (load_file(self.folder / f"{name}-{end}" / "model.safetensors") for end in ("whole", "killed"))
        apart = max(float(np.abs(whole[key] - killed[key]).max()) for key in whole)
        return f"largest difference of a weight: {apart:.1e}" if apart else "equal, bit for bit"

    def half(self):
        """Train in float16, on a CPU in bfloat16."""
        flag = "--fp16" if self.args.device == "cuda" else "--bf16"
        if error := self.run("half", flag):
            return f"failed: {error}"
        losses = self.losses("half")
        return f"loss {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last of {len(losses)}"

    def correct(self, title, part):
        """Run a part that compares, and keep its outcome."""
        try:
            outcome = part()
        except Exception as error:
            outcome = f"failed: {error!r}"
        self.report.tables.setdefault("Correctness", []).append(
            {"part": title, "outcome": report.without_paths(outcome)}
        )
        self.report.save()

    def all(self):
        """Run all parts: one round of the timed ones, the correctness, and further rounds while there is time."""
        error = self.child({"kind": "model"}).get("error")
        if error:
            raise SystemExit(f"no model could be made: {error}")
        work = [(4, 32)] if self.args.tiny else [(64, 512), (256, 128)]
        timed = [(name, *sizes) for sizes in work for name in VARIANTS]
        correctness = {
            "float32, without TF32: both scripts": self.equal_losses,
            "killed and resumed, deterministic algorithms": lambda: self.resumed("--full_determinism"),
            "killed and resumed, default algorithms": self.resumed,
            "half precision": self.half,
        }
        with concurrent.futures.ThreadPoolExecutor(2 if self.args.tiny else 1) as pool:  # A GPU is for one at a time.
            parts = [pool.submit(self.time, *part, 0) for part in timed]
            parts += [pool.submit(self.correct, *part) for part in correctness.items()]
            for part in parts:
                part.result()
        for index in range(1, 1 if self.args.tiny else 10):
            for part in timed:
                if self.end - time.monotonic() > LIMIT:
                    self.time(*part, index)
        self.report.tables = {**{f"{b} x {n} tokens": self.rows(b, n) for b, n in work}, **self.report.tables}
        self.report.save()

    def rows(self, batch, length):
        """Return a row for each variant."""
        shape, gpu, work = material.SHAPES[self.shape], self.report.head["hardware"]["gpu"] or "", f"{batch}x{length}"
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        used = shape["num_hidden_layers"] * (4 * hidden**2 + 2 * hidden * inner)
        used += SHARE * (hidden**2 + hidden * material.VOCABULARY)
        peak = next((peak for card, peak in PEAKS.items() if card in gpu), None)
        rows = []
        for name in VARIANTS:
            found = {key: self.report.values(key, work=work, variant=name).values() for key in METRICS}
            speeds = list(found["tokens_per_second"])
            row = {"variant": name, "tokens/s": report.spread(speeds, digits=0)}
            row["tokens/s"] = row["tokens/s"] or f"failed: {self.report.error(work=work, variant=name)}"
            row["share of the peak"] = report.spread(speeds, 6 * used / peak) if peak else ""
            row["device memory, MB"] = report.spread(found["peak_device_memory"], 1e-6, 0)
            row["first step after, s"] = report.spread(found["first_step_seconds"], digits=1)
            rows.append(row)
        return rows


METRICS = ("tokens_per_second", "peak_device_memory", "first_step_seconds")


def main():
    """Run the benchmark."""
    children.child_main(measure)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps: tests this program")
    parser.add_argument("--minutes", type=float, default=8, help="after which no part begins")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the report")
    parser.add_argument("--name", default="gpu", help="of the report")
    args = parser.parse_args()
    report.RESULTS = args.output
    made = report.Report(args.name, "Speed and correctness on one GPU", {**vars(args), "output": str(args.output)})
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        Bench(args, made, folder).all()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(made.markdown())


if __name__ == "__main__":
    main()
