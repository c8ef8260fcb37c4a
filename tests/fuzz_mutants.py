"""Break promises on copies of the scripts, one at a time, and show that `fuzz_runs.py` finds each.

    python tests/fuzz_mutants.py [--script run_mlm_flax] [--only dropout] [--minutes 5]

Prints for each mutant the kind of case that found it, the seconds this took and what differed; the exit status is 1 if
one is not found.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from conftest import INSTALLED, ROOT, SCRIPTS


class Mutant(NamedTuple):
    """A change of a text that occurs once in each of some scripts, and the kinds of cases that should find it.

    `settings` are flags that the change needs to matter, if few cases draw them.
    """

    name: str
    scripts: tuple
    old: str
    new: str
    kinds: tuple
    settings: tuple = ()


PYTORCH, FLAX = SCRIPTS[:1], SCRIPTS[1:]
MUTANTS = [
    Mutant(
        "dropout is drawn from a running state",
        PYTORCH,
        "        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))\n",
        "",
        ("stop", "kill"),
    ),
    Mutant(
        "dropout begins anew with each start",
        FLAX,
        "step=self.step, apply_fn=self.apply_fn",
        "step=0, apply_fn=self.apply_fn",
        ("stop", "kill"),
    ),
    Mutant(
        "a stop drops the evaluation of its step",
        PYTORCH,
        "if due.should_evaluate and state.global_step not in evaluated:",
        "if False:",
        ("stop",),
    ),
    Mutant("a stop drops the evaluation of its step", FLAX, "            self.make_up_evaluation()\n", "", ("stop",)),
    Mutant("the sums of the losses are not restored", SCRIPTS, '**run.get("losses", {})', "", ("stop", "kill")),
    Mutant(
        "each tokenizing process cuts rows from a share of the texts",
        SCRIPTS,
        "batches = raw.select(range(0, len(raw), ENCODE_BATCH))  # A row",
        """def encode_share(table):
        return pa.concat_tables(encode(text_item(value.as_py() for value in row) for row in zip(*table.columns)))

    return raw.with_format("arrow").map(
        lambda rows: encode_share(rows),
        batched=True,
        batch_size=ENCODE_BATCH,
        remove_columns=raw.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
    )
    batches = raw.select(range(0, len(raw), ENCODE_BATCH))  # A row""",
        ("repeat",),
        ("line_by_line=false",),
    ),
    Mutant(
        "several processes train duplicates in an incomplete step",
        PYTORCH,
        "keys[0]._replace(labelled=False)",
        'keys[0]._replace(labelled="RANK" in os.environ)',
        ("split",),
    ),
    Mutant(
        "an incomplete step is filled with duplicates",
        FLAX,
        "keys[0]._replace(labelled=False)",
        "keys[0]",
        ("backend",),
    ),
    Mutant(
        "samples are sorted by length before some are dropped",
        SCRIPTS,
        "    if args.drop_last_step:\n        order =",
        """    if args.group_by_length:
        order = group_by_length(order, dataset.lengths, size)
    if args.drop_last_step:
        order =""",
        ("backend",),
        ("group_by_length=true", "line_by_line=true", "dataloader_drop_last=true"),
    ),
    Mutant(
        "each epoch has the same order",
        SCRIPTS,
        "epoch_permutation(args.order_seed, position.epoch, len(dataset))",
        "epoch_permutation(args.order_seed, 0, len(dataset))",
        ("backend",),
    ),
    Mutant(
        "masks follow the number of samples that a worker has seen",
        SCRIPTS,
        'index, self.samples_seen = sample.get("index", self.samples_seen)',
        "index, self.samples_seen = self.samples_seen",
        ("stop", "kill", "repeat"),
    ),
    Mutant(
        "a checkpoint is complete before its optimizer is written",
        FLAX,
        '                with open(os.path.join(folder, "optimizer.msgpack"), "wb") as file:\n',
        """                self.save_state(folder)
                with open(os.path.join(folder, "optimizer.msgpack"), "wb") as file:
                    time.sleep(0.02)
""",
        ("kill",),
        ("save_strategy=steps", "save_steps=1"),
    ),
    Mutant(
        "the optimizer is not restored",
        FLAX,
        "opt_state = serialization.from_bytes(opt_state, file.read())",
        "file.read()",
        ("stop", "kill"),
    ),
    Mutant("the position in the epoch is counted in steps", SCRIPTS, 'run.get("position")', "None", ("split",)),
    Mutant(
        "the falling share of masks begins anew",
        SCRIPTS,
        "keys = [SampleKey(index, epoch, step / last) for index in indices]",
        "keys = [SampleKey(index, epoch, (step - self.first_step) / last) for index in indices]",
        ("stop", "kill"),
        ("final_mlm_probability=0.1", "mlm_probability=0.3"),
    ),
    Mutant(
        "a stop saves no checkpoint",
        PYTORCH,
        "control.should_save, control.should_evaluate, args.save_only_model = True, False, False",
        "self.signals.stop(self.any_signal())",
        ("stop",),
    ),
    Mutant(
        "a limit deletes the newest checkpoints",
        SCRIPTS,
        "for path in others[: max(0, len(found) - limit)]:",
        "for path in reversed(others[-max(0, len(found) - limit) :]):",
        ("stop", "kill"),
        ("save_total_limit=2", "save_strategy=steps", "save_steps=2"),
    ),
    Mutant(
        "a signal to the group ends the loader's workers",
        PYTORCH,
        "base.worker_init_fn = ignore_signals",
        "return loader",
        ("stop",),
    ),
    Mutant(
        "another run's results and checkpoints stay",
        SCRIPTS,
        "        for path in args.old_run:\n            delete(path)\n",
        "",
        ("repeat",),
    ),
    Mutant(
        "a resumed stream reads a block from its beginning",
        SCRIPTS,
        'for place in range(max(0, first - block["first"]), len(read)):',
        "for place in range(len(read)):",
        ("stop", "kill"),
        ("streaming=true", "max_steps=13", "shuffle_buffer_size=30"),
    ),
]


