"""Collators: milliseconds for one batch of 32 x 512 tokens, padded and masked, beside the stock collators.

    python tests/benchmarks/bench_collator.py

Ours is called where the real training loop calls it, with the samples it gets there; the stock collator gets the same
number of samples as its data path gives them: Python lists. Both take turns in one process, one for each backend.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import children
import material
import ours
import report
import stock

TARGET = 5
NAMES = {
    "torch": ("stock", "stock, without special_tokens_mask (the Trainer removes it)", "ours"),
    "flax": ("stock", "ours"),
}


def measure(spec):
    """Time the collators of a backend in turns."""
    if spec["kind"] == "model":
        return material.write_model(spec["model"], "tiny", spec["tokenizer"]) or {}
    functions = dict(zip(NAMES[spec["backend"]], stock_collators(spec)))

    def time_all(collate):
        functions["ours"] = collate
        samples = {name: [] for name in functions}
        for index in range(-2, spec["repeats"]):  # Two to warm up.
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                if index >= 0:
                    samples[name].append(1000 * (time.perf_counter() - start))
        children.finish(spec, samples)

    ours.first_batch(spec, time_all)


def stock_collators(spec):
    """Return functions that collate a stock batch, with and without the mask of special tokens."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    data = stock.load_data({**spec, "samples": spec["batch"]}, tokenizer)["train"]
    samples = [data[i] for i in range(spec["batch"])]
    if spec["backend"] == "flax":
        collator = stock.recipe("flax").NumpyCollator(tokenizer)
        return [lambda: collator([dict(sample) for sample in samples])]
    collator = DataCollatorForLanguageModeling(tokenizer)
    bare = [{name: sample[name] for name in sample if name != "special_tokens_mask"} for sample in samples]
    return [lambda: collator([dict(sample) for sample in samples]), lambda: collator([dict(sample) for sample in bare])]


def parse_args():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--work", default="32x512", help="batch x length")
    parser.add_argument("--tokenizer", help="folder of a real tokenizer")
    parser.add_argument("--name", default="collator_cpu", help="of the report")
    return parser.parse_args()


def main():
    """Run the benchmark."""
    children.child_main(measure)
    args = parse_args()
    made = report.Report(args.name, f"Collators, {args.work} tokens", vars(args))
    batch, length = map(int, args.work.split("x"))
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    text = material.write_text(folder / "text.txt", 1.5e-5 * batch * length + 0.1)
    spec = {"model": str(folder / "model"), "tokenizer": args.tokenizer, "train_file": text, "validation_file": text}
    spec |= {"batch": batch, "length": length, "mode": "concat", "bf16": False, "device": "cpu"}
    spec |= {"repeats": args.repeats}
    environment = {name: str(folder / name.lower()) for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "MLM_DEBUG": "1"}
    try:
        children.run_child({**spec, "kind": "model"}, folder, environment)
        for backend in NAMES:
            result = children.run_child({**spec, "kind": "collators", "backend": backend}, folder, environment)
            for name in NAMES[backend]:
                samples = {"error": result["error"]} if "error" in result else {"milliseconds": result[name]}
                made.add(samples, backend=backend, variant=name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    made.tables["Milliseconds a batch"] = [row for backend in NAMES for row in table_rows(made, backend)]
    made.save()
    print(made.markdown())


def table_rows(made, backend):
    """Return the rows of a backend."""
    rows = []
    for name in NAMES[backend]:
        found, base = (
            dict(enumerate(made.values("milliseconds", backend=backend, variant=variant).get(0, [])))
            for variant in (name, "stock")
        )
        faster = report.ratios(base, found)
        row = {"backend": backend, "variant": name}
        row["ms"] = report.spread(found.values()) or f"failed: {made.error(backend=backend, variant=name)}"
        row |= {"stock / this": report.spread(faster, digits=1)}
        row["target"] = report.verdict(faster, TARGET if name == "ours" else None)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
