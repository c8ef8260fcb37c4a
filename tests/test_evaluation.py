"""Evaluation is one number: the mean over all masked tokens of all samples, the same every time and everywhere."""

import math

import datasets
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, flags, make_model, sentences, write_lines

import run_mlm
import run_mlm_flax

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
    return {name: metrics[name] for name in ("eval_loss", "eval_accuracy", "perplexity", "eval_samples")}


def independent_evaluation(folder, validation_file):
    """Return (loss, accuracy) of the plain Transformers model on the collator's batch of all samples."""
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
    return output.loss.item(), hits.double().mean().item()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_scripts_and_plain_transformers_agree(model_type, validation_file, tmp_path):
    folder = train_a_little(tmp_path / "model", tmp_path, model_type)
    loss, accuracy = independent_evaluation(folder, validation_file)
    pytorch = evaluate(run_mlm, folder, validation_file, tmp_path)
    flax = evaluate(run_mlm_flax, folder, validation_file, tmp_path)
    assert pytorch["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert pytorch["eval_accuracy"] == accuracy > 0
    assert flax["eval_loss"] == pytest.approx(pytorch["eval_loss"], rel=1e-5)
    assert flax["eval_accuracy"] == pytorch["eval_accuracy"]
    assert flax["perplexity"] == pytest.approx(pytorch["perplexity"], rel=1e-4)
    for metrics in (pytorch, flax):
        assert metrics["perplexity"] == math.exp(metrics["eval_loss"])
        assert metrics["eval_samples"] == 27


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


def test_the_seed_draws_the_masks(model_folder, validation_file, tmp_path):
    losses = {evaluate(run_mlm, model_folder, validation_file, tmp_path, seed=seed)["eval_loss"] for seed in (1, 2, 3)}
    assert len(losses) == 3
