"""Fuzz whole runs: draw flags, run the scripts on a tiny model, and compare runs that must agree.

    python tests/fuzz_runs.py --minutes 60
    python tests/fuzz_runs.py --script run_mlm --kind stop --seed 3 --case 17
    python tests/fuzz_runs.py --set group_by_length=true --set dataloader_drop_last=true

A case is one draw of flags. Each kind of case compares an uninterrupted run with others of the same flags:

- stop: SIGTERM or SIGINT at one to three random moments, to the process or to its group, then the same command again;
- kill: the same with SIGKILL;
- split: the same samples per step with another batch size, accumulation, number of devices or processes; a resume with
  another split; a resume with another global batch size, which must neither repeat nor skip a sample of the epoch;
- backend: the other script;
- repeat: another folder, a cold cache, other numbers of workers, after another run;
- flags: a resume with other flags for reports, evaluations, checkpoints and workers, which must not change the weights.

What is drawn is in section 1 (add a new flag or mode there), what may differ is in section 3. A case that disagrees
prints what differs first and the commands, and keeps its folder; the exit status is then 1. The last lines count.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import INSTALLED, ROOT, SCRIPTS, flags, make_model, pytest_unconfigure, read_json, sentences, write_lines
from forked_runs import (
    SIGNALS,
    SPLIT,
    TIMEOUT,
    TIMES,
    Disagreement,
    Process,
    checkpoints,
    compare,
    compare_backends,
    first_difference,
    free_port,
    read_folder,
)

KINDS = ("stop", "kill", "split", "backend", "repeat", "flags")


# ---- 1. What is drawn -----------------------------------------------------------------------------------------------
def rare(*values):
    """Return choices of a flag that is mostly not given."""
    return (None,) * (3 * len(values)) + values


# Flags of both scripts, which are drawn one by one; None: not given.
FLAGS = {
    "line_by_line": ("true", "false"),
    "max_seq_length": (16, 24),
    "train_batch_size": (2, 3, 4),
    "eval_batch_size": (3, 8),
    "gradient_accumulation_steps": (1, 1, 2, 3),
    "dataloader_drop_last": ("true", "false", "false"),
    "dropout_rate": (0.1, 0.1, 0.1, 0.0),
    "group_by_length": rare("true"),
    "whole_word_mask": rare("true"),
    "pad_to_max_length": rare("true"),
    "dense_head": rare("true"),
    "max_train_samples": (None, 37, 37, 50),
    "max_val_samples": (None, 11),
    "mlm_probability": (None, 0.3),
    "final_mlm_probability": rare(0.1),
    "eval_mlm_probability": rare(0.2),
    "label_smoothing_factor": rare(0.1),
    "preprocessing_num_workers": rare(2, 3),
    "seed": (None, 0, 7),
    "warmup_steps": (None, 3, 0.2),
    "weight_decay": rare(0.1),
    "max_grad_norm": rare(0, 0.5),
    "bf16": rare("true"),
    "new_tokens": rare("file"),
    "logging_steps": (1, 3, 7, 1000),
    "save_total_limit": rare(1, 2),
}
# Settings of both scripts that belong together.
GROUPS = [
    [{"num_train_epochs": epochs} for epochs in (0.7, 1, 1.5, 2, 2, 2.3)]
    + [{"max_steps": steps} for steps in (5, 13, 24)]
    + [{"max_steps": 13, "streaming": "true", "shuffle_buffer_size": size} for size in (7, 30, 1000)],
    [{"validation": "file"}, {"validation": "file"}, {"validation_split_percentage": 20}],
    [{"eval_strategy": "epoch"}, {"eval_strategy": "no"}, {"eval_strategy": "no", "do_eval": "false"}]
    + [{"eval_strategy": "steps", "eval_steps": steps} for steps in (1, 1, 3, 5)],
    [{"save_strategy": "epoch"}, {"save_strategy": "no"}]
    + [{"save_strategy": "steps", "save_steps": steps} for steps in (1, 2, 4, 5)],
]
SCHEDULES = [{"lr_scheduler_type": name} for name in ("linear", "cosine", "constant", "inverse_sqrt")]
SCHEDULES += [
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 4}', "warmup_steps": 2},
]
# Flags and groups of one script.
ONLY = {
    "run_mlm": {
        "logging_strategy": ("steps", "steps", "epoch", "no"),
        "logging_first_step": rare("true"),
        "data_seed": rare(5),
        "eval_on_start": rare("true"),
        "gradient_checkpointing": rare("true"),
        "optim": rare("adafactor", "sgd"),
        "neftune_noise_alpha": rare(5),
        "include_num_input_tokens_seen": rare("true"),
        "eval_delay": rare(4),
        "eval_accumulation_steps": rare(2),
        "save_only_model": rare("true"),
    },
    "run_mlm_flax": {},
}
WORKERS = [{}, {}, {}] + [
    {"dataloader_num_workers": number, "dataloader_persistent_workers": persistent}
    for number in (1, 2)
    for persistent in ("true", "false")
]
BEST = [{}, {}] + [
    {"metric_for_best_model": metric, **more}
    for metric in ("loss", "eval_loss", "perplexity", "accuracy")
    for more in ({}, {"save_strategy": "best"}, *[{"load_best_model_at_end": "true"}] * 3)
]
ONLY_GROUPS = {
    "run_mlm": [
        [
            *SCHEDULES,
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 0.0001}'},
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": 2.0}'},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"patience": 1}'},
        ],
        WORKERS,
        BEST,
    ],
    "run_mlm_flax": [[*SCHEDULES, {}, {"lr_scheduler_type": "constant * linear_warmup", "warmup_steps": 4}]],
}
# Settings that each case of a kind has, whatever is drawn.
EXACT = {"dropout_rate": 0.0, "bf16": None}  # Dropout depends on split and backend; rounding shows in bfloat16.
FIXED = {
    "stop": {"save_only_model": None},  # Nothing to resume from.
    "kill": {"save_only_model": None},
    # The Trainer counts tokens with padding, which depends on the batch. Rounding may decide which model is the best.
    "split": {
        **EXACT,
        **dict.fromkeys(("neftune_noise_alpha", "include_num_input_tokens_seen", "save_only_model")),
        "load_best_model_at_end": None,
    },
    "backend": {**EXACT, "label_smoothing_factor": None},  # Documented to differ.
    "repeat": {},
    "flags": {"save_only_model": None, "load_best_model_at_end": None},
}
# Flags on which no weights depend.
REPORTS = ("logging_steps", "logging_strategy", "logging_first_step", "do_eval", "eval_strategy", "eval_steps")
REPORTS += ("eval_delay", "eval_on_start", "eval_batch_size", "eval_accumulation_steps", "metric_for_best_model")
REPORTS += ("save_strategy", "save_steps", "save_total_limit", "include_num_input_tokens_seen")
REPORTS += ("dataloader_num_workers", "dataloader_persistent_workers")


def draw(rng, script, kind, given=()):
    """Return random settings that a script accepts, with the `given` ones; `script` None: both scripts accept them."""
    table, groups = dict(FLAGS), list(GROUPS)
    if script:
        table |= ONLY[script]
        groups += ONLY_GROUPS[script]
    else:
        groups.append(SCHEDULES)
    settings = {name: rng.choice(values) for name, values in table.items()}
    for alternatives in groups:
        settings |= rng.choice(alternatives)
    settings |= {**FIXED[kind], **dict(given)}
    make_valid(settings, rng)
    return {name: value for name, value in settings.items() if value is not None}


def make_valid(settings, rng):
    """Change settings that contradict each other."""
    if settings.get("streaming"):
        settings["preprocessing_num_workers"] = None
        settings["max_val_samples"] = settings["max_val_samples"] or 11  # Maybe the first samples of the stream.
    if settings.get("metric_for_best_model"):
        settings |= {"do_eval": "true", "eval_delay": None}
        if settings["eval_strategy"] == "no":
            settings |= {"eval_strategy": "steps", "eval_steps": 3}
    if settings.get("load_best_model_at_end"):
        settings["save_strategy"] = settings["eval_strategy"]
        settings["save_steps"] = settings.get("eval_steps", 1) * rng.choice((1, 2))
    if settings.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        settings |= {"do_eval": "true", "eval_strategy": "epoch", "metric_for_best_model": "loss", "warmup_steps": None}
        settings |= {"save_strategy": "epoch"} if settings.get("load_best_model_at_end") else {}
    if settings.get("lr_scheduler_type") == "polynomial" and settings["warmup_steps"] == 3:
        settings["warmup_steps"] = 0.2  # A run of three steps would be refused.
    if settings.get("lr_scheduler_type") in ("constant", "reduce_lr_on_plateau"):
        settings["warmup_steps"] = None
    if settings.get("do_eval") == "false":
        settings["eval_on_start"] = None


def write_texts(path, texts):
    """Write texts in the format of the file's extension and return the path."""
    if path.suffix == ".jsonl":
        return write_lines(path, [json.dumps({"number": i, "text": text}) for i, text in enumerate(texts)])
    if path.suffix == ".csv":
        return write_lines(path, ["number,text", *(f'{i},"{text}"' for i, text in enumerate(texts))])
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"number": range(len(texts)), "text": texts}), path, row_group_size=25)
        return str(path)
    return write_lines(path, texts)


