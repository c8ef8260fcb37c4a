"""What one of many processes does on the host for each step, and what the devices send each other, with the arithmetic.

    python tests/benchmarks/bench_scaling.py

Times the host's part of a step, `Run.device_batch` of run_mlm_flax.py, as process 0 of 1, 8, 64 and 512 would do it,
32 samples each, no device needed: the processes are simulated by the numbers that JAX is made to say. Beside it the
memory of parameters and optimizer state, and the time of the gradients' all-reduce at a stated link speed.
"""

import argparse
import os
import sys
import time
from unittest import mock

import children
import datasets
import numpy as np
import pyarrow as pa
import report

PARAMETERS = {"22.7 M": 22.7e6, "110 M": 110e6, "340 M": 340e6}
DEVICES = (1, 8, 64, 512)
ROWS, VOCABULARY = 32, 30_522


class Tokenizer:
    """What the collator asks of a tokenizer."""

    mask_token, mask_token_id, pad_token_id, padding_side = "[MASK]", 4, 0, "right"

    @property
    def all_special_ids(self):
        """Return the ids that are never chosen."""
        return [0, 1, 2, 3, 4]

    def __len__(self):
        return VOCABULARY

    def get_vocab(self):
        """Return {token: id}."""
        return {str(i): i for i in range(VOCABULARY)}


def make_data(script, length, mixed):
    """Return 40,000 samples of a length, or of lengths from 8 to it."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, length + 1, 40_000) if mixed else np.full(40_000, length)
    ids = pa.array(generator.integers(5, VOCABULARY, lengths.sum(), dtype=np.uint16))
    rows = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), ids)
    return script.TokenizedDataset(datasets.Dataset(datasets.table.InMemoryTable(pa.table({"input_ids": rows}))))


def host_milliseconds(script, data, length, processes, repeats):
    """Return the milliseconds that one process needs for its part of each batch: its rows, and the length of all."""
    run = mock.Mock(spec=script.Run, selection="encoder", seen_shapes=set(), max_seq_length=length)
    run.collator = script.FlaxDataCollatorForLanguageModeling(Tokenizer())
    run.pad_to_max_length = False
    run.padded_length = lambda longest: script.Run.padded_length(run, longest)
    order, size, found = np.random.default_rng(1).permutation(len(data)), ROWS * processes, []
    with (
        mock.patch.object(script.jax, "device_count", lambda: processes),
        mock.patch.object(script.jax, "process_count", lambda: processes),
        mock.patch.object(script.jax, "process_index", lambda: 0),
    ):
        for i in range(repeats + 2):
            keys = order[np.arange(i * size, (i + 1) * size) % len(order)]
            start = time.perf_counter()
            batch = script.Run.device_batch(run, data, keys, ROWS)
            found.append(1000 * (time.perf_counter() - start))
            if batch["input_ids"].shape[:2] != (1, ROWS):
                raise RuntimeError("this is not the part of one process")
    return found[2:]


def traffic_row(name, parameters, devices, gigabytes):
    """Return what a step of float32 gradients sends and what a device holds."""
    sent = 2 * (devices - 1) / devices * 4 * parameters
    return {
        "parameters": name,
        "devices": devices,
        "sent by a device each step, GB": f"{sent / 1e9:.3f}",
        f"ms at {gigabytes:g} GB/s": f"{1000 * sent / (gigabytes * 1e9):.1f}",
        "weights, gradients and Adam on each device, GB": f"{16 * parameters / 1e9:.2f}",
        "of it, if state were divided among them, GB": f"{16 * parameters / devices / 1e9:.3f}",
    }


def parse_args():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample, at most")
    parser.add_argument("--gigabytes", type=float, default=25, help="a second that a device's link carries")
    parser.add_argument("--name", default="scaling", help="of the report")
    return parser.parse_args()


def main():
    """Run the benchmark."""
    args = parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(children.ROOT))
    import run_mlm_flax as script

    made = report.Report(args.name, "Many devices: one process's part", vars(args))
    rows = []
    for mode, mixed in (("joined", False), ("line by line", True)):
        data = make_data(script, args.length, mixed)
        for processes in DEVICES:
            found = host_milliseconds(script, data, args.length, processes, args.repeats)
            made.add({"milliseconds": found}, mode=mode, processes=processes)
            middle = sorted(found)[len(found) // 2]
            tokens = ROWS * data.num_tokens / len(data) / middle * 1000
            row = {"text": mode, "processes": processes, "samples a step": ROWS * processes}
            row |= {"ms of a process": report.spread(found), "tokens/s of a process": f"{tokens:,.0f}"}
            rows.append(row)
    made.tables[f"Host: {ROWS} samples of up to {args.length} tokens for one device of each process"] = rows
    made.tables["Devices, on paper: all-reduce in a ring, 2 (D - 1) / D x 4 bytes a parameter"] = [
        traffic_row(name, parameters, devices, args.gigabytes)
        for name, parameters in PARAMETERS.items()
        for devices in DEVICES[1:]
    ]
    made.save()
    print(made.markdown())


if __name__ == "__main__":
    main()
