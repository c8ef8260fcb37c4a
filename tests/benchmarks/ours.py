"""Every place where the benchmarks touch the two scripts. They run the real `main`, watched from outside:

- `main(argv)`, and the environment that the scripts set when they are started as programs;
- the trainer (`build_trainer` / `MaskedLMTrainer`), and its `data_collator`, called once per batch;
- the `tqdm` bar "Training" of run_mlm_flax.py, which advances once per step;
- `evaluate` (a method in run_mlm_flax.py), and `tokenize_datasets`.
"""

import importlib
import os
import runpy
import sys
import time

import children
import material

SCRIPT = {"torch": "run_mlm", "flax": "run_mlm_flax"}
PROGRAM_ENVIRONMENT = {"torch": {"USE_TF": "0"}, "flax": {"USE_TORCH": "0"}}
BUILD = {"torch": "build_trainer", "flax": "MaskedLMTrainer"}
# The stock Flax recipe has a linear schedule and no clipping. We clip when timed (more work), not for equal losses.
SAME_RECIPE = {"torch": [], "flax": ["--lr_scheduler_type", "linear"]}
SAME_LOSSES = {"torch": [], "flax": ["--max_grad_norm", "0", "--logging_steps", "1"]}


def load(backend):
    """Import a script as its program would start."""
    os.environ.update(PROGRAM_ENVIRONMENT[backend])
    return importlib.import_module(SCRIPT[backend])


def arguments(spec):
    """Return the flags that stand for a spec, other than what to do."""
    flags = ["--model_name_or_path", spec["model"], "--train_file", spec["train_file"]]
    flags += ["--validation_file", spec["validation_file"], "--output_dir", os.path.join(spec["child_folder"], "out")]
    flags += ["--max_seq_length", spec["length"], "--line_by_line", "true" if spec["mode"] == "lines" else "false"]
    flags += ["--train_batch_size", spec["batch"], "--eval_batch_size", spec["batch"]]
    flags += ["--bf16"] if spec["bf16"] else []
    if (spec["side"], spec["backend"]) != ("previous", "flax"):  # Commit 794b03a does not know the flag there.
        flags += ["--disable_tqdm", "false"]  # The bar of run_mlm_flax.py tells of its steps.
    flags += ["--use_cpu"] if spec["backend"] == "torch" and spec["device"] == "cpu" else []
    return [str(flag) for flag in [*flags, *SAME_RECIPE[spec["backend"]]]]


def wait_for_device(backend):
    """Return a function that blocks until the device has nothing left to do."""

    def wait():
        if backend == "torch":
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
        else:
            import jax

            jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])

    return wait


def replace_call(collator, call):
    """Make a collator answer `call(samples, original)` instead, all else as it was."""
    original = collator.__call__

    def replaced(self, samples, *args, **kwargs):
        return call(samples, lambda samples: original(samples, *args, **kwargs))

    collator.__class__ = type("Watched", (type(collator),), {"__call__": replaced})


def torch_callback(clock):
    """Return a `TrainerCallback` that tells the clock of each step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Runs after the callbacks of the Trainer."""

        def on_step_end(self, args, state, control, **kwargs):
            """Note the end of a step."""
            clock.step_done()

    return Watch()


def watched_bar(bar, clock, mark):
    """Return a subclass of a tqdm class that tells the clock of each item done, in bars with this name or length."""

    class Watched(bar):
        """Counts an item when the loop asks for the next, or says so."""

        def watched(self):
            """Return whether this is the bar of the training."""
            return mark in ((getattr(self, "desc", None) or "").removesuffix(": "), self.total)

        def __iter__(self):
            for item in super().__iter__():
                yield item
                if self.watched():
                    clock.step_done()

        def update(self, n=1):
            if n and self.iterable is None and self.watched():
                clock.step_done()
            return super().update(n)

    return Watched


def run_until_measured(script, argv):
    """Run `main`, which the clock or a watcher leaves by `MeasuredError`."""
    try:
        script.main(argv)
    except children.MeasuredError:
        return
    raise RuntimeError(f"{script.__name__} ended before all was measured: has its training loop changed?")