# ---- 2. The kinds of cases ------------------------------------------------------------------------------------------
class Case:
    """One draw of flags, with text, model and runs in a folder of its own."""

    def __init__(self, script, kind, number, seed, work, given=()):
        self.name = f"{kind} {script or 'both'} {number}"
        self.script, self.kind, self.given = script, kind, given
        self.rng = random.Random(f"{seed} {self.name}")
        self.folder, self.commands = Path(work, self.name.replace(" ", "-")), []
        self.folder.mkdir(parents=True)
        self.settings = self.draw(number)

    def draw(self, number):
        """Draw the settings; write the texts and the model."""
        settings = draw(self.rng, self.script, self.kind, self.given)
        texts = sentences(self.rng.choice((110, 1100, 2500) if self.kind == "repeat" else (60, 110)), seed=number)
        texts[7] = texts[40] = ""
        files_rng = random.Random(f"format {self.name}")  # Of its own, so that the settings of a case stay the same.
        extension = files_rng.choice(("txt", "csv", "jsonl", "parquet"))
        if files_rng.random() < 0.3:  # A long document: encoded in parts, as `SHORT_CALLS` says.
            texts[11] = " ".join(sentences(files_rng.choice((60, 200)), seed=number + 2))
        parts = {"train": texts} if self.rng.random() < 0.8 else {"a": texts[:30], "b": texts[30:]}
        files = {"train_file": [write_texts(self.folder / f"{name}.{extension}", parts[name]) for name in parts]}
        if settings.get("new_tokens"):
            settings["new_tokens"] = write_lines(self.folder / "new_tokens.txt", ["bakes bread", "harbours", "zebra"])
        if settings.pop("validation", None):
            files["validation_file"] = write_lines(self.folder / "validation.txt", sentences(23, seed=number + 1))
        files["model_name_or_path"] = make_model(self.folder / "model", num_hidden_layers=1)
        files["cache_dir"] = str(self.folder / "cache")
        if len(texts) > 110:
            settings["max_steps"] = 5
        return {**files, "do_train": "true", "do_eval": "true", "learning_rate": 1e-3, **settings}

    def read_ahead(self):
        """Return how many samples may be made ready between a signal and the end of the step, and by loader workers."""
        batch, workers = self.settings["train_batch_size"], self.settings.get("dataloader_num_workers", 0)
        return batch * (4 * self.settings["gradient_accumulation_steps"] + 3 * workers + 1)

    def start(self, output, script=None, way=None, **changes):
        """Start a run of the settings with some changes and return its processes; `way` is how steps are split."""
        script = script or self.script
        config = self.folder / "settings.json"
        config.write_text(json.dumps(self.settings, indent=2))
        if way:
            changes |= {"train_batch_size": way.batch, "gradient_accumulation_steps": way.accumulation}
        processes = []
        for environment, joined in places_of(way, script):
            line = [str(config), *flags(output_dir=self.folder / output, **changes, **joined)]
            words = [f"{name}={value}" for name, value in environment.items()]
            self.commands.append(shlex.join([*words, "python", f"{script}.py", *line]))
            log = self.folder / f"{len(self.commands)}-{output}.log"
            processes.append(Process(script, line, log, log.with_suffix(".samples"), environment))
        return processes

    def run(self, output, script=None, way=None, **changes):
        """Run to the end and return the (first) process."""
        processes = self.start(output, script, way, **changes)
        for process in processes:
            process.wait(TIMEOUT)
            if process.status:
                raise Disagreement(f"{output}: status {process.status}: {process.last_line()}")
            process.end()
        return processes[0]


