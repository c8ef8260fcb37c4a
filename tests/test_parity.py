"""One configuration file, two backends, the same numbers; evaluation equals plain Transformers."""

import importlib
import json
import math

import datasets
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, INSTALLED, flags, make_model, read_json, sentences, write_lines

import run_mlm

STEPS = 50


@pytest.fixture
def train(tmp_path):
    """Return a function that trains with a script on one configuration file; the rest overrides it."""
    settings = {
        "model_name_or_path": make_model(tmp_path / "model"),
        "train_file": write_lines(tmp_path / "train.txt", sentences(120)),
        "do_train": True,
        "line_by_line": False,
        "max_seq_length": 16,
        "train_batch_size": 8,
        "max_steps": STEPS,
        "logging_steps": 1,
        "dataloader_drop_last": True,
        "dropout_rate": 0.0,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))

    def run(script, name, **changes):
        output = tmp_path / name
        script.main([str(config), *flags(output_dir=output, **changes)])
        history = read_json(output, "trainer_state.json")["log_history"]
        history = [entry for entry in history if "loss" in entry]
        steps = changes.get("max_steps", STEPS)
        assert [entry["step"] for entry in history] == list(range(1, steps + 1))
        return {name: [entry[name] for entry in history] for name in ("loss", "grad_norm", "learning_rate", "epoch")}

    return run


@pytest.mark.flax
def test_both_backends_give_the_same_numbers_at_every_step(train):
    pytorch, flax = train(run_mlm, "pytorch"), train(importlib.import_module("run_mlm_flax"), "flax")
    assert flax["loss"][0] == pytest.approx(pytorch["loss"][0], rel=1e-5)
    assert flax["loss"] == pytest.approx(pytorch["loss"], rel=1e-3)
    assert flax["grad_norm"][0] == pytest.approx(pytorch["grad_norm"][0], rel=1e-4)
    assert flax["grad_norm"] == pytest.approx(pytorch["grad_norm"], rel=1e-2)
    assert flax["learning_rate"] == pytest.approx(pytorch["learning_rate"], rel=1e-5)
    assert flax["learning_rate"][:6] == pytest.approx([0, 4e-4, 8e-4, 1.2e-3, 1.6e-3, 2e-3])
    assert flax["epoch"] == pytest.approx(pytorch["epoch"])
    assert flax["loss"][-1] < flax["loss"][0] - 0.5


