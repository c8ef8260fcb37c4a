"""What the log says of the data before training is what the batches hold."""

import re

import numpy as np
import pytest
from conftest import flags, make_model, sentences, write_lines
from setups import set_up

LENGTH = 16


@pytest.fixture
def arguments(tmp_path):
    """A run on 90 sentences, some blank lines, some words unknown."""
    lines = [*sentences(90), "", "the § dog § sees .", " "]
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    settings = {"model_name_or_path": model, "output_dir": tmp_path / "o", "max_seq_length": LENGTH}
    settings |= {"train_file": write_lines(tmp_path / "t.txt", lines), "dropout_rate": 0, "do_eval": True}
    settings |= {"validation_file": write_lines(tmp_path / "v.txt", lines[:30]), "train_batch_size": 4, "max_steps": 4}
    return flags(**settings)


def logged(caplog):
    """Return {name: value} of the lines of the summary."""
    return dict(
        re.findall(r"((?:train|validation) (?:data|texts truncated|padding|unknown tokens)) +(.*)", caplog.text)
    )


def batches_of(script, run, split):
    """Return the input ids of the batches that a split will be read in, first epoch."""
    if script.__name__ == "run_mlm":
        loader = run.get_train_dataloader() if split == "train" else run.get_eval_dataloader()
        return [batch["input_ids"].numpy() for batch in loader]
    dataset, rows = run.tokenized[split], run.args.eval_batch_size
    if split == "train":
        order = script.epoch_order(dataset, run.args, run.args.seed, 0)
        keys = script.generate_batch_splits(order, run.args.global_batch_size, drop_last=False)
    else:
        keys = script.generate_batch_splits(np.arange(len(dataset)), rows, drop_last=False)
    steps = [run.batch(dataset, part, len(part)) for part in keys]
    return [step["input_ids"].reshape(-1, step["input_ids"].shape[-1]) for step in steps]


@pytest.mark.parametrize(
    "more",
    [
        {"line_by_line": "true"},
        {"line_by_line": "true", "group_by_length": True},
        {"line_by_line": "true", "pad_to_max_length": True},
        {"line_by_line": "false"},
    ],
)
def test_the_summary_tells_of_the_batches(script, arguments, caplog, more):
    run = set_up(script, [*arguments, *flags(**more, dataloader_drop_last="false")])
    lines, tokenizer = logged(caplog), run.processing_class if script.__name__ == "run_mlm" else run.tokenizer
    for split, count in (("train", 93), ("validation", 30)):
        dataset = (
            {"train": run.train_dataset, "validation": run.eval_dataset}[split]
            if script.__name__ == "run_mlm"
            else run.tokenized[split]
        )
        ids = np.concatenate([dataset[i]["input_ids"] for i in range(len(dataset))])
        joined = more["line_by_line"] == "false"
        texts = count if joined else len(dataset)
        assert lines[f"{split} data"] == f"{texts} texts, {len(dataset)} samples, {len(ids):,} tokens"
        unknown = np.count_nonzero(ids == tokenizer.unk_token_id)
        assert unknown == (2 if split == "train" else 0)
        assert lines[f"{split} unknown tokens"] == f"{unknown / len(ids):.2%}"
        batches = batches_of(script, run, split)
        padding = 1 - len(ids) / sum(batch.size for batch in batches)
        share = float(lines[f"{split} padding"].split("%")[0]) / 100
        # The order of an epoch is another one than that of the expectation, the order of validation is not.
        tolerance = 0.0001 if split == "validation" or joined or "pad_to_max_length" in more else 0.05
        assert share == pytest.approx(padding, abs=tolerance)
        assert (share == 0) == joined


@pytest.mark.parametrize("use_fast", ["true", "false"])
def test_truncated_texts_are_counted_exactly(script, arguments, caplog, tmp_path, use_fast):
    lines = [f"{'a ' * count}." for count in range(20)]  # With [CLS], [SEP] and the full stop: 3 to 22 tokens.
    changed = [*arguments, "--train_file", write_lines(tmp_path / "t.txt", lines)]
    set_up(script, [*changed, *flags(line_by_line="true", use_fast_tokenizer=use_fast)])
    assert logged(caplog)["train texts truncated"] == f"{6 / 20:.2%}"
    caplog.clear()
    set_up(script, [*changed, *flags(line_by_line="true", use_fast_tokenizer=use_fast, max_train_samples=15)])
    assert logged(caplog)["train texts truncated"] == f"{1 / 15:.2%}"
    caplog.clear()
    set_up(script, [*changed, *flags(line_by_line="false", use_fast_tokenizer=use_fast)])
    assert logged(caplog)["train texts truncated"] == "0.00%"


def test_the_summary_of_a_stream_is_that_of_its_first_block(script, arguments, caplog):
    set_up(script, [*arguments, *flags(streaming=True, shuffle_buffer_size=25, line_by_line="true")])
    lines = logged(caplog)
    assert re.fullmatch(r"25 texts, 25 samples, \d+ tokens \(the first block of the stream\)", lines["train data"])
    assert lines["train unknown tokens"] == "0.00%"
    assert lines["validation data"].startswith("30 texts, 30 samples")


def test_the_expected_padding_follows_the_rule(script):
    """A share of many samples, drawn and counted here by brute force."""
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 60, 300_000).astype(np.int32)
    rule = {"shortest": 1, "multiple": 8, "longest": 50}
    lengths = np.minimum(lengths, 50)
    share = script.padding_share(lengths, 16, 1, **rule)
    padded = np.minimum(-(-lengths[: 18_000 * 16].reshape(-1, 16).max(1) // 8) * 8, 50)
    assert share == pytest.approx(1 - lengths[: 18_000 * 16].sum() / (16 * padded.sum()), abs=0.005)
    grouped = script.padding_share(lengths, 16, 16, **rule)
    assert grouped < 0.3 * share
    assert script.padding_share(lengths[:0], 16, 1, **rule) == 0
    assert script.padding_share(lengths[:5], 16, 0, **rule) == 1 - lengths[:5].sum() / (
        5 * min(50, -(-lengths[:5].max() // 8) * 8)
    )