@dataclasses.dataclass
class Interruption:
    """A signal at a random moment: after a share of the time or of the samples of the whole run."""

    number: int
    group: bool
    by_time: bool
    share: float
    delay: float
    times: int

    @classmethod
    def draw(cls, rng, signals):
        """Return a random one."""
        group, by_time, again = (rng.random() < share for share in (0.5, 0.25, 0.2))
        return cls(rng.choice(signals), group, by_time, rng.random(), rng.uniform(0, 0.06), 1 + again)

    def wait(self, process, whole, left):
        """Wait for the moment in a run that has a share `left` of the steps of the whole run."""
        if self.by_time:
            process.wait(self.share * left * whole.seconds)
        else:
            process.wait(TIMEOUT, samples=self.share * left * whole.size())
            process.wait(self.delay)

    def send(self, processes, last_file):
        """Send the signal to all processes, maybe twice; return whether each one has to end with it.

        A run that has written its last file right after the first signal may have ended before it.
        """
        finished = []
        handled = [process.handles_sigterm() and self.number != signal.SIGKILL for process in processes]
        for _ in range(self.times):
            for process in processes:
                process.send(self.number, self.group)
            finished.append(last_file.exists())
            processes[0].wait(self.delay)
        return [handles and not finished[0] for handles in handled]