def try_mutant(mutant, script, minutes, work):
    """Run the fuzzer on a mutated copy of a script; print what it finds, and return whether it finds anything."""
    root = Path(tempfile.mkdtemp(dir=work))
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", root)
    text = (root / f"{script}.py").read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        sys.exit(f"{script}: {mutant.name}: the text to change occurs {text.count(mutant.old)} times, not once")
    (root / f"{script}.py").write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    kinds = [word for kind in mutant.kinds for word in ("--kind", kind)]
    settings = [word for setting in mutant.settings for word in ("--set", setting)]
    command = [sys.executable, str(ROOT / "tests" / "fuzz_runs.py"), "--root", str(root), "--script", script]
    start = time.monotonic()
    options = [*kinds, *settings, "--minutes", str(minutes), "--first"]
    process = subprocess.run([*command, *options], capture_output=True, text=True)
    seconds = time.monotonic() - start
    found = re.search(rf"^({'|'.join(mutant.kinds)}) \w+ \d+: .*", process.stdout, re.MULTILINE)
    result = f"found in {seconds:.0f} s: {found[0]}" if found else f"not found in {seconds:.0f} s {process.stderr}"
    print(f"{script}: {mutant.name}: {result}", flush=True)
    return bool(found)


def main():
    """Try the mutants and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=INSTALLED, action="append", help="default: both")
    parser.add_argument("--only", default="", help="mutants whose name has this text")
    parser.add_argument("--minutes", type=float, default=5, help="give a mutant up after this time")
    arguments = parser.parse_args()
    wanted = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    pairs = [(mutant, script) for mutant in wanted for script in mutant.scripts if script in INSTALLED]
    with tempfile.TemporaryDirectory() as work:
        found = [
            try_mutant(mutant, script, arguments.minutes, work)
            for mutant, script in pairs
            if script in (arguments.script or INSTALLED)
        ]
    print(f"{sum(found)} of {len(found)} mutants found")
    return int(not all(found))


if __name__ == "__main__":
    sys.exit(main())
