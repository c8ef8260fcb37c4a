"""Training and evaluation: the scripts beside the stock recipes, in tokens per second and peak memory.

    python tests/benchmarks/bench_training.py --shape small
    python tests/benchmarks/bench_training.py --shape small --bf16 --backend torch
    python tests/benchmarks/bench_training.py --shape base --ablation
    python tests/benchmarks/bench_training.py --shape small --previous FOLDER
    python tests/benchmarks/bench_training.py --shape small --mode lines --train_file text.txt --tokenizer FOLDER
    python tests/benchmarks/bench_training.py --shape small --evaluation
    python tests/benchmarks/bench_training.py --device cuda

Each variant runs in a process of its own in each round, and the rounds are interleaved. `--previous` adds the scripts
of another version, for example of `git worktree add FOLDER COMMIT`, in the interpreter `--former_python` if they need
older libraries. Steps after the warm-up are timed as a whole. Equal losses are shown apart: three steps on the same
batches, from the same weights, no dropout.

Floating-point operations of a step, for T = B * L tokens, P positions with logits (T in a dense head, K in a sparse
one), and hidden size H, inner size I: forward 2 per parameter of a matrix and token, backward twice that, so

    6 T layers (4 H^2 + 2 H I)      matrices of the encoder
    12 T layers L H                 attention: scores and weighted values
    6 P (H^2 + H V)                 head: transform and vocabulary
    -6 (T - P) (H^2 + 2 H I)        what the last layer leaves out behind its attention, where it does

Recomputation, softmax, layer norms, embeddings and the optimizer do not count. The share of the peak is this number
by the time of a step and the fastest matrix multiplication of like shapes, timed here in the same backend.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import children
import material
import ours
import report
import stock


@dataclass
class Variant:
    """What is measured: `flags` and `environment` of our script, changes to its module or to what it has built."""

    backends: str = "torch flax"
    side: str = "ours"
    flags: list = field(default_factory=list)
    environment: dict = field(default_factory=dict)
    patches: list = field(default_factory=list)  # Functions of the imported script, called before its `main`.
    changes: list = field(default_factory=list)  # Functions of the built trainer.
    dense: bool = False  # Logits at every position.
    whole_layers: bool = False  # The last layer computes its unlabelled positions too.
    bf16: bool | None = None  # As asked for, if None.


def stock_collator(run):
    """Make a run collate with the stock collator of its backend, from lists as the stock recipe has them."""
    collator = run.data_collator
    tokenizer, is_special = collator.tokenizer, collator.is_special
    if type(collator).__module__ == ours.SCRIPT["torch"]:
        from transformers import DataCollatorForLanguageModeling

        stock_call = DataCollatorForLanguageModeling(tokenizer)
    else:
        stock_call = stock.recipe("flax").NumpyCollator(tokenizer)

    def call(samples, original):
        rows = [sample["input_ids"] for sample in samples]
        lists = [{"input_ids": row.tolist(), "special_tokens_mask": is_special[row].tolist()} for row in rows]
        return stock_call(lists)

    ours.replace_call(collator, call)


# An ablation is one line here: a technique switched off, or one that is off by default switched on.
VARIANTS = {
    "stock": Variant(side="stock", dense=True),
    "ours": Variant(),
    "ours, huge pages": Variant(backends="flax", environment={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
}
PREVIOUS = {
    "previous": Variant(side="previous"),
}
ABLATIONS = {
    "ours, dense head": Variant(flags=["--dense_head"], dense=True),
    "ours, last layer whole": Variant(
        patches=[lambda script: setattr(script, "find_sparse_start", lambda *args: "encoder")], whole_layers=True
    ),
    "ours, stock collator": Variant(changes=[stock_collator]),
    "ours, 2 data workers": Variant(backends="torch", flags=["--dataloader_num_workers", "2"]),
    "ours, torch.compile": Variant(backends="torch", flags=["--torch_compile"]),
    "ours, no dropout": Variant(flags=["--dropout_rate", "0"]),
}
LINE_VARIANTS = {"ours, group_by_length": Variant(flags=["--group_by_length"])}
FULL_PRECISION = {"stock, fp32": Variant(side="stock", dense=True, bf16=False)}
ALL = {**VARIANTS, **PREVIOUS, **ABLATIONS, **LINE_VARIANTS, **FULL_PRECISION}

# (backend, shape, bf16): (tokens/s, peak memory), ratios to the stock recipe on a CPU.
TARGETS = {
    ("torch", "small", False): (2.0, 0.70),
    ("torch", "small", True): (3.0, None),
    ("flax", "small", False): (1.8, None),
    ("torch", "base", False): (1.2, None),
    ("flax", "base", False): (1.2, None),
}
FLAX_TO_TORCH = 0.85  # With huge pages.
EVALUATION_TARGET = 2.0


# ---------------------------------------------------------------------------------------------------------------------
# In a child
# ---------------------------------------------------------------------------------------------------------------------
def measure(spec):
    """Do what a spec says and return the measurements."""
    if spec["kind"] == "model":
        return material.write_model(spec["model"], spec["shape"], spec["tokenizer"]) or {}
    if spec["kind"] == "peak":
        return matrix_peak(spec)
    if spec["side"] == "stock":
        return getattr(stock, spec["kind"])(spec)
    if spec["kind"] == "train":
        return ours.train(spec, ALL[spec["variant"]])
    return getattr(ours, spec["kind"])(spec)


def matrix_peak(spec):
    """Return {"TxHx4H": FLOP/s} of matrix multiplications with the shapes of a step."""
    shape = material.SHAPES[spec["shape"]]
    tokens, hidden = spec["batch"] * spec["length"], shape["hidden_size"]
    sizes = [(tokens, hidden, hidden), (tokens, hidden, 4 * hidden), (tokens, 4 * hidden, hidden)]
    sizes += [(8 * round(tokens * 0.15 / 8), hidden, material.VOCABULARY)]
    timed = torch_product if spec["backend"] == "torch" else flax_product
    rates = {}
    for rows, inner, columns in sizes:
        product = timed(rows, inner, columns, spec)
        product(3)
        start = time.perf_counter()
        product(3)
        count = max(3, int(3 / (time.perf_counter() - start)))  # About a second.
        start = time.perf_counter()
        product(count)
        rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns * count / (time.perf_counter() - start)
    return rates


def torch_product(rows, inner, columns, spec):
    """Return a function that multiplies two matrices n times and waits."""
    import torch

    kind = {"dtype": torch.bfloat16 if spec["bf16"] else torch.float32, "device": spec["device"]}
    left, right = torch.randn(rows, inner, **kind), torch.randn(columns, inner, **kind)

    def product(count):
        for _ in range(count):
            torch.nn.functional.linear(left, right)
        if spec["device"] == "cuda":
            torch.cuda.synchronize()

    return product


def flax_product(rows, inner, columns, spec):
    """Return a function that multiplies two matrices n times and waits."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.bfloat16 if spec["bf16"] else jnp.float32
    left, right = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
    multiply = jax.jit(jnp.matmul)

    def product(count):
        for _ in range(count):
            result = multiply(left, right)
        result.block_until_ready()

    return product