# Seconds after which a launcher kills what Ctrl-C has not ended: PyTorch ignores it while processes meet.
LAUNCHER_PATIENCE = 30


def interrupted(case, signals):
    """Stop or kill a run at random moments; the last start is left alone. It must end as a run that never stopped."""
    way = case.rng.choice([*[None] * 12, *several(case.script, case.settings)])
    whole, output = case.run("whole", way=way), case.folder / "stopped"
    steps = read_json(case.folder, "whole", "trainer_state.json")["max_steps"]
    for interruption in [Interruption.draw(case.rng, signals) for _ in range(case.rng.randint(1, 3))]:
        processes = case.start("stopped", way=way)
        interruption.wait(processes[0], whole, 1 - max(checkpoints(output), default=0) / steps)
        name = f"{signal.Signals(interruption.number).name}{' to the group' * interruption.group}"
        moment = f"{name} after {time.monotonic() - processes[0].start:.2f} s, {processes[0].size()} bytes of samples"
        case.commands[-1] += f"  # {moment}"
        trained = len(processes[0].trained())
        handled = interruption.send(processes, last_file=output / "README.md")
        meeting = interruption.number == signal.SIGINT and len(processes) > 1 and not any(handled)
        meeting &= not any(process.size() for process in processes) and not (output / "README.md").exists()
        for process in processes:
            process.wait(LAUNCHER_PATIENCE if meeting else TIMEOUT)
            process.end()
        for process, handles in zip(processes, handled):
            if meeting and process.status == -signal.SIGKILL:
                continue
            said = "Stopped by" if process is processes[0] else "stopping after this step"  # Only the first one logs.
            check_status(process, interruption.number, handles, said)
        check_saved(processes[0], output, case.read_ahead())
        if handled[0] and (late := len(processes[0].trained()) - trained) > case.read_ahead():
            raise Disagreement(f"the run goes on for {late} samples after the signal")
        model = "config.json" if case.kind == "kill" else "model.safetensors"  # A kill may leave a part of a model.
        if case.settings["save_strategy"] == "no" and (output / model).exists():
            return  # Without a checkpoint, a folder with a model belongs to a run that is finished.
    case.run("stopped", way=way)
    limit = case.settings.get("save_total_limit", 0) + ("load_best_model_at_end" in case.settings)
    compare(case.folder / "whole", output, checkpoints_of="more" if case.kind == "stop" else "same", limit=limit)