def test_losses_do_not_depend_on_how_a_step_is_split(script, train):
    # Micro-batches hold unequal numbers of masked tokens: a mean over their means would be another number. An epoch
    # ends in a batch that is not full.
    settings = {"dataloader_drop_last": "false", "max_steps": 20}
    whole = train(script, "8x1", **settings)
    splits = ((4, 2), (2, 4)) if script is run_mlm else ((2, 4),)  # In Flax, each one is a compilation.
    for batch_size, accumulation in splits:
        split = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        other = train(script, f"{batch_size}x{accumulation}", **settings, **split)
        assert other["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


DROP = {"dataloader_drop_last": "true"}  # Which is about training alone.


@pytest.fixture
def validation_file(tmp_path):
    """A file of 27 lines: the last batch of 8 is partial."""
    return write_lines(tmp_path / "validation.txt", sentences(27, seed=1))


def train_a_little(folder, tmp_path, model_type):
    """Return a folder with a tiny model that gets some tokens right."""
    arguments = flags(model_name_or_path=make_model(folder, model_type), max_seq_length=16, line_by_line="true")
    arguments += flags(train_file=write_lines(tmp_path / "train.txt", sentences(100)), output_dir=tmp_path / "trained")
    run_mlm.main(arguments + flags(do_train=True, max_steps=40, learning_rate=5e-3, warmup_steps=5))
    return str(tmp_path / "trained")


def evaluate(script, folder, validation_file, tmp_path, **more):
    settings = {"eval_batch_size": 8, "max_seq_length": 16, "line_by_line": "true", **more}
    output = tmp_path / f"{script.__name__}-output"
    arguments = flags(model_name_or_path=folder, validation_file=validation_file, output_dir=output, do_eval=True)
    metrics = script.main(arguments + flags(**settings))
    names = "eval_loss", "eval_accuracy", "perplexity", "eval_samples", "eval_masked_share"
    return {name: metrics[name] for name in names}


def independent_evaluation(folder, validation_file):
    """Return (loss, accuracy, share of masked tokens) of plain Transformers on the collator's batch of all samples."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    raw = datasets.load_dataset("text", data_files={"validation": validation_file})
    tokenized = run_mlm.tokenize_datasets(raw, tokenizer, run_mlm.DataTrainingArguments(line_by_line=True), 16)
    samples = [tokenized["validation"][i] for i in range(27)]
    batch = run_mlm.MaskedLMCollator(tokenizer, seed=42)(samples)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**batch)
    labelled = batch["labels"] != -100
    hits = (output.logits.argmax(-1) == batch["labels"])[labelled]
    return output.loss.item(), hits.double().mean().item(), int(labelled.sum()) / int(batch["attention_mask"].sum())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_scripts_and_plain_transformers_agree(model_type, validation_file, tmp_path):
    folder = train_a_little(tmp_path / "model", tmp_path, model_type)
    loss, accuracy, share = independent_evaluation(folder, validation_file)
    for name in INSTALLED:
        metrics = evaluate(importlib.import_module(name), folder, validation_file, tmp_path)
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["eval_accuracy"] == accuracy > 0
        assert metrics["perplexity"] == math.exp(metrics["eval_loss"])
        assert metrics["eval_samples"] == 27
        assert metrics["eval_masked_share"] == pytest.approx(share)


def test_evaluation_repeats_exactly_and_does_not_depend_on_the_batch_size(
    script, model_folder, validation_file, tmp_path
):
    once = evaluate(script, model_folder, validation_file, tmp_path)
    assert evaluate(script, model_folder, validation_file, tmp_path) == once
    for changes in ({"eval_batch_size": 5}, {"eval_batch_size": 64}, {"pad_to_max_length": "true"}, DROP):
        other = evaluate(script, model_folder, validation_file, tmp_path, **changes)
        assert other == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, DROP])
def test_every_sample_counts(script, model_folder, tmp_path, settings):
    lines = sentences(9, seed=1)
    whole = write_lines(tmp_path / "whole.txt", lines)
    changed = write_lines(tmp_path / "changed.txt", [*lines[:8], "z z z z z z z z z z z z"])  # In the partial batch.
    settings = {"mlm_probability": 0.5, **settings}
    before = evaluate(script, model_folder, whole, tmp_path, **settings)
    after = evaluate(script, model_folder, changed, tmp_path, **settings)
    assert before["eval_loss"] != pytest.approx(after["eval_loss"], rel=1e-6)


def test_an_evaluation_has_the_same_masks_whatever_the_seed(script, model_folder, validation_file, tmp_path):
    losses = {evaluate(script, model_folder, validation_file, tmp_path, seed=seed)["eval_loss"] for seed in (1, 2)}
    assert len(losses) == 1


def test_label_smoothing_reaches_the_loss(script, model_folder, tmp_path):
    path, smoothing = write_lines(tmp_path / "train.txt", sentences(8)), 0.2
    settings = {"model_name_or_path": model_folder, "train_file": path, "validation_file": path, "do_train": True}
    settings |= {"output_dir": tmp_path / "output", "max_seq_length": 16, "line_by_line": "true", "max_steps": 1}
    settings |= {"train_batch_size": 8, "dropout_rate": 0, "logging_steps": 1, "label_smoothing_factor": smoothing}
    script.main(flags(**settings))
    (first, *_) = read_json(tmp_path / "output", "trainer_state.json")["log_history"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    raw = datasets.load_dataset("text", data_files={"train": path})
    tokenized = run_mlm.tokenize_datasets(raw, tokenizer, run_mlm.DataTrainingArguments(line_by_line=True), 16)["train"]
    batch = run_mlm.MaskedLMCollator(tokenizer, seed=42)([tokenized[i] for i in range(8)])
    labelled = batch["labels"] != -100
    with torch.no_grad():
        logits = (
            transformers.AutoModelForMaskedLM.from_pretrained(model_folder).eval()(**batch).logits[labelled].double()
        )
    log_likelihoods, size = logits.log_softmax(-1), logits.shape[-1]
    hit = -log_likelihoods.gather(1, batch["labels"][labelled][:, None])[:, 0]
    if script is run_mlm:  # As in PyTorch: the smoothed part goes to all tokens.
        expected = (1 - smoothing) * hit - smoothing * log_likelihoods.mean(-1)
    else:  # As documented: it goes to the other tokens, and the lowest possible loss is taken off.
        low = smoothing / (size - 1)
        expected = (1 - smoothing) * hit - low * (log_likelihoods.sum(-1) + hit)
        expected += (1 - smoothing) * math.log(1 - smoothing) + smoothing * math.log(low)
    assert first["loss"] == pytest.approx(expected.mean().item(), rel=1e-3)
