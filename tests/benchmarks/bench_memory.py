"""Tokenize long documents with a script, cached and streamed, and print the peak of memory above the imports.

python tests/benchmarks/bench_memory.py [run_mlm | run_mlm_flax] [megabytes of text]

Counted is the memory of the process itself (RssAnon), not the pages of files that the system keeps for it.
"""

import importlib
import itertools
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # MiB
DOCUMENTS = 0.5, 20  # Megabytes.


def write_documents(path, megabytes, size):
    """Write that much text in documents of a size, one a line: the words of the quickstart corpus in random order."""
    words = (ROOT / "configs/quickstart/train.txt").read_text(encoding="utf-8").split()
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(round(megabytes / size)):
            written = 0
            while written < size * 10**6:
                written += file.write(" ".join(rng.choices(words, k=10_000)) + " ")
            file.write("\n")


def make_tokenizer(folder):
    """Write a WordPiece tokenizer with the words of the quickstart corpus, and return it."""
    words = dict.fromkeys((ROOT / "configs/quickstart/train.txt").read_text(encoding="utf-8").lower().split())
    path = Path(folder, "vocab.txt")
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), encoding="utf-8")
    return transformers.BertTokenizerFast.from_pretrained(folder)


def memory():
    """Return the memory of this process that is no file, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def watch(peak, done):
    """Note the largest memory until `done` is set."""
    while not done.wait(0.005):
        peak[0] = max(peak[0], memory())


def measure(name, folder, path, streaming, line_by_line):
    """Read and tokenize a file as a run does, to the end, and print tokens, seconds and the peak."""
    sys.path.insert(0, str(ROOT))
    script, tokenizer = importlib.import_module(name), make_tokenizer(folder)
    flags = f"--model_type bert --tokenizer_name words --train_file {path} --validation_file {ROOT}/configs/quickstart/"
    flags += f"validation.txt --do_train --max_steps 1000000000 --line_by_line {line_by_line} --cache_dir {folder}/c "
    flags += f"--output_dir unused --shuffle_buffer_size 1000 --streaming {streaming}"
    model_args, data_args, training_args = script.parse_args(flags.split())
    peak, done, start, before = [0], threading.Event(), time.perf_counter(), memory()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    raw = {"train": script.load_raw_datasets(model_args, data_args)["train"]}
    train = script.tokenize_datasets(raw, tokenizer, data_args, 512, training_args)["train"]
    if streaming == "true":
        samples = itertools.takewhile(lambda sample: sample["epoch"] == 0, train.samples(42, 0))
        tokens = sum(len(sample["input_ids"]) for sample in samples)
    else:
        tokens = train.lengths.sum()
    done.set()
    watcher.join()
    print(f"{tokens:,} tokens, {time.perf_counter() - start:.0f} s, {peak[0] - before:.0f} MiB above the imports")


def main():
    """Measure each case in a process of its own; exit with 1 if one is above the limit."""
    if "--child" in sys.argv:
        measure(sys.argv[1], *sys.argv[3:])
        return
    name = sys.argv[1] if len(sys.argv) > 1 else "run_mlm"
    megabytes, above = int(sys.argv[2]) if len(sys.argv) > 2 else 40, False
    for size in DOCUMENTS:
        for streaming, line_by_line in itertools.product(("false", "true"), repeat=2):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "documents.txt")
                write_documents(path, megabytes, size)
                command = [sys.executable, __file__, name, "--child", folder, str(path), streaming, line_by_line]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
            case = ("cached", "streamed")[streaming == "true"], ("joined", "by line")[line_by_line == "true"]
            print(f"documents of {size} MB, {case[0]}, {case[1]}: {done.stdout.strip()}", flush=True)
            above |= int(done.stdout.split()[-5]) > LIMIT
    sys.exit(int(above))


if __name__ == "__main__":
    main()