def check_status(process, number, handled, said):
    """Check the status of a process that got a signal.

    `handled`: the script handles the signal, which came in time; `said`: what the process prints when it stops.
    """
    status, name = process.status, signal.Signals(number).name
    if status == 128 + number or (status in (0, -number) and not handled):
        return
    if status == -number and said in process.text():
        return  # A second signal, while Python ends.
    raise Disagreement(f"after {name}{' (handled)' if handled else ''}: status {status}: {process.last_line()}")


# What a process that trains prints when the signal ends another one that does not train yet.
OTHER_ENDED = r"; another process has ended, so no checkpoint is saved|process \d: stopped by a signal"


def check_saved(process, output, read_ahead):
    """Check that a process that was stopped says so, and has lost nothing."""
    said = re.search(r"Stopped by \w+(?:; checkpoint-(\d+) is saved|[\w; ]*)\.", process.text())
    if re.search(OTHER_ENDED, process.text()):
        if len(process.trained()) > read_ahead:
            raise Disagreement("another process ended with the signal, and steps are lost")
    elif not said:
        if process.status > 0:
            raise Disagreement(f"status {process.status}, but the log does not say so")
    elif said[1] and int(said[1]) not in checkpoints(output):
        raise Disagreement(f"{said[0]} But that is not complete")
    elif not said[1] and process.trained() and not (output / "model.safetensors").exists():
        raise Disagreement(f"{said[0]} But this was in the training, and no checkpoint is saved")


Way = collections.namedtuple("Way", "batch accumulation devices processes")


