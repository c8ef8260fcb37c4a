"""Masks follow BERT's rule and belong to the samples; both collators give the stock collator's batches."""

import dataclasses
import math

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import (
    flags,
    make_byte_level_tokenizer,
    make_model,
    make_tokenizer,
    make_unigram,
    optional_module,
    sentences,
    set_up,
    write_lines,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import run_mlm

run_mlm_flax = optional_module("run_mlm_flax")
pytestmark = pytest.mark.shared  # One source in both scripts.

MASK, VOCABULARY = 4, 100
ROWS = st.lists(st.integers(5, VOCABULARY - 1), min_size=1, max_size=40).map(lambda row: np.array(row, np.int32))
few = settings(max_examples=40, deadline=None)


def masked(script, row, key=(0, 0, 0), special=None, **options):
    """Return the inputs and labels of one row."""
    special = np.zeros(len(row), bool) if special is None else special
    return script.mask_tokens(row, special, script.sample_generator(*key), MASK, VOCABULARY, **options)


@pytest.fixture(scope="module")
def collator(tmp_path_factory):
    """A collator with a seed."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return run_mlm.MaskedLMCollator(tokenizer, seed=3, mlm_probability=0.4)


@pytest.fixture
def make(script):
    """The collator class of each script."""
    return script.MaskedLMCollator if script is run_mlm else script.FlaxDataCollatorForLanguageModeling


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_another_seed_epoch_or_index_draws_other_masks(script, changed):
    row = np.arange(200, dtype=np.int32) % (VOCABULARY - 5) + 5
    key = [7, 1, 20]
    before = masked(script, row, key)[1]
    key[changed] += 1
    assert (before != masked(script, row, key)[1]).sum() > 10


@few
@given(ROWS, st.data())
def test_labels_are_the_hidden_tokens_and_special_tokens_are_never_chosen(row, data):
    special = np.array(data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))))
    given_row = row.copy()
    inputs, labels = masked(run_mlm, row, special=special, mlm_probability=0.5)
    np.testing.assert_array_equal(row, given_row)  # The samples are views of the data: never written to.
    chosen = labels != -100
    np.testing.assert_array_equal(labels[chosen], row[chosen])
    np.testing.assert_array_equal(inputs[~chosen], row[~chosen])
    assert not (chosen & special).any()


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 8), st.data())
def test_masks_do_not_depend_on_the_batch(collator, lengths, batch_size, data):
    generator = np.random.default_rng(0)
    samples = [
        {"input_ids": generator.integers(5, 60, length).astype(np.int32), "epoch": 2, "index": 10 * i}
        for i, length in enumerate(lengths)
    ]
    for sample, length in zip(samples, lengths) if data.draw(st.booleans()) else ():
        sample["continues_word"] = generator.random(length) < 0.5  # The first token as well, as in joined rows.
    order = data.draw(st.permutations(range(len(samples))))
    alone = [collator([sample]) for sample in samples]
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = collator([samples[i] for i in rows])
        for place, i in enumerate(rows):
            for name, array in batch.items():
                np.testing.assert_array_equal(array[place, : lengths[i]], alone[i][name][0])
            assert not batch["attention_mask"][place, lengths[i] :].any()
            assert (batch["labels"][place, lengths[i] :] == -100).all()


def test_a_special_token_inside_a_word_is_not_chosen(script):
    row, special = np.arange(5, 9, dtype=np.int32), np.array([False, True, False, False])
    _, labels = masked(script, row, special=special, mlm_probability=1.0, continues_word=np.array([0, 1, 1, 1], bool))
    assert labels.tolist() == [5, -100, 7, 8]


def test_shares_hold_on_a_million_tokens(script):
    length = 10**6
    row = np.full(length, 50, np.int32)
    inputs, labels = masked(script, row, mlm_probability=0.15)
    chosen = labels != -100

    def within_five_sigma(hits, draws, probability):
        return abs(hits - draws * probability) < 5 * math.sqrt(draws * probability * (1 - probability))

    count = int(chosen.sum())
    assert within_five_sigma(count, length, 0.15)
    assert within_five_sigma((inputs[chosen] == MASK).sum(), count, 0.8 + 0.1 / VOCABULARY)
    assert within_five_sigma((inputs[chosen] == 50).sum(), count, 0.1 + 0.1 / VOCABULARY)
    others = inputs[chosen & (inputs != MASK) & (inputs != 50)]
    assert within_five_sigma(len(others), count, 0.1 * (VOCABULARY - 2) / VOCABULARY)
    counts = np.bincount(others, minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    each = np.delete(counts, [MASK, 50])
    assert all(within_five_sigma(hits, len(others), 1 / len(each)) for hits in each)


@pytest.mark.parametrize(("mask", "random", "kept"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_replacement_can_be_all_of_one_kind(script, mask, random, kept):
    row = np.full(1000, 50, np.int32)
    inputs, labels = masked(script, row, mlm_probability=1.0, mask_replace_prob=mask, random_replace_prob=random)
    assert (labels == row).all()
    assert (inputs == MASK).mean() == mask or random
    assert (inputs == 50).mean() == kept or random
    assert len(np.unique(inputs)) > 90 or not random


def test_nothing_is_chosen_at_probability_0_and_all_at_1(script):
    row = np.arange(5, 95, dtype=np.int32)
    inputs, labels = masked(script, row, mlm_probability=0.0)
    assert (labels == -100).all() and (inputs == row).all()
    assert (masked(script, row, mlm_probability=1.0)[1] == row).all()


def test_ids_of_two_bytes_are_masked_as_others(script):
    row = np.arange(5, 95, dtype=np.int32)
    for narrow, wide in zip(masked(script, row.astype(np.uint16)), masked(script, row)):
        assert narrow.dtype == np.int32
        assert narrow.tolist() == wide.tolist()


def test_an_empty_row_stays_empty(script):
    inputs, labels = masked(script, np.empty(0, np.int32))
    assert len(inputs) == len(labels) == 0


def make_slow_tokenizer(folder):
    """Return BERT's tokenizer in Python."""
    make_tokenizer(folder)
    return transformers.BertTokenizer.from_pretrained(folder)


def make_metaspace_tokenizer(folder):
    """Return a SentencePiece-like tokenizer."""
    splitter = tokenizers.pre_tokenizers.Metaspace()
    return make_unigram(splitter, splitter, tokenizers.decoders.Metaspace())


MAKERS = [make_tokenizer, make_slow_tokenizer, make_byte_level_tokenizer, make_metaspace_tokenizer]


@pytest.mark.parametrize("line_by_line", [True, False])
@pytest.mark.parametrize("make_one", MAKERS)
def test_the_documented_tokens_are_never_masked(script, tmp_path, make_one, line_by_line):
    """Those that the tokenizer calls special: no unknown word, and no special token that stands in the text."""
    tokenizer = make_one(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<name>"]})
    ends = tokenizer("")["input_ids"]
    assert len(ends) == 2

    def compare(lines):
        """Return (ids, kept, kept as documented) of the tokens of all samples."""
        raw = {"train": datasets.Dataset.from_dict({"text": lines})}
        data_args = script.DataTrainingArguments(line_by_line=line_by_line)
        dataset = script.tokenize_datasets(raw, tokenizer, data_args, 32)["train"]
        collator = script.MaskingCollator(tokenizer, mlm_probability=1.0)
        samples = [dataset[i] for i in range(len(dataset))]
        kept = np.concatenate([collator.mask(sample)[1] == -100 for sample in samples])
        options = {"truncation": True, "max_length": 32} if line_by_line else {}
        encoded = [tokenizer(line, return_special_tokens_mask=True, **options) for line in lines]
        ids, special = ([i for row in encoded for i in row[key]] for key in ("input_ids", "special_tokens_mask"))
        size = len(ids) if line_by_line else len(ids) // 32 * 32
        assert np.concatenate([sample["input_ids"] for sample in samples]).tolist() == ids[:size]
        return np.array(ids[:size]), kept, np.array(special[:size], bool)

    words = f"the \u2603 {tokenizer.unk_token} {tokenizer.mask_token} ."
    ids, kept, documented = compare([words, "<name> bakes \u2603", "\u2603"] * 8)
    assert kept.tolist() == documented.tolist()
    assert set(ids[kept]) == set(ends)
    assert {tokenizer.unk_token_id, tokenizer.mask_token_id, *tokenizer("<name>")["input_ids"]} <= set(ids)
    # The difference: the tokens at the ends and padding are not masked where they stand in the text, either.
    ids, kept, documented = compare([f"a {tokenizer.sep_token} dog {tokenizer.pad_token} ."] * 20)
    assert kept.tolist() == (documented | np.isin(ids, [*ends, tokenizer.pad_token_id])).tolist()
    assert kept.sum() > documented.sum()


def test_evaluation_has_its_own_share_of_masks(make, tmp_path):
    tokenizer, row = make_tokenizer(tmp_path), np.full(20_000, 50, np.int32)
    for share_in, train, evaluation in (({}, 0.15, 0.15), ({"eval_mlm_probability": 0.5}, 0.15, 0.5)):
        collator = make(tokenizer, **share_in)
        for epoch, share in ((0, train), (7, train), (run_mlm.EVAL_EPOCH, evaluation)):
            labels = np.asarray(collator([{"input_ids": row, "epoch": epoch, "index": 3}])["labels"])
            assert (labels >= 0).mean() == pytest.approx(share, rel=0.1)


def test_the_flags_reach_the_masks_of_training_and_evaluation(script, tmp_path):
    """All tokens chosen, almost none hidden: a run whose inputs are its labels, and in evaluation a half of them."""
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    path = write_lines(tmp_path / "t.txt", ["a dog sees a dog and a dog sees a dog ."] * 40)
    arguments = flags(model_name_or_path=model, train_file=path, validation_file=path, output_dir=tmp_path / "o")
    arguments += flags(mlm_probability=1, eval_mlm_probability=0.5, mask_replace_prob=0, random_replace_prob=1e-9)
    run = set_up(script, [*arguments, *flags(do_eval=True, line_by_line="true", max_seq_length=16)])
    if script is run_mlm:
        run.data_collator.compact = False
        batches = [next(iter(loader)) for loader in (run.get_train_dataloader(), run.get_eval_dataloader())]
    else:
        run.sparse_start = None
        keys = [script.SampleKey(i) for i in range(8)]
        batches = [run.batch(dataset, keys, 8) for dataset in (run.train_dataset, run.eval_dataset)]
    for batch, share in zip(batches, (1.0, 0.5)):
        ids, labels = np.asarray(batch["input_ids"]), np.asarray(batch["labels"])
        words = ids > 4
        np.testing.assert_array_equal(ids[labels >= 0], labels[labels >= 0])
        assert (labels[words] >= 0).mean() == pytest.approx(share, abs=0.25 * (share < 1))


FlaxCollator = getattr(run_mlm_flax, "FlaxDataCollatorForLanguageModeling", None)
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


def test_a_given_special_tokens_mask_is_obeyed(tokenizer, encoded, make):
    collate = make(tokenizer, mlm_probability=1.0)
    special = [[i % 2 for i in range(len(sample["input_ids"]))] for sample in encoded]
    labels = collate([{**sample, "special_tokens_mask": mask} for sample, mask in zip(encoded, special)])["labels"]
    for row, mask in zip(np.asarray(labels), special):
        assert (row[: len(mask)] == -100).tolist() == [bool(flag) for flag in mask]


@pytest.mark.parametrize("name", ["attention_mask", "special_tokens_mask", "continues_word"])
def test_a_mask_of_another_length_is_an_error_also_where_the_sum_is_right(tokenizer, make, name):
    samples = [{"input_ids": [5] * 10, name: [0] * 9}, {"input_ids": [6] * 7, name: [0] * 8}]
    with pytest.raises(ValueError):
        make(tokenizer)(samples)


def test_samples_without_a_key_get_masks_of_their_own(tokenizer, make):
    collate = make(tokenizer, mlm_probability=0.5)
    row = {"input_ids": list(range(5, 45))}
    batch = [collate([row] * 4) for _ in range(2)]
    masks = np.concatenate([np.asarray(part["labels"]) != -100 for part in batch])
    assert len({mask.tobytes() for mask in masks}) == 8


@pytest.mark.flax
def test_flax_collator_has_the_documented_settings(tokenizer):
    collate = FlaxCollator(tokenizer)
    assert (collate.tokenizer, collate.mlm, collate.mlm_probability) == (tokenizer, True, 0.15)
    assert FlaxCollator(tokenizer, False, 0.5).mlm_probability == 0.5
    names = [item.name for item in dataclasses.fields(FlaxCollator)]
    assert names[:3] == ["tokenizer", "mlm", "mlm_probability"]


@pytest.mark.flax
@pytest.mark.parametrize(("multiple", "width"), [(None, 13), (1, 13), (8, 16), (16, 16)])
def test_flax_collator_pads_to_a_multiple(tokenizer, multiple, width):
    batch = FlaxCollator(tokenizer)([{"input_ids": [2, *[9] * 11, 3]}, {"input_ids": [2, 9, 3]}], multiple)
    for array in batch.values():
        assert array.shape == (2, width) and array.dtype == np.int32
    assert batch["attention_mask"].sum(1).tolist() == [13, 3]
    by_name = FlaxCollator(tokenizer)([{"input_ids": [2, 9, 3]}], pad_to_multiple_of=4)
    assert by_name["input_ids"].shape == (1, 4)


@pytest.mark.flax
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


def test_without_mlm_the_labels_are_the_inputs(tokenizer, encoded, make):
    batch = {name: np.asarray(value) for name, value in make(tokenizer, mlm=False)(encoded).items()}
    inputs = padded(encoded)
    np.testing.assert_array_equal(batch["input_ids"], inputs)
    np.testing.assert_array_equal(batch["labels"], np.where(inputs == tokenizer.pad_token_id, -100, inputs))


def test_a_tokenizer_without_a_mask_token_is_an_error(tokenizer, make):
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask token"):
        make(tokenizer)
    assert make(tokenizer, mlm=False)([{"input_ids": [5, 6]}])["labels"].tolist() == [[5, 6]]


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
def test_a_data_loader_of_any_kind_gives_the_same_batches(tokenizer, workers, batch_size):
    dataset = tokenized(run_mlm, tokenizer)
    second = [run_mlm.SampleKey(i, epoch=1) for i in range(50)]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        sampler=second,
        collate_fn=run_mlm.MaskedLMCollator(tokenizer, seed=5, length=16),
        num_workers=workers,
    )
    batches = list(loader)
    collator = run_mlm.MaskingCollator(tokenizer, seed=5)
    everything = collator.collate([dataset[key] for key in second], length=16)
    for name, array in everything.items():
        np.testing.assert_array_equal(torch.cat([batch[name] for batch in batches]).numpy(), array)
    first = collator.collate([dataset[i] for i in range(50)], length=16)
    assert (first["labels"] != everything["labels"]).any()
