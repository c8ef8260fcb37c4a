"""Stream generated text of two sizes through the data path of a script and compare the peaks of memory.

python tests/benchmarks/bench_streaming.py [run_mlm | run_mlm_flax] [megabytes megabytes]
"""

import importlib
import itertools
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[2]


def write_text(path, megabytes):
    """Write that much text, the sentences of the quickstart corpus in random order."""
    lines = (ROOT / "configs/quickstart/train.txt").read_text(encoding="utf-8").splitlines()
    rng, written = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 10**6:
            written += file.write("\n".join(rng.choices(lines, k=10_000)) + "\n")


def word_tokenizer():
    """Return a tokenizer of whole words, the fastest kind: what is measured is not how fast it is."""
    words = dict.fromkeys((ROOT / "configs/quickstart/train.txt").read_text(encoding="utf-8").split())
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def stream(name, path):
    """Make the batches of one pass over a file, as in training, and print how many tokens, the time and the peak."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(name)
    flags = f"--model_type bert --tokenizer_name words --train_file {path} --validation_file {path}"
    flags += " --do_train --streaming --max_steps 1000000000 --line_by_line false --output_dir unused"
    model_args, data_args, training_args = script.parse_args(flags.split())
    raw = script.load_raw_datasets(model_args, data_args)
    tokenizer = word_tokenizer()
    tokenized = script.tokenize_datasets({"train": raw["train"]}, tokenizer, data_args, 512, training_args)
    collator_class = "MaskedLMCollator" if name == "run_mlm" else "FlaxDataCollatorForLanguageModeling"
    collator, tokens, start = getattr(script, collator_class)(tokenizer, seed=42), 0, time.perf_counter()
    samples = itertools.takewhile(lambda sample: sample["epoch"] == 0, tokenized["train"].samples(42))
    while batch := list(itertools.islice(samples, 16)):
        tokens += collator(batch)["input_ids"].shape[0] * 512
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{tokens:,} tokens in {time.perf_counter() - start:.0f} s, peak memory {peak:.0f} MiB", flush=True)


def main():
    """Measure each size in a process of its own and print the ratio of the peaks."""
    name = sys.argv[1] if len(sys.argv) > 1 else "run_mlm"
    if "--child" in sys.argv:
        stream(name, sys.argv[3])
        return
    sizes, peaks = [int(size) for size in sys.argv[2:4]] or [200, 2000], []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in sizes:
            path = Path(folder) / f"{megabytes}.txt"
            write_text(path, megabytes)
            command = [sys.executable, __file__, name, "--child", str(path)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(f"{megabytes} MB of text: {printed}", end="", flush=True)
            peaks.append(float(printed.split()[-2]))
            path.unlink()
    print(f"ratio of the peaks: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
