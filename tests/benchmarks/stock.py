"""The stock recipes: what users of the well-known example scripts run today, written down anew.

Both backends: list-based tokenize and group maps. The rest is in stock_torch.py and stock_flax.py.
"""

import importlib
import os
import time
from itertools import chain

import children
import material
import ours


def recipe(backend):
    """Return the module of a backend; the other framework is not imported."""
    return importlib.import_module(f"stock_{backend}")


def load_texts(spec):
    """Return the raw `DatasetDict`."""
    from datasets import load_dataset

    return load_dataset("text", data_files={"train": spec["train_file"], "validation": spec["validation_file"]})


def tokenize_texts(raw, tokenizer, length, lines):
    """Return the tokenized `DatasetDict`: Python lists through one map (line by line) or two (joined)."""

    def encode_lines(examples):
        texts = [line for line in examples["text"] if line and not line.isspace()]
        return tokenizer(texts, truncation=True, max_length=length, return_special_tokens_mask=True)

    def encode(examples):
        return tokenizer(examples["text"], return_special_tokens_mask=True)

    def group_texts(examples):
        joined = {name: list(chain(*examples[name])) for name in examples}
        total = len(joined["input_ids"]) // length * length
        return {name: [ids[i : i + length] for i in range(0, total, length)] for name, ids in joined.items()}

    if lines:
        return raw.map(encode_lines, batched=True, remove_columns=["text"])
    return raw.map(encode, batched=True, remove_columns=["text"]).map(group_texts, batched=True)


def load_data(spec, tokenizer):
    """Return the tokenized data cut to as many samples as the spec asks for."""
    data = tokenize_texts(load_texts(spec), tokenizer, spec["length"], spec["mode"] == "lines")
    if spec.get("samples"):
        for split in data:
            data[split] = data[split].select(range(min(spec["samples"], len(data[split]))))
    return data


def tokenize(spec):
    """Tokenize the files of a spec and return the seconds of the maps, and what they leave on disk."""
    from transformers import AutoTokenizer

    tokenizer, raw = AutoTokenizer.from_pretrained(spec["model"]), load_texts(spec)
    start = time.perf_counter()
    data = tokenize_texts(raw, tokenizer, spec["length"], spec["mode"] == "lines")
    seconds = time.perf_counter() - start
    paths = [file["filename"] for split in data.values() for file in split.cache_files]
    return {"seconds": seconds, "bytes": sum(map(os.path.getsize, paths))}


def train(spec):
    """Time training steps and return the measurements."""
    clock = children.Clock(spec["warm_up"], spec["steps"], ours.wait_for_device(spec["backend"]))
    max_steps = spec["warm_up"] + spec["steps"] + 1
    try:
        if spec["backend"] == "torch":
            trainer = recipe("torch").build_trainer(spec, max_steps)
            ours.replace_call(trainer.data_collator, lambda samples, original: clock.count_batch(original(samples)))
            trainer.add_callback(ours.torch_callback(clock))
            trainer.train()
        else:
            run = recipe("flax").FlaxRun(spec, max_steps)
            recipe("flax").jax.monitoring.register_event_duration_secs_listener(clock.count_compilation)
            ours.replace_call(run.collator, lambda samples, original: clock.count_batch(original(samples)))
            run.train(lambda loss: clock.step_done())
    except children.MeasuredError:
        return clock.result
    raise RuntimeError("the stock training ended before all steps were measured")


def losses(spec):
    """Return the losses of training steps on the batches of a file; the model has no dropout."""
    batches, found = material.read_batches(spec["batches"]), []
    if spec["backend"] == "torch":
        trainer = recipe("torch").build_trainer(spec, spec["steps"])
        ours.replace_call(trainer.data_collator, lambda samples, original: ours.tensors(next(batches)))
        ours.record_torch_losses(trainer, found)
        trainer.args.save_strategy = "no"
        trainer.train()
        return {"losses": found[: spec["steps"]]}
    run = recipe("flax").FlaxRun(spec, spec["steps"])
    ours.replace_call(run.collator, lambda samples, original: next(batches))

    def step_done(loss):
        found.append(float(loss[0]))
        if len(found) == spec["steps"]:
            raise children.MeasuredError

    try:
        run.train(step_done)
    except children.MeasuredError:
        return {"losses": found}


def evaluate(spec):
    """Time the last of `passes` evaluations and return the measurements."""
    if spec["backend"] == "torch":
        trainer = recipe("torch").build_trainer(spec)
        run, samples = trainer.evaluate, len(trainer.eval_dataset)
    else:
        flax_run = recipe("flax").FlaxRun(spec)
        run, samples = flax_run.evaluate, len(flax_run.data["validation"])
    for _ in range(spec["passes"]):
        start = time.perf_counter()
        metrics = run()
        seconds = time.perf_counter() - start
    result = {"tokens_per_second": samples * spec["length"] / seconds, "eval_loss": metrics["eval_loss"]}
    return result | children.peak_memory()


def start(backend, model, files, output_dir, steps, batch=8, length=64):
    """Load and train as the stock script does, for a progress bar to watch; `files` is (training, validation)."""
    spec = {"model": model, "train_file": files[0], "validation_file": files[1], "child_folder": output_dir}
    spec |= {"batch": batch, "length": length, "mode": "concat", "bf16": False, "device": "cpu"}
    if backend == "torch":
        recipe("torch").build_trainer(spec, steps).train()
        return
    from tqdm.auto import tqdm

    bar = tqdm(desc="Training", total=steps)
    recipe("flax").FlaxRun(spec, steps).train(lambda loss: bar.update(1))