def train(spec, variant):
    """Time training steps of the real script and return the measurements; `variant` may change what was built."""
    backend = spec["backend"]
    script = load(backend)
    clock = children.Clock(spec["warm_up"], spec["steps"], wait_for_device(backend))
    built = watch_build(script, backend)
    for patch in variant.patches:
        patch(script)

    def watch(run):
        for change in variant.changes:
            change(run)
        replace_call(collator_of(run), lambda samples, original: clock.count_batch(original(samples)))
        if backend == "torch":
            run.add_callback(torch_callback(clock))

    built.append(watch)
    if backend == "flax":
        script.jax.monitoring.register_event_duration_secs_listener(clock.count_compilation)
        script.tqdm = watched_bar(script.tqdm, clock, "Training")
    max_steps = str(spec["warm_up"] + spec["steps"] + 1)  # One more: what is done after the last is not a step.
    flags = [*arguments(spec), "--do_train", "--max_steps", max_steps, *variant.flags]
    if spec["mode"] == "lines":
        flags += ["--max_train_samples", str(spec["samples"])]
    run_until_measured(script, flags)
    if spec["mode"] == "concat":  # Not counted where worker processes collate.
        tokens = spec["batch"] * spec["length"]
        clock.result.setdefault("tokens_per_second", tokens / clock.result["seconds_per_step"])
    return clock.result


def watch_build(script, backend):
    """Return a list: its functions are called with the trainer that the script builds."""
    name = BUILD[backend] if hasattr(script, BUILD[backend]) else "build_run"  # Of run_mlm_flax.py until 9067b02.
    watchers, build = [], getattr(script, name)

    def wrapped(*args, **kwargs):
        run = build(*args, **kwargs)
        for watcher in watchers:
            watcher(run)
        return run

    setattr(script, name, wrapped)
    return watchers


def collator_of(run):
    """Return the collator of a trainer, also of one from before run_mlm_flax.py had the Trainer's names."""
    return run.data_collator if hasattr(run, "data_collator") else run.collator


def losses(spec):
    """Return the losses of training steps on the batches of a file; the model has no dropout."""
    backend = spec["backend"]
    script = load(backend)
    batches, found = material.read_batches(spec["batches"]), []

    def watch(run):
        def call(samples, original):
            return tensors(next(batches)) if backend == "torch" else next(batches)

        replace_call(collator_of(run), call)
        if backend == "torch":
            record_torch_losses(run, found)
        else:
            log = run.log
            run.log = lambda logs, *args: (log(logs, *args), found.append(logs["loss"]) if "loss" in logs else None)

    watch_build(script, backend).append(watch)
    flags = [*arguments(spec), *SAME_LOSSES[backend], "--do_train", "--max_steps", str(spec["steps"])]
    script.main([*flags, "--save_strategy", "no"])
    return {"losses": found[: spec["steps"]]}


def tensors(batch):
    """Return a NumPy batch as int64 tensors."""
    import torch

    return {name: torch.from_numpy(array).long() for name, array in batch.items()}


def record_torch_losses(trainer, found):
    """Append the loss of each training step of a `Trainer` to `found`, unrounded."""
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        found.append(float(loss))
        return loss

    trainer.training_step = training_step


def evaluate(spec):
    """Time the second of two evaluations (one where only memory is wanted) and return the measurements."""
    script = load(spec["backend"])
    owner = script if spec["backend"] == "torch" else script.MaskedLMTrainer
    real, result = owner.evaluate, {}

    def watched(*args):
        for _ in range(spec["passes"]):
            start = time.perf_counter()
            metrics = real(*args)
            seconds = time.perf_counter() - start
        tokens = metrics["eval_samples"] * spec["length"]
        result.update(tokens_per_second=tokens / seconds, eval_loss=metrics["eval_loss"], **children.peak_memory())
        raise children.MeasuredError

    owner.evaluate = watched
    run_until_measured(script, [*arguments(spec), "--do_eval", "--max_val_samples", str(spec["samples"])])
    return result


def tokenize(spec):
    """Tokenize the files of a spec with the real script; return the seconds of `tokenize_datasets` alone, and files."""
    script = load(spec["backend"])
    real, result = script.tokenize_datasets, {}

    def watched(*args, **kwargs):
        start = time.perf_counter()
        tokenized = real(*args, **kwargs)
        seconds = time.perf_counter() - start
        paths = [file["filename"] for split in tokenized.values() for file in split.dataset.cache_files]
        tokens = sum(int(split.lengths.sum()) for split in tokenized.values())
        result.update(seconds=seconds, tokens=tokens, bytes=sum(map(os.path.getsize, paths)))
        return tokenized

    script.tokenize_datasets = watched
    script.main(arguments(spec))
    return result


def first_batch(spec, measure):
    """Train until the first batch is collated; `measure(collate)` is called there and must end the process."""
    script = load(spec["backend"])

    def watch(run):
        replace_call(collator_of(run), lambda samples, original: measure(lambda: original(samples)))

    watch_build(script, spec["backend"]).append(watch)
    script.main([*arguments(spec), "--do_train", "--max_steps", "2"])


def start(backend, flags, folder=None):
    """Run the script of a folder, or of this checkout, as the program that it is."""
    path = os.path.join(folder or children.ROOT, f"{SCRIPT[backend]}.py")
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")
