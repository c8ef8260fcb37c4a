"""Whole words are chosen or left, whatever the tokenizer; how many tokens are masked stays what was asked for."""

import importlib
import itertools
import math
import random
from unittest import mock

import numpy as np
import pytest
from conftest import (
    INSTALLED,
    RARE,
    ROOT,
    WORDS,
    flags,
    make_byte_level_tokenizer,
    make_slow_tokenizer,
    make_tokenizer,
    make_unigram,
    sentences,
    write_lines,
)
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

pytestmark = pytest.mark.shared
LENGTH = 16
# The last three take a text for one word, and mark spaces in their tokens, as Llama, Gemma and some T5 do.
UNSPLIT = ("unsplit_bytes", "unsplit_metaspace", "normalizer")
KINDS = ("wordpiece", "byte_level", "unigram", *UNSPLIT)


@pytest.fixture
def make(tmp_path):
    """A function that returns a tokenizer of a kind."""

    def make_kind(kind):
        if kind == "wordpiece":
            return make_tokenizer(tmp_path)
        if kind in ("byte_level", "unsplit_bytes"):
            tokenizer = make_byte_level_tokenizer(tmp_path)
            if kind == "unsplit_bytes":
                used = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
                tokenizer.backend_tokenizer.pre_tokenizer = used
            return tokenizer
        used = {"unsplit_metaspace": pre_tokenizers.Metaspace(split=False), "normalizer": None}
        used = used.get(kind, pre_tokenizers.Metaspace())
        tokenizer = make_unigram(pre_tokenizers.Metaspace(), used, decoders.Metaspace())
        if kind == "normalizer":
            marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(marks)
        return tokenizer

    return make_kind


def tokenize(script, tokenizer, path, max_seq_length=LENGTH, **settings):
    """Return the tokenized validation data of a run with whole words."""
    needed = flags(model_name_or_path="m", output_dir="o", validation_file=path, whole_word_mask=True)
    model_args, data_args, _ = script.parse_args(needed + flags(**settings))
    raw = script.load_raw_datasets(model_args, data_args)
    return script.tokenize_datasets(raw, tokenizer, data_args, max_seq_length)["validation"]


def words_of(tokenizer, sample):
    """Return the words that the flags of a sample make, decoded, special tokens left out."""
    begins = [i for i, continues in enumerate(sample["continues_word"]) if i == 0 or not continues]
    ids = sample["input_ids"].tolist()
    words = [ids[first:end] for first, end in itertools.pairwise([*begins, len(ids)])]
    special = tokenizer.all_special_ids
    return [tokenizer.decode(word).strip() for word in words if word[0] not in special]


@pytest.mark.parametrize("kind", KINDS)
def test_flags_make_the_words_of_the_text(script, make, tmp_path, kind):
    tokenizer = make(kind)
    lines = [RARE, "", *sentences(30)]
    dataset = tokenize(script, tokenizer, write_lines(tmp_path / "t.txt", lines), 200, line_by_line="true")
    split = [words_of(tokenizer, dataset[i]) for i in range(len(dataset))]
    assert split == [line.split() for line in lines if line]
    assert len(dataset[0]["input_ids"]) > len(RARE.split()) + 5  # Rare words are of several tokens.


def test_punctuation_makes_words_as_the_tokenizer_says(script, make, tmp_path):
    tokenizer, path = make("byte_level"), write_lines(tmp_path / "t.txt", ["the baker's   dogs, 42 boats"])
    found = words_of(tokenizer, tokenize(script, tokenizer, path, 60, line_by_line="true")[0])
    assert [word for word in found if word] == ["the", "baker", "'s", "dogs", ",", "42", "boats"]


@pytest.mark.parametrize("kind", KINDS)
def test_joined_rows_carry_the_flags_of_their_tokens(script, make, tmp_path, kind):
    tokenizer, lines = make(kind), [*sentences(60), RARE] * 3
    path = write_lines(tmp_path / "t.txt", lines)
    single = tokenize(script, tokenizer, path, 200, line_by_line="true")
    rows = tokenize(script, tokenizer, path, line_by_line="false")
    for name in ("input_ids", "continues_word"):
        stream = np.concatenate([single[i][name] for i in range(len(single))])
        joined = np.concatenate([rows[i][name] for i in range(len(rows))])
        assert joined.dtype == stream.dtype
        np.testing.assert_array_equal(joined, stream[: len(joined)])
        assert len(stream) - len(joined) < LENGTH
    assert any(rows[i]["continues_word"][0] for i in range(len(rows)))  # A word cut by the border of a row is two.