# ---------------------------------------------------------------------------------------------------------------------
# In the parent
# ---------------------------------------------------------------------------------------------------------------------
def parse_args():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", choices=["torch", "flax", "both"], default="both")
    parser.add_argument("--shape", choices=list(material.SHAPES), help="default: small, on cuda base")
    parser.add_argument(
        "--work", help="batch x length, several with commas (default 16x128, base 8x128, cuda 64x128,32x512)"
    )
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="default: on cuda only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="measured steps (default 10, base 6, lines 25, cuda 50)")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before, not measured")
    parser.add_argument("--ablation", action="store_true", help="techniques switched off one by one as well")
    children.add_previous_option(parser)
    parser.add_argument("--variants", help="only these, separated by ; (stock is needed for ratios)")
    parser.add_argument("--mode", choices=["concat", "lines"], default="concat")
    parser.add_argument("--evaluation", action="store_true", help="measure evaluation instead of training")
    parser.add_argument("--train_file", help="real text instead of the generated one")
    parser.add_argument("--validation_file", help="default: train_file")
    parser.add_argument("--tokenizer", help="folder of a real tokenizer of 30,522 tokens")
    parser.add_argument("--name", help="of the report (default: made of the options)")
    args = parser.parse_args()
    args.shape = args.shape or ("base" if args.device == "cuda" else "small")
    args.bf16 = args.device == "cuda" if args.bf16 is None else args.bf16
    few = 25 if args.mode == "lines" else 6 if args.shape == "base" else 10
    args.steps = args.steps or (50 if args.device == "cuda" else few)
    default = "64x128,32x512" if args.device == "cuda" else "8x128" if args.shape == "base" else "16x128"
    args.work = [tuple(map(int, work.split("x"))) for work in (args.work or default).split(",")]
    args.backends = ["torch", "flax"] if args.backend == "both" else [args.backend]
    return args


