"""Start-up: wall time from the start of the process to the end of the first training step, tiny model, warm caches.

    python tests/benchmarks/bench_startup.py
    python tests/benchmarks/bench_startup.py --previous FOLDER

The scripts run as the programs that they are. "nothing compiled yet" is our Flax script with an empty compilation
cache; the other runs of it find the step that an earlier run compiled. The second table is the peak memory of setting
up a new Flax model of the base shape, up to the first step: ours, and the way of the reference, which traces the model
at a full batch.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import children
import material
import ours
import report
import stock

STEPS = 10_007  # Of the run that ends after its first one: the progress bar of the training is known by its length.
BATCH, LENGTH = 8, 64
TARGET = 1.0
PREVIOUS = "previous"  # The variant that runs the scripts of `--previous`.
VARIANTS = [  # (backend, variant, side, whether nothing is compiled yet)
    ("torch", "stock", "stock", False),
    ("torch", "ours", "ours", False),
    ("torch", PREVIOUS, "ours", False),
    ("flax", "stock", "stock", False),
    ("flax", "ours", "ours", False),
    ("flax", PREVIOUS, "ours", False),
    ("flax", "ours, nothing compiled yet", "ours", True),
]
CACHE_VARIABLES = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR")  # Below which programs keep what they compiled.


def measure(spec):
    """Do what a spec says and return the measurements."""
    if spec["kind"] == "model":
        return material.write_model(spec["model"], "tiny") or {}
    if spec["kind"] == "set_up":
        return set_up_flax(spec)
    import tqdm.auto  # Both frameworks show a bar; nothing heavy is imported before the program does it.

    tqdm.auto.tqdm = ours.watched_bar(tqdm.auto.tqdm, FirstStep(spec), STEPS)
    output = os.path.join(spec["child_folder"], "out")
    files = spec["train_file"], spec["validation_file"]
    if spec["side"] == "stock":
        stock.start(spec["backend"], spec["model"], files, output, STEPS, BATCH, LENGTH)
    else:
        flags = ["--model_name_or_path", spec["model"], "--train_file", files[0], "--validation_file", files[1]]
        flags += ["--line_by_line", "false", "--train_batch_size", BATCH, "--max_seq_length", LENGTH, "--do_train"]
        flags += ["--max_steps", STEPS, "--output_dir", output]
        ours.start(spec["backend"], [str(flag) for flag in flags], spec["scripts"])
    raise RuntimeError("the program ended without a first step: has its progress bar changed?")


class FirstStep:
    """Ends the process at the first step."""

    def __init__(self, spec):
        self.spec = spec

    def step_done(self):
        """Wait for the device and write the result."""
        ours.wait_for_device(self.spec["backend"])()
        result = {"seconds": children.seconds_since_start(), "imports_torch": "torch" in sys.modules}
        children.finish(self.spec, result | children.peak_memory())


def set_up_flax(spec):
    """Return the peak memory of making a new model: our whole start-up, or the reference's way of making the model."""
    if spec["side"] == "ours":
        script = ours.load("flax")
        ours.watch_build(script, "flax").append(lambda run: children.finish(spec, children.peak_memory()))
        sizes = material.SHAPES["base"] | {"max_position_embeddings": 512}
        overrides = ",".join(f"{name}={value}" for name, value in sizes.items())
        flags = ["--model_type", "bert", "--config_overrides", overrides, "--tokenizer_name", spec["model"]]
        flags += ["--train_file", spec["train_file"], "--max_seq_length", "128", "--line_by_line", "false"]
        script.main([*flags, "--do_train", "--max_steps", "1", "--output_dir", f"{spec['child_folder']}/out"])
    from transformers import BertConfig, FlaxBertForMaskedLM

    FlaxBertForMaskedLM(BertConfig(**material.SHAPES["base"]), input_shape=(8, 512))
    return children.peak_memory()


def parse_args():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", choices=["torch", "flax", "both"], default="both")
    children.add_previous_option(parser)
    parser.add_argument("--no_set_up", action="store_true", help="leave out the second table")
    parser.add_argument("--name", default="startup_cpu", help="of the report")
    return parser.parse_args()


def run_variant(folder, spec, variant, cold):
    """Run a child; with `cold` its compilation cache is empty."""
    caches = Path(tempfile.mkdtemp(dir=folder)) if cold else folder / f"caches-{variant}-{spec['backend']}"
    environment = {name: str(caches / name.lower()) for name in CACHE_VARIABLES}
    for path in environment.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    environment |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1", "MLM_DEBUG": "1"}
    environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return children.run_child(spec, folder, environment)


def main():
    """Run the benchmark."""
    children.child_main(measure)
    args = parse_args()
    made = report.Report(args.name, "Start-up, tiny model, CPU", vars(args))
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    spec = {"model": str(folder / "model"), "kind": "start", "scripts": None}
    spec |= {f"{split}_file": material.write_text(folder / f"{split}.txt", 0.3) for split in ("train", "validation")}
    variants = [variant for variant in VARIANTS if args.backend in ("both", variant[0])]
    variants = [variant for variant in variants if args.previous or variant[1] != PREVIOUS]
    try:
        run_variant(folder, {**spec, "kind": "model", "side": "ours", "backend": "torch"}, "model", False)
        for index in range(-1, args.rounds):  # The first round fills the caches.
            for backend, name, side, cold in variants:
                if index < 0 and cold:
                    continue
                scripts = args.previous if name == PREVIOUS else None
                python = children.former_python(args, PREVIOUS if name == PREVIOUS else side, backend)
                changes = {"backend": backend, "side": side, "scripts": scripts, "python": python}
                result = run_variant(folder, {**spec, **changes}, name, cold)
                if index >= 0 or "error" in result:
                    made.add(result, kind="start", backend=backend, variant=name, round=index)
                    made.tables["Process start to the end of the first step"] = start_rows(made, variants)
        if args.backend != "torch" and not args.no_set_up:
            for side in ("stock", "ours"):
                result = run_variant(folder, {**spec, "kind": "set_up", "backend": "flax", "side": side}, side, False)
                made.add(result, kind="set_up", variant=side)
            made.tables["New Flax model of the base shape"] = set_up_rows(made)
            made.save()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(made.markdown())


def start_rows(made, variants):
    """Return a row per variant."""
    rows = []
    for backend, name, *_ in variants:
        keys = {"kind": "start", "backend": backend}
        seconds, base, torch, memory = (
            made.values(metric, variant=variant, **keys)
            for metric, variant in (
                *(("seconds", name), ("seconds", "stock")),
                *(("imports_torch", name), ("peak_memory", name)),
            )
        )
        found = report.ratios(seconds, base)
        row = {"backend": backend, "variant": name}
        row["seconds"] = report.spread(seconds.values()) or f"failed: {made.error(variant=name, **keys)}"
        row |= {"this / stock": report.spread(found)}
        row["target"] = report.verdict(found, TARGET if name == "ours" else None, at_least=False)
        row |= {"imports PyTorch": "yes" if any(torch.values()) else "no"}
        row["peak GiB"] = report.spread(memory.values(), 2**-30)
        rows.append(row)
    return rows


def set_up_rows(made):
    """Return the peak memory of either way to set up a model."""
    rows = []
    for side, what in (("stock", "reference: traced at 8 x 512"), ("ours", "ours: the whole start-up, without a step")):
        peak = made.values("peak_memory", kind="set_up", variant=side).values()
        shown = report.spread(peak, 2**-30) or f"failed: {made.error(kind='set_up', variant=side)}"
        rows.append({"variant": what, "peak GiB": shown})
    return rows


if __name__ == "__main__":
    main()
