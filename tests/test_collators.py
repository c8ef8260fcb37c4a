"""Both collators give the stock collator's batches, with masks that belong to the samples."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer, sentences

import run_mlm
import run_mlm_flax

FlaxCollator = run_mlm_flax.FlaxDataCollatorForLanguageModeling
STOCK_KEYS = {"input_ids", "attention_mask", "labels"}


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path)


@pytest.fixture
def encoded(tokenizer):
    """Five lines as the tokenizer returns them: lists under input_ids, attention_mask and special_tokens_mask."""
    lines = tokenizer(sentences(5), return_special_tokens_mask=True, return_token_type_ids=False)
    return [{name: lines[name][i] for name in lines} for i in range(5)]


def tokenized(script, tokenizer, count=50):
    """Return the `TokenizedDataset` of `count` lines, of unequal lengths."""
    raw = {"train": datasets.Dataset.from_dict({"text": sentences(count)})}
    data_args = script.DataTrainingArguments(line_by_line=True)
    return script.tokenize_datasets(raw, tokenizer, data_args, 16)["train"]


def without(samples, *names):
    """Return the samples without some of their keys."""
    return [{name: value for name, value in sample.items() if name not in names} for sample in samples]


def as_tensors(samples):
    return [{name: torch.tensor(value) for name, value in sample.items()} for sample in samples]


def padded(samples, side="right"):
    """Pad input_ids with 0 by hand: int [B, L]."""
    rows = [np.asarray(sample["input_ids"]) for sample in samples]
    longest = max(map(len, rows))
    width = [(0, longest - len(row)) if side == "right" else (longest - len(row), 0) for row in rows]
    return np.stack([np.pad(row, pad) for row, pad in zip(rows, width)])


@pytest.mark.parametrize(
    "prepare",
    [
        lambda samples: samples,
        lambda samples: without(samples, "special_tokens_mask"),
        lambda samples: as_tensors(samples),
    ],
    ids=["dicts", "no special_tokens_mask", "tensors"],
)
@pytest.mark.parametrize("multiple", [None, 8])
def test_pytorch_collator_is_the_stock_one_from_outside(tokenizer, encoded, prepare, multiple):
    ours = run_mlm.MaskedLMCollator(tokenizer, pad_to_multiple_of=multiple)
    stock = transformers.DataCollatorForLanguageModeling(tokenizer, pad_to_multiple_of=multiple)
    assert isinstance(ours, transformers.DataCollatorForLanguageModeling)
    batch, expected = ours(prepare(encoded)), stock(prepare(encoded))
    assert set(batch) == STOCK_KEYS >= set(expected)
    for name in expected:
        assert isinstance(batch[name], torch.Tensor)
        assert (batch[name].dtype, batch[name].shape) == (expected[name].dtype, expected[name].shape)
    restored = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])
    assert torch.equal(restored[:, : padded(encoded).shape[1]], torch.from_numpy(padded(encoded)))
    if "attention_mask" in expected:
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])


def test_pytorch_collator_has_the_stock_settings():
    ours = {item.name: item.default for item in dataclasses.fields(run_mlm.MaskedLMCollator)}
    stock = {item.name: item.default for item in dataclasses.fields(transformers.DataCollatorForLanguageModeling)}
    assert stock.items() - {("seed", None)} <= ours.items()  # Ours can always be reproduced.


@pytest.mark.parametrize("make", [run_mlm.MaskedLMCollator, FlaxCollator])
def test_a_given_special_tokens_mask_is_obeyed(tokenizer, encoded, make):
    collate = make(tokenizer, mlm_probability=1.0)
    special = [[i % 2 for i in range(len(sample["input_ids"]))] for sample in encoded]
    labels = collate([{**sample, "special_tokens_mask": mask} for sample, mask in zip(encoded, special)])["labels"]
    for row, mask in zip(np.asarray(labels), special):
        assert (row[: len(mask)] == -100).tolist() == [bool(flag) for flag in mask]


@pytest.mark.parametrize("make", [run_mlm.MaskedLMCollator, FlaxCollator])
@pytest.mark.parametrize("name", ["attention_mask", "special_tokens_mask", "continues_word"])
def test_a_mask_of_another_length_is_an_error_also_where_the_sum_is_right(tokenizer, make, name):
    samples = [{"input_ids": [5] * 10, name: [0] * 9}, {"input_ids": [6] * 7, name: [0] * 8}]
    with pytest.raises(ValueError):
        make(tokenizer)(samples)


@pytest.mark.parametrize("make", [run_mlm.MaskedLMCollator, FlaxCollator])
def test_samples_without_a_key_get_masks_of_their_own(tokenizer, make):
    collate = make(tokenizer, mlm_probability=0.5)
    row = {"input_ids": list(range(5, 45))}
    batch = [collate([row] * 4) for _ in range(2)]
    masks = np.concatenate([np.asarray(part["labels"]) != -100 for part in batch])
    assert len({mask.tobytes() for mask in masks}) == 8


def test_flax_collator_has_the_documented_settings(tokenizer):
    collate = FlaxCollator(tokenizer)
    assert (collate.tokenizer, collate.mlm, collate.mlm_probability) == (tokenizer, True, 0.15)
    assert FlaxCollator(tokenizer, False, 0.5).mlm_probability == 0.5
    names = [item.name for item in dataclasses.fields(FlaxCollator)]
    assert names[:3] == ["tokenizer", "mlm", "mlm_probability"]


@pytest.mark.parametrize(("multiple", "width"), [(None, 13), (1, 13), (8, 16), (16, 16)])
def test_flax_collator_pads_to_a_multiple(tokenizer, multiple, width):
    batch = FlaxCollator(tokenizer)([{"input_ids": [2, *[9] * 11, 3]}, {"input_ids": [2, 9, 3]}], multiple)
    for array in batch.values():
        assert array.shape == (2, width) and array.dtype == np.int32
    assert batch["attention_mask"].sum(1).tolist() == [13, 3]
    by_name = FlaxCollator(tokenizer)([{"input_ids": [2, 9, 3]}], pad_to_multiple_of=4)
    assert by_name["input_ids"].shape == (1, 4)


def test_flax_mask_tokens_takes_inputs_and_special_tokens_mask(tokenizer):
    inputs = np.tile(np.arange(5, 45, dtype=np.int32), (50, 1))
    special = np.zeros(inputs.shape, bool)
    special[:, ::2] = True
    given_inputs = inputs.copy()
    hidden, labels = FlaxCollator(tokenizer, mlm_probability=0.5).mask_tokens(inputs, special)
    np.testing.assert_array_equal(inputs, given_inputs)
    assert hidden.dtype == labels.dtype == np.int32
    assert (labels[special] == -100).all() and (hidden[special] == inputs[special]).all()
    chosen = labels != -100
    assert abs(chosen[~special].mean() - 0.5) < 5 * 0.5 / 1000**0.5
    assert (labels[chosen] == inputs[chosen]).all()
    assert (hidden[~chosen] == inputs[~chosen]).all()
    assert 0.6 < (hidden[chosen] == tokenizer.mask_token_id).mean() < 0.95


@pytest.mark.parametrize("make", [run_mlm.MaskedLMCollator, FlaxCollator])
def test_without_mlm_the_labels_are_the_inputs(tokenizer, encoded, make):
    batch = {name: np.asarray(value) for name, value in make(tokenizer, mlm=False)(encoded).items()}
    inputs = padded(encoded)
    np.testing.assert_array_equal(batch["input_ids"], inputs)
    np.testing.assert_array_equal(batch["labels"], np.where(inputs == tokenizer.pad_token_id, -100, inputs))


@pytest.mark.parametrize("make", [run_mlm.MaskedLMCollator, FlaxCollator])
def test_a_tokenizer_without_a_mask_token_is_an_error(tokenizer, make):
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask token"):
        make(tokenizer)
    assert make(tokenizer, mlm=False)([{"input_ids": [5, 6]}])["labels"].tolist() == [[5, 6]]


@pytest.mark.parametrize("make", [run_mlm.MaskedLMCollator, FlaxCollator])
def test_padding_goes_to_the_tokenizers_side(tokenizer, encoded, make):
    samples = [{**sample, "epoch": 0, "index": i} for i, sample in enumerate(encoded)]
    right = {name: np.asarray(value) for name, value in make(tokenizer)(samples).items()}
    tokenizer.padding_side = "left"
    left = {name: np.asarray(value) for name, value in make(tokenizer)(samples).items()}
    for i, sample in enumerate(samples):
        length = len(sample["input_ids"])
        for name, fill in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            np.testing.assert_array_equal(left[name][i, -length:], right[name][i, :length])
            assert (left[name][i, :-length] == fill).all() and (right[name][i, length:] == fill).all()


# Both scripts share this process: JAX and Python warn of a fork beside its threads, which the workers do not use.
@pytest.mark.filterwarnings("ignore:.*fork\\(\\):RuntimeWarning", "ignore:.*fork\\(\\):DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_both_scripts_give_the_same_batches_through_any_data_loader(tokenizer, workers, batch_size):
    dataset = tokenized(run_mlm, tokenizer)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        sampler=range(len(dataset), 2 * len(dataset)),  # The keys of the second epoch.
        collate_fn=run_mlm.MaskedLMCollator(tokenizer, seed=5, length=16),
        num_workers=workers,
    )
    batches = list(loader)
    samples = tokenized(run_mlm_flax, tokenizer)
    everything = FlaxCollator(tokenizer, seed=5)([samples[50 + i] for i in range(50)], length=16)
    for name, array in everything.items():
        np.testing.assert_array_equal(torch.cat([batch[name] for batch in batches]).numpy(), array)
    first = FlaxCollator(tokenizer, seed=5)([samples[i] for i in range(50)], length=16)
    assert (first["labels"] != everything["labels"]).any()