def report_name(args):
    """Return the file name of the report."""
    parts = ["evaluation" if args.evaluation else "training", args.shape, args.device]
    parts += [args.backend] if args.backend != "both" else []
    parts += ["bf16"] if args.bf16 and args.device == "cpu" else []
    parts += ["lines"] if args.mode == "lines" else []
    return args.name or "_".join([*parts, *(["ablation"] if args.ablation else [])])


def chosen_variants(args, backend):
    """Return the names of the variants to measure, in the order in which they take turns."""
    names = {**VARIANTS, **(FULL_PRECISION if args.bf16 and args.device == "cpu" else {})}
    names |= PREVIOUS if args.previous else {}
    names |= LINE_VARIANTS if args.mode == "lines" else {}
    names |= ABLATIONS if args.ablation else {}
    wanted = [name.strip() for name in args.variants.split(";")] if args.variants else names
    return [name for name in wanted if backend in ALL[name].backends.split()]


class Bench:
    """Runs children on one set of material and keeps their results in a report."""

    def __init__(self, args, made, folder, batch, length):
        self.args, self.report, self.folder, self.batch, self.length = args, made, folder, batch, length
        self.work = f"{batch}x{length}"
        self.environment = {name: str(folder / name.lower()) for name in ("HF_HOME", "HF_DATASETS_CACHE")}
        self.environment |= {"HF_HUB_OFFLINE": "1", "MLM_DEBUG": "1", "TQDM_MININTERVAL": "10"}
        if args.device == "cpu":
            self.environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        samples = args.steps * batch
        self.spec = {"shape": args.shape, "batch": batch, "length": length, "mode": args.mode, "samples": None}
        self.spec |= {"bf16": args.bf16, "device": args.device, "steps": args.steps, "warm_up": args.warm_up}
        self.spec |= {"model": str(folder / "model"), "tokenizer": args.tokenizer}
        if args.mode == "lines":  # The second of two passes over the same lines is measured, all shapes compiled.
            self.spec |= {"samples": samples, "warm_up": args.steps}
        self.write_texts(samples)

    def write_texts(self, samples):
        """Make or name the files with enough text for the steps of training, or the samples of evaluation."""
        needed = 7e-6 * self.length * (4 * samples if self.args.evaluation else samples + 8 * self.batch)
        for split, seed in (("train", 1), ("validation", 2)):
            given = self.args.train_file if split == "train" else self.args.validation_file or self.args.train_file
            large = self.args.evaluation == (split == "validation")
            path = self.folder / f"{split}-{self.work}.txt"
            if given:
                text = Path(given).read_text(encoding="utf-8")
                path.write_text(text * (1 + int(needed * 1e6 / len(text)) if large else 1), encoding="utf-8")
            else:
                material.write_text(path, max(0.2, needed) if large else 0.2, seed)
            self.spec[f"{split}_file"] = str(path)

    def run(self, backend, name, kind, index, **changes):
        """Run one child and report its result; returns it."""
        variant = ALL[name]
        spec = {**self.spec, "backend": backend, "variant": name, "side": variant.side, "kind": kind, **changes}
        spec["bf16"] = self.args.bf16 if variant.bf16 is None else variant.bf16
        spec["scripts"] = self.args.previous if variant.side == "previous" else None
        spec["python"] = children.former_python(self.args, variant.side, backend)
        result = children.run_child(spec, self.folder, {**self.environment, **variant.environment})
        if kind != "tokenize" or "error" in result:
            self.report.add(result, work=self.work, backend=backend, variant=name, kind=kind, round=index)
        return result

    def prepare(self):
        """Write the model, fill the `datasets` caches, time the matrix products and compare the losses."""
        spec = {**self.spec, "kind": "model"}
        if not (self.folder / "model").exists():
            error = children.run_child(spec, self.folder, self.environment).get("error")
            if error:
                raise SystemExit(f"no model could be made: {error}")
        for backend in self.args.backends:
            for side in ("stock", "ours", *(PREVIOUS if self.args.previous else ())):
                self.run(backend, side, "tokenize", 0)
            if self.args.mode == "concat" and not self.args.evaluation:
                spec = {**self.spec, "kind": "peak", "backend": backend}
                peak = children.run_child(spec, self.folder, self.environment)
                self.report.add(peak, work=self.work, backend=backend, kind="peak")
                self.compare_losses(backend)

    def compare_losses(self, backend):
        """Report the losses of three steps of either side."""
        batches = material.write_batches(self.folder / f"{self.work}.npz", 3, self.batch, self.length)
        for side in ("stock", "ours"):
            changes = {"model": self.spec["model"] + "-still", "batches": batches, "steps": 3, "samples": None}
            self.run(backend, side, "losses", 0, **changes)

    def rounds(self):
        """Run all variants in turns."""
        for index in range(self.args.rounds):
            for backend in self.args.backends:
                for name in chosen_variants(self.args, backend):
                    if self.args.evaluation:
                        samples = self.args.steps * self.batch
                        self.run(backend, name, "evaluate", index, samples=samples, passes=2)
                        if index == 0:
                            self.run(backend, name, "evaluate", "4N", samples=4 * samples, passes=1)
                    else:
                        self.run(backend, name, "train", index)
                    self.summarize()

    def summarize(self):
        """Fill the tables of the report with what there is."""
        tables, work = self.report.tables, f"{self.work} tokens"
        if self.args.evaluation:
            tables[f"Evaluation, {work}"] = self.evaluation_rows()
        else:
            tables[f"Training, {work}"] = self.training_rows()
            if self.args.mode == "concat":
                losses = [row for backend in self.args.backends for row in self.loss_rows(backend)]
                tables[f"Losses of the first steps, {work}"] = losses
                tables[f"Matrix products, {work}"] = self.peak_rows()
        self.report.save()

    def training_rows(self):
        """Return a row per backend and variant."""
        rows = []
        for backend in self.args.backends:
            for name in chosen_variants(self.args, backend):
                rows.append(self.training_row(backend, name))
        if len(self.args.backends) == 2:
            flax, torch = (
                self.report.values("tokens_per_second", work=self.work, backend=backend, variant=name, kind="train")
                for backend, name in (("flax", "ours, huge pages"), ("torch", "ours"))
            )
            found = report.ratios(flax, torch)
            rows.append(
                {"backend": "flax / torch", "variant": "ours, flax with huge pages", "ratio": report.spread(found)}
            )
            rows[-1]["target"] = report.verdict(found, FLAX_TO_TORCH) if self.args.device == "cpu" else ""
        return rows

    def training_row(self, backend, name):
        """Return the row of one variant."""
        keys = {"work": self.work, "backend": backend, "kind": "train"}
        error = self.report.error(variant=name, **keys)
        row = {"backend": backend, "variant": name}
        speed, memory, device, padding, seconds = (
            self.report.values(metric, variant=name, **keys)
            for metric in "tokens_per_second peak_memory peak_device_memory padding_share seconds_per_step".split()
        )
        base = {
            metric: self.report.values(metric, variant="stock", **keys)
            for metric in ("tokens_per_second", "peak_memory", "peak_device_memory")
        }
        targets = (None, None)
        if name == "ours" and self.args.device == "cpu" and self.args.mode == "concat":
            targets = TARGETS.get((backend, self.args.shape, self.args.bf16), targets)
        faster = report.ratios(speed, base["tokens_per_second"])
        smaller = report.ratios(memory, base["peak_memory"])
        row |= {"tokens/s": report.spread(speed.values(), digits=0) or f"failed: {error}"}
        row |= {"ratio": report.spread(faster), "target": report.verdict(faster, targets[0])}
        row |= {"peak GiB": report.spread(memory.values(), 2**-30), "memory ratio": report.spread(smaller)}
        row |= {"memory target": report.verdict(smaller, targets[1], at_least=False)}
        if device:
            row["device GiB"] = report.spread(device.values(), 2**-30)
            row["device ratio"] = report.spread(report.ratios(device, base["peak_device_memory"]))
        if self.args.mode == "lines":
            compiled = self.report.values("compilations_while_measured", variant=name, **keys)
            row["padding"] = report.spread(padding.values(), 100, 1) + " %"
            row["compiled while measured"] = report.spread(compiled.values(), digits=0)
        elif seconds:
            row |= self.share_of_peak(backend, name, statistics.median(seconds.values()))
        return row

    def share_of_peak(self, backend, name, seconds):
        """Return the columns about floating-point operations; see the top of this file."""
        flop = self.flop_per_step(ALL[name])
        row = {"GFLOP a step": f"{flop / 1e9:,.0f}", "GFLOP/s": f"{flop / seconds / 1e9:,.0f}"}
        rates = self.peak_rates(backend)
        if rates and ALL[name].bf16 is None:
            row["share of peak"] = f"{flop / seconds / max(rates.values()):.0%}"
        return row

    def flop_per_step(self, variant):
        """Return the floating-point operations of a training step; the formula is at the top of this file."""
        shape = material.SHAPES[self.args.shape]
        layers, hidden, inner = (shape[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        tokens = self.batch * self.length
        positions = tokens if variant.dense else 0.15 * tokens
        whole = variant.dense or variant.whole_layers
        encoder = 6 * tokens * layers * (4 * hidden**2 + 2 * hidden * inner)
        attention = 12 * tokens * layers * self.length * hidden
        left_out = 0 if whole else 6 * (tokens - positions) * (hidden**2 + 2 * hidden * inner)
        return encoder - left_out + attention + 6 * positions * (hidden**2 + hidden * material.VOCABULARY)

    def peak_rates(self, backend):
        """Return {shape: FLOP/s} of the timed matrix products."""
        for sample in self.report.samples:
            if (sample["work"], sample["backend"], sample["kind"]) == (self.work, backend, "peak"):
                return {name: value for name, value in sample.items() if "x" in name and name != "work"}
        return {}

    def peak_rows(self):
        """Return the rates of the matrix products."""
        rows = []
        for backend in self.args.backends:
            rates = self.peak_rates(backend)
            if not rates:
                error = self.report.error(kind="peak", backend=backend, work=self.work)
                rows.append({"backend": backend, "product": "", "GFLOP/s": f"failed: {error}"})
            for name, rate in rates.items():
                rows.append({"backend": backend, "product": name, "GFLOP/s": f"{rate / 1e9:,.0f}"})
        return rows

    def loss_rows(self, backend):
        """Return the losses of both sides and their largest relative difference."""
        rows, found = [], {}
        for side in ("stock", "ours"):
            keys = {"work": self.work, "backend": backend, "kind": "losses", "variant": side}
            found[side] = self.report.values("losses", **keys).get(0)
            shown = " ".join(f"{loss:.5f}" for loss in found[side]) if found[side] else self.report.error(**keys)
            rows.append({"backend": backend, "variant": side, "losses, dropout 0, same batches and weights": shown})
        if all(found.values()):
            difference = max(abs(a - b) / a for a, b in zip(found["stock"], found["ours"]))
            rows[-1]["largest difference"] = f"{difference:.1e}"
        return rows

    def evaluation_rows(self):
        """Return a row per backend and variant."""
        rows = []
        for backend in self.args.backends:
            base = {"work": self.work, "backend": backend, "kind": "evaluate"}
            for name in chosen_variants(self.args, backend):
                speed = self.report.values("tokens_per_second", variant=name, **base)
                large = speed.pop("4N", None) and self.report.values("peak_memory", variant=name, **base)["4N"]
                memory = self.report.values("peak_memory", variant=name, **base)
                memory.pop("4N", None)
                found = report.ratios(speed, self.report.values("tokens_per_second", variant="stock", **base))
                target = EVALUATION_TARGET if name == "ours" and self.args.device == "cpu" else None
                samples = self.args.steps * self.batch
                row = {"backend": backend, "variant": name}
                row["tokens/s"] = report.spread(speed.values(), digits=0)
                row["tokens/s"] = row["tokens/s"] or f"failed: {self.report.error(variant=name, **base)}"
                row |= {"ratio": report.spread(found), "target": report.verdict(found, target)}
                row |= {f"peak GiB, {samples} samples": report.spread(memory.values(), 2**-30, 3)}
                row |= {f"peak GiB, {4 * samples} samples": report.spread([large] if large else [], 2**-30, 3)}
                rows.append(row)
        return rows


def main():
    """Run the benchmark."""
    children.child_main(measure)
    args = parse_args()
    precision = "bf16" if args.bf16 else "fp32"
    what = "Evaluation" if args.evaluation else "Training"
    title = f"{what}, BERT {args.shape}, {args.device}, {precision}" + (", lines" if args.mode == "lines" else "")
    made = report.Report(report_name(args), title, vars(args) | {"train_file": bool(args.train_file)})
    if args.bf16 and "flax" in args.backends:
        made.notes.append("The stock Flax loss takes the softmax of bf16 logits, ours of fp32 ones: the losses differ.")
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        for batch, length in args.work:
            bench = Bench(args, made, folder, batch, length)
            bench.prepare()
            bench.rounds()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(made.markdown())


if __name__ == "__main__":
    main()