def ways(script, size):
    """Return the ways to split a step of `size` samples."""
    devices = ((1, 1), (2, 2)) if script == "run_mlm" else ((1, 1), (2, 1), (4, 1), (2, 2))
    return [Way(size // d // a, a, d, p) for d, p in devices for a in (1, 2, 3, 4, 6) if size % (d * a) == 0]


def several(script, settings):
    """Return the ways of settings with an even batch size in two processes."""
    batch, accumulation = settings["train_batch_size"], settings["gradient_accumulation_steps"]
    if batch % 2 or (script == "run_mlm_flax" and settings.get("preprocessing_num_workers")):
        return []
    return [way for way in ways(script, batch * accumulation) if way.processes == 2]


def places_of(way, script):
    """Return (environment, flags) of each process of a run."""
    if way is None or way.devices == 1:
        return [({}, {})]
    port = free_port()
    if script == "run_mlm":
        same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [({**same, "RANK": rank, "LOCAL_RANK": rank}, {}) for rank in "01"]
    count = f"--xla_force_host_platform_device_count={way.devices // way.processes}"
    environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}"}
    if way.processes == 1:
        return [(environment, {})]
    joined = {"coordinator_address": f"127.0.0.1:{port}", "num_processes": 2}
    return [(environment, {**joined, "process_id": i}) for i in range(2)]


def split(case):
    """Split the steps of a run otherwise, from the start and from a checkpoint on."""
    size = case.settings.pop("train_batch_size") * case.settings.pop("gradient_accumulation_steps")
    if case.rng.random() < 0.3:
        return resize(case, size)
    size += size % 2
    alone, together = ([way for way in ways(case.script, size) if (way.devices > 1) == many] for many in (False, True))
    first, other, third = (case.rng.choice(found) for found in (alone, together, alone + together))
    if case.script == "run_mlm_flax" and any(way.processes > 1 for way in (first, other, third)):
        case.settings.pop("preprocessing_num_workers", None)  # Refused with several processes.
    same = {"left_out": TIMES + SPLIT, "tolerance": 1e-4}
    case.run("whole", way=first)
    case.run("split", way=other, eval_batch_size=case.rng.choice((2, 5)))
    compare(case.folder / "whole", case.folder / "split", **same)
    if copy_checkpoint(case):
        case.run("resumed", way=third)
        compare(case.folder / "whole", case.folder / "resumed", checkpoints_of="newer", **same)


def copy_checkpoint(case):
    """Copy a checkpoint in the middle of the run "whole" to the output folder "resumed"; return its step, or 0."""
    saved = checkpoints(case.folder / "whole")
    if len(saved) < 2:
        return 0
    step = case.rng.choice(list(saved)[:-1])
    shutil.copytree(saved[step], case.folder / "resumed" / f"checkpoint-{step}")
    return step


def resize(case, size):
    """Resume with another global batch size: each other sample of the epoch is trained, none again."""
    for name in ("dataloader_num_workers", "dataloader_persistent_workers"):  # They read ahead.
        case.settings.pop(name, None)
    if not case.settings.get("streaming"):
        case.settings.pop("max_steps", None)
        case.settings["num_train_epochs"] = 2
    other = case.rng.choice([number for number in (2, 3, 4, 6, 8) if number != size])
    whole = case.run("whole", way=Way(size, 1, 1, 1))
    step = copy_checkpoint(case)
    if not step:
        return
    resumed = case.run("resumed", way=Way(other, 1, 1, 1))
    order, after = whole.trained(), resumed.trained()
    if case.settings.get("streaming"):
        expected = order[step * size :][: len(after)]
        if after[: len(expected)] != expected:
            raise Disagreement(f"behind checkpoint-{step}: samples {after[:4]}..., not {expected[:4]}...")
        return
    state = read_json(case.folder, "whole", f"checkpoint-{step}", "trainer_state.json")
    epoch, done = divmod(step, round(step / state["epoch"]))
    order, after = ([index for number, index in indices if number == epoch] for indices in (order, after))
    before = set(order[: done * size])
    if again := sorted(before & set(after)):
        raise Disagreement(f"behind checkpoint-{step}, epoch {epoch}: samples {again} are trained again")
    left_out = sorted(set(order) - before - set(after))
    if len(left_out) >= (other if case.settings["dataloader_drop_last"] == "true" else 1):
        raise Disagreement(f"behind checkpoint-{step}, epoch {epoch}: samples {left_out} are not trained")


def backend(case):
    """Run both scripts."""
    for script in SCRIPTS:
        case.run(script, script)
    unclipped = case.settings.get("max_grad_norm") == 0  # The Trainer then reports no norm.
    compare_backends(*(case.folder / script for script in SCRIPTS), TIMES + ("grad_norm",) * unclipped)


def repeat(case):
    """Repeat a run with what must not matter."""
    case.run("whole")
    processes, cold = "preprocessing_num_workers", {"cache_dir": case.folder / "cold"}
    variants = [cold, {"overwrite_cache": "true"}]
    if not case.settings.get("streaming"):
        variants += [{processes: case.rng.choice((1, 2, 3))}, {**cold, processes: case.rng.choice((2, 3))}]
    if case.script == "run_mlm":
        variants += [{"dataloader_num_workers": case.rng.choice((0, 1, 3)), "dataloader_persistent_workers": "false"}]
    other = {"max_steps": 2, "line_by_line": "true" if case.settings["line_by_line"] == "false" else "false"}
    for i, variant in enumerate(case.rng.sample(variants, 2)):
        if case.rng.random() < 0.5:
            case.run(f"again-{i}", **other)
            variant = {**variant, "overwrite_output_dir": "true"}
        case.run(f"again-{i}", **variant)
        compare(case.folder / "whole", case.folder / f"again-{i}")


def change_flags(case):
    """Resume with other flags for reports: weights and mean loss stay those of the uninterrupted run."""
    if case.settings.get("lr_scheduler_type") == "reduce_lr_on_plateau":  # The rate depends on the evaluations.
        case.settings["lr_scheduler_type"] = "linear"
        case.settings.pop("lr_scheduler_kwargs", None)
    streamed = {"do_eval": "true"} if "streaming" in case.settings else {}  # Else other samples may be held out.
    case.settings |= streamed
    case.run("whole")
    if not copy_checkpoint(case):
        return
    other = draw(case.rng, case.script, case.kind, case.given)
    case.settings = {name: value for name, value in case.settings.items() if name not in REPORTS}
    case.settings |= {name: other[name] for name in REPORTS if name in other} | streamed
    case.run("resumed")
    folders = [case.folder / name for name in ("whole", "resumed")]
    found = [
        {
            "weights": read_folder(folder, ())["weights"],
            "train_loss": read_json(folder, "train_results.json")["train_loss"],
        }
        for folder in folders
    ]
    if difference := first_difference(*found, 0.0, "output_dir"):
        raise Disagreement(difference)


CASES = {
    "stop": lambda case: interrupted(case, SIGNALS),
    "kill": lambda case: interrupted(case, (signal.SIGKILL,)),
    "split": split,
    "backend": backend,
    "repeat": repeat,
    "flags": change_flags,
}


# ---- 3. The campaign ------------------------------------------------------------------------------------------------
def run_case(case):
    """Run a case and return whether it agrees; print what differs, and the commands."""
    try:
        CASES[case.kind](case)
    except Disagreement as difference:
        drawn = {name: value for name, value in case.settings.items() if str(case.folder) not in str(value)}
        settings = " ".join(f"{name}={value}" for name, value in drawn.items())
        print(f"\n{case.name}: {difference}\n    " + "\n    ".join([settings, *case.commands]), flush=True)
        return False
    finally:
        for process in list(Process.running):
            process.end()
    shutil.rmtree(case.folder)
    return True


def campaign(arguments, work):
    """Run cases until the time is over or all have run; return {kind and script: [cases, disagreements]}."""
    pairs = [(kind, script) for kind in arguments.kind or KINDS for script in arguments.script or INSTALLED]
    pairs = list(dict.fromkeys((kind, None if kind == "backend" else script) for kind, script in pairs))
    if INSTALLED != SCRIPTS:
        pairs = [pair for pair in pairs if pair[1]]
    counts = {pair: [0, 0] for pair in pairs}
    stop, reported = time.monotonic() + 60 * arguments.minutes, time.monotonic()
    numbers = [arguments.case] if arguments.case is not None else range(math.ceil(arguments.cases / len(pairs)))
    for number in numbers:
        for kind, script in pairs:
            if time.monotonic() > stop:
                return counts
            agrees = run_case(Case(script, kind, number, arguments.seed, work, arguments.set))
            counts[kind, script][0] += 1
            counts[kind, script][1] += not agrees
            if arguments.first and not agrees:
                return counts
            if time.monotonic() > reported + 60:
                reported = time.monotonic()
                total, different = map(sum, zip(*counts.values()))
                print(f"{total} cases, {different} disagree, {(stop - reported) / 60:.0f} minutes left", flush=True)
    return counts


def read_setting(text):
    """Return (name, value) of a setting."""
    name, value = text.split("=", 1)
    return name, int(value) if value.isdigit() else value


def main():
    """Run a campaign and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=SCRIPTS, action="append", help="default: both")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--minutes", type=float, default=60, help="start no case after so many minutes")
    parser.add_argument("--cases", type=int, default=10**6, help="run so many cases, of all kinds together")
    parser.add_argument("--case", type=int, help="run the case of this number of each kind")
    parser.add_argument("--first", action="store_true", help="end at the first disagreement")
    parser.add_argument(
        "--set", type=read_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of each case"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the scripts")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.root))
    for script in INSTALLED if "backend" in (arguments.kind or KINDS) else arguments.script or INSTALLED:
        importlib.import_module(script)  # Once, for all children.
    work = Path(tempfile.mkdtemp(prefix="mlm-fuzz-"))
    print(f"seed {arguments.seed}, folder {work}", flush=True)
    counts = campaign(arguments, work)
    for (kind, script), (cases, different) in counts.items():
        print(f"{kind} {script or 'both'}: {cases} cases, {different} disagreements")
    with contextlib.suppress(OSError):  # Only if it is empty: what disagrees is kept.
        work.rmdir()
    pytest_unconfigure()  # Removes the caches.
    return int(any(different for _, different in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