@pytest.mark.parametrize(("kind", "line_by_line"), [("wordpiece", "false"), ("unigram", "true")])
def test_the_masked_share_of_real_text_is_what_was_asked_for(make, kind, line_by_line):
    """Masks as many epochs as it takes for four standard deviations to be below 1 %."""
    script, probability = importlib.import_module(INSTALLED[0]), 0.15
    tokenizer = make(kind)
    path, length = ROOT / "configs/quickstart/validation.txt", 512
    dataset = tokenize(script, tokenizer, path, length, line_by_line=line_by_line, max_val_samples=300)
    collator = script.MaskingCollator(tokenizer, mlm_probability=probability)
    words, samples = [], [dataset[i] for i in range(len(dataset))]
    for sample in samples:
        begins = sample["continues_word"] == 0
        begins[0] = True
        words.append(np.bincount(np.cumsum(begins) - 1, weights=~collator.is_special[sample["input_ids"]]))
    words = np.concatenate(words)
    assert words.sum() > 1.2 * (words > 0).sum()
    deviation = math.sqrt(probability * (1 - probability) * (words**2).sum()) / words.sum()
    epochs = math.ceil((4 * deviation / (0.01 * probability)) ** 2)
    masked = 0
    for epoch in range(epochs):
        for sample in samples:
            _, labels = collator.mask({**sample, "epoch": epoch})
            masked += np.count_nonzero(labels >= 0)
    assert masked / (epochs * words.sum()) == pytest.approx(probability, rel=0.01)


@pytest.mark.parametrize("line_by_line", ["true", "false"])
def test_words_are_chosen_whole_and_hidden_token_by_token(script, make, tmp_path, line_by_line):
    tokenizer = make("wordpiece")
    dataset = tokenize(script, tokenizer, write_lines(tmp_path / "t.txt", [RARE] * 60), line_by_line=line_by_line)
    collator = script.MaskingCollator(tokenizer, mlm_probability=0.5, mask_replace_prob=0.5)
    mixed = 0
    for i in range(len(dataset)):
        sample = dataset[i]
        inputs, labels = collator.mask(sample)
        special = collator.is_special[sample["input_ids"]]
        words = np.cumsum(sample["continues_word"] == 0)
        for word in np.unique(words):
            chosen = labels[(words == word) & ~special] >= 0
            assert chosen.all() or not chosen.any()
            hidden = inputs[(words == word) & ~special] == tokenizer.mask_token_id
            mixed += bool(chosen.any() and hidden.any() and not hidden.all())
        assert not (labels[special] >= 0).any()
    assert mixed > 5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_tokenizers_own_call(script, make, kind):
    """With each setting of a tokenizer that changes ids, for random texts, some of them longer than one call."""
    rng, tokenizer = random.Random(kind), make(kind)
    pieces = [
        *WORDS,
        *tokenizer.all_special_tokens,
        "zigzags",
        "  ",
        "\n",
        "\t",
        "é",
        "字",
        "\U0001f600",
        "12.5",
        "-",
        "'s",
    ]
    texts = ["".join(rng.choices(["", " "], k=2)[0] + piece for piece in rng.choices(pieces, k=n)) for n in range(60)]
    texts += [" ".join(rng.choices(pieces, k=1500))]
    with mock.patch.multiple(script, CALL_LENGTH=3_000, OVERLAP=1_000, SAME_TOKENS=20):
        for side, split, whole in itertools.product(("left", "right"), (False, True), (False, True)):
            tokenizer.truncation_side, tokenizer.split_special_tokens = side, split
            for line_by_line in (True, False):
                data_args = script.DataTrainingArguments(whole_word_mask=whole, line_by_line=line_by_line)
                encode = script.make_encoder(tokenizer, data_args, LENGTH)
                rows = [row for table in encode((text,) for text in texts) for row in table["input_ids"].to_pylist()]
                limit = {"truncation": True, "max_length": LENGTH} if line_by_line else {"verbose": False}
                own = [tokenizer(text, **limit)["input_ids"] for text in texts if text.strip() or not line_by_line]
                tokens = [token for row in own for token in row]
                joined = [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]
                assert rows == (own if line_by_line else joined), (side, split, whole, line_by_line)


def test_a_tokenizer_that_does_not_tell_words_is_an_error(script, make, tmp_path):
    tokenizer = make("normalizer")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" "), "")
    with pytest.raises(script.UserError, match="--whole_word_mask: this tokenizer does not tell where words begin"):
        tokenize(script, tokenizer, write_lines(tmp_path / "t.txt", sentences(3)))


def test_a_slow_tokenizer_is_an_error(script, tmp_path):
    slow = make_slow_tokenizer(tmp_path)
    with pytest.raises(script.UserError, match="--whole_word_mask needs a fast tokenizer"):
        tokenize(script, slow, write_lines(tmp_path / "t.txt", sentences(3)))


def test_references_and_word_ids_exclude_each_other(script):
    settings = {"train_file": "t", "train_ref_file": "r", "line_by_line": "true", "whole_word_mask": True}
    with pytest.raises(script.UserError, match="--whole_word_mask or reference files"):
        script.parse_args(flags(model_name_or_path="m", output_dir="o", **settings))
