"""Preprocessing: text to rows of token ids, beside the stock recipe and the bare tokenizer.

    python tests/benchmarks/bench_preprocessing.py
    python tests/benchmarks/bench_preprocessing.py --train_file text.txt --tokenizer FOLDER --rounds 7
    python tests/benchmarks/bench_preprocessing.py --previous FOLDER

Each measurement is a process of its own with an empty cache. The time is that of tokenizing and joining alone, after
the text file is loaded. Then peak memory at two sizes: the high-water mark of resident memory counts the pages of
memory-mapped cache files too, which the system takes back when it needs them; anonymous memory is what was allocated.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import children
import material
import ours
import report
import stock

TEXTS_PER_BATCH = 1000  # As `datasets.map` hands them to the encoders, unless told otherwise.
VARIANTS = {  # Name: what the child does.
    "stock": {"side": "stock"},
    "ours": {"side": "ours", "backend": "torch"},
    "bare tokenizer": {"side": "bare", "read_ids": False},
    "bare tokenizer, ids as Python lists": {"side": "bare", "read_ids": True},
}
# Targets of ours: seconds of stock by seconds of ours, size on disk by stock's.
FASTER, SMALLER = 2.0, 0.4


def measure(spec):
    """Do what a spec says and return the measurements."""
    if spec["side"] == "model":
        return material.write_model(spec["model"], "tiny", spec["tokenizer"]) or {}
    with children.AnonymousPeak() as anonymous:
        result = {"stock": stock.tokenize, "ours": ours.tokenize, "bare": bare_tokenizer}[spec["side"]](spec)
    if spec["side"] != "bare":
        cached = Path(os.environ["HF_DATASETS_CACHE"]).rglob("cache-*.arrow")
        result["bytes_with_intermediate"] = sum(path.stat().st_size for path in cached)
    return {**result, **children.peak_memory(), "peak_anonymous_memory": anonymous.peak}


def bare_tokenizer(spec):
    """Encode the texts with the Rust tokenizer and do nothing with the result."""
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(spec["model"]).backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    paths = [spec["train_file"], spec["validation_file"]]
    texts = [line for path in paths for line in Path(path).read_text(encoding="utf-8").split("\n")]
    start = time.perf_counter()
    for first in range(0, len(texts), TEXTS_PER_BATCH):
        encodings = backend.encode_batch_fast(texts[first : first + TEXTS_PER_BATCH])
        if spec["read_ids"]:
            [encoding.ids for encoding in encodings]
    return {"seconds": time.perf_counter() - start}


def parse_args():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=19, help="text of the timed runs")
    parser.add_argument("--memory_megabytes", default="20,200", help="texts of the memory runs; empty for none")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--train_file", help="real text, repeated as often as needed, instead of the generated one")
    parser.add_argument("--tokenizer", help="folder of a real tokenizer")
    children.add_previous_option(parser)
    parser.add_argument("--name", default="preprocessing_cpu", help="of the report")
    return parser.parse_args()


class Bench:
    """Runs children, each with an empty cache."""

    def __init__(self, args, made, folder):
        self.args, self.report, self.folder = args, made, folder
        self.variants = dict(VARIANTS)
        if args.previous:
            former = {"scripts": args.previous, "python": args.former_python}
            self.variants["previous"] = {**VARIANTS["ours"], **former}
        self.spec = {"model": str(folder / "model"), "tokenizer": args.tokenizer, "length": args.length}
        self.spec |= {"validation_file": self.write_text(0.05, 2), "mode": "concat"}
        self.spec |= {"batch": 8, "bf16": False, "device": "cpu", "backend": None}

    def write_text(self, megabytes, seed=1):
        """Write a text of a size and return its path."""
        path = self.folder / f"{megabytes:g}.txt"
        if self.args.train_file and not path.exists():
            text = Path(self.args.train_file).read_text(encoding="utf-8")
            path.write_text((text * (1 + int(megabytes * 1e6 / len(text))))[: int(megabytes * 1e6)], encoding="utf-8")
        elif not path.exists():
            material.write_text(path, megabytes, seed)
        return str(path)

    def run(self, name, spec, megabytes, kind, index=0):
        """Run one child on a text of a size and report its result."""
        cache = Path(tempfile.mkdtemp(dir=self.folder, prefix="cache-"))
        environment = {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets"), "HF_HUB_OFFLINE": "1"}
        spec = {**self.spec, **spec, "train_file": self.write_text(megabytes)}
        result = children.run_child(spec, self.folder, environment | {"MLM_DEBUG": "1"})
        shutil.rmtree(cache)
        self.report.add(result, variant=name, kind=kind, megabytes=megabytes, round=index)
        self.summarize()

    def run_all(self):
        """Run the rounds, then the memory runs."""
        made = children.run_child({**self.spec, "side": "model"}, self.folder)
        if "error" in made:
            raise SystemExit(f"no tokenizer could be made: {made['error']}")
        for index in range(self.args.rounds):
            for name, spec in self.variants.items():
                self.run(name, spec, self.args.megabytes, "time", index)
        for megabytes in map(float, filter(None, self.args.memory_megabytes.split(","))):
            for name in self.memory_variants():
                self.run(name, self.variants[name], megabytes, "memory")

    def memory_variants(self):
        """Return the names of the variants whose memory is measured."""
        return [name for name, spec in self.variants.items() if spec["side"] != "bare"]

    def summarize(self):
        """Fill the tables of the report with what there is."""
        tables = self.report.tables
        title = f"Tokenize and join {self.args.megabytes:g} MB into rows of {self.args.length} tokens"
        tables[title] = [self.time_row(name) for name in self.variants]
        rows = [self.memory_row(name) for name in self.memory_variants()]
        tables |= {"Peak memory by size of the text": rows} if len(rows[0]) > 1 else {}
        self.report.save()

    def time_row(self, name):
        """Return the row of a variant."""
        seconds, size, everything = (
            self.report.values(metric, variant=name, kind="time")
            for metric in ("seconds", "bytes", "bytes_with_intermediate")
        )
        base, base_size, base_everything, bare = (
            self.report.values(metric, variant=variant, kind="time")
            for metric, variant in (
                ("seconds", "stock"),
                ("bytes", "stock"),
                ("bytes_with_intermediate", "stock"),
                ("seconds", "bare tokenizer"),
            )
        )
        mine = name == "ours"
        faster, near = report.ratios(base, seconds), report.ratios(seconds, bare)
        smaller = report.ratios(size, base_size)
        error = self.report.error(variant=name, kind="time")
        row = {"variant": name, "seconds": report.spread(seconds.values()) or f"failed: {error}"}
        row |= {"stock / this": report.spread(faster), "target": report.verdict(faster, FASTER if mine else None)}
        row |= {"this / bare tokenizer": report.spread(near)}
        row |= {"MB on disk": report.spread(size.values(), 1e-6, 1), "disk ratio": report.spread(smaller)}
        row |= {"disk target": report.verdict(smaller, SMALLER if mine else None, at_least=False)}
        row["MB with intermediate files"] = report.spread(everything.values(), 1e-6, 1)
        row["ratio with them"] = report.spread(report.ratios(everything, base_everything))
        return row

    def memory_row(self, name):
        """Return peak memory of a variant at each size."""
        row = {"variant": name}
        for megabytes in sorted({item["megabytes"] for item in self.report.samples if item["kind"] == "memory"}):
            for metric, title in (("peak_anonymous_memory", "anonymous"), ("peak_memory", "resident")):
                keys = {"variant": name, "kind": "memory", "megabytes": megabytes}
                found = self.report.values(metric, **keys).values()
                shown = report.spread(found, 2**-20, 0) or f"failed: {self.report.error(**keys)}"
                row[f"{megabytes:g} MB of text: {title} MiB"] = shown
        return row


def main():
    """Run the benchmark."""
    children.child_main(measure)
    args = parse_args()
    made = report.Report(args.name, "Preprocessing", vars(args) | {"train_file": bool(args.train_file)})
    made.notes.append("Resident memory counts pages of memory-mapped cache files, which the system can take back.")
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        Bench(args, made, folder).run_all()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(made.markdown())


if __name__ == "__main__":
    main()
