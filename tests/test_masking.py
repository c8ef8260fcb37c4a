"""Masking is BERT's rule, drawn anew for every (seed, epoch, sample index) and for nothing else."""

import math

import numpy as np
import pytest
from conftest import flags, make_model, make_tokenizer, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from setups import set_up

import run_mlm
import run_mlm_flax

MASK, VOCABULARY = 4, 100
ROWS = st.lists(st.integers(5, VOCABULARY - 1), min_size=1, max_size=40).map(lambda row: np.array(row, np.int32))
few = settings(max_examples=40, deadline=None)


def masked(script, row, key=(0, 0, 0), special=None, **options):
    """Return the inputs and labels of one row."""
    special = np.zeros(len(row), bool) if special is None else special
    return script.mask_tokens(row, special, script.sample_generator(*key), MASK, VOCABULARY, **options)


@pytest.fixture(scope="module")
def collators(tmp_path_factory):
    """The collator of each script, with one seed."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return (
        run_mlm.MaskedLMCollator(tokenizer, seed=3, mlm_probability=0.4),
        run_mlm_flax.FlaxDataCollatorForLanguageModeling(tokenizer, seed=3, mlm_probability=0.4),
    )


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
    for script in (run_mlm, run_mlm_flax):
        given_row = row.copy()
        inputs, labels = masked(script, row, special=special, mlm_probability=0.5)
        np.testing.assert_array_equal(row, given_row)  # The samples are views of the data: never written to.
        chosen = labels != -100
        np.testing.assert_array_equal(labels[chosen], row[chosen])
        np.testing.assert_array_equal(inputs[~chosen], row[~chosen])
        assert not (chosen & special).any()


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 8), st.data())
def test_masks_do_not_depend_on_the_batch(collators, lengths, batch_size, data):
    generator = np.random.default_rng(0)
    samples = [
        {"input_ids": generator.integers(5, 60, length).astype(np.int32), "epoch": 2, "index": 10 * i}
        for i, length in enumerate(lengths)
    ]
    for sample, length in zip(samples, lengths) if data.draw(st.booleans()) else ():
        sample["continues_word"] = generator.random(length) < 0.5  # The first token as well, as in joined rows.
    order = data.draw(st.permutations(range(len(samples))))
    for collator in collators:

        def collate(rows, collator=collator):
            return {name: np.asarray(array) for name, array in collator(rows).items()}

        alone = [collate([sample]) for sample in samples]
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            batch = collate([samples[i] for i in rows])
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


def test_evaluation_has_its_own_share_of_masks(tmp_path):
    tokenizer, row = make_tokenizer(tmp_path), np.full(20_000, 50, np.int32)
    for share_in, train, evaluation in (({}, 0.15, 0.15), ({"eval_mlm_probability": 0.5}, 0.15, 0.5)):
        for collator in (
            run_mlm.MaskedLMCollator(tokenizer, **share_in),
            run_mlm_flax.FlaxDataCollatorForLanguageModeling(tokenizer, **share_in),
        ):
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
        batches = [next(iter(loader)) for loader in (run.get_train_dataloader(), run.get_eval_dataloader())]
    else:
        run.sparse_start = None
        batches = [run.batch(run.tokenized[split], range(8), 8) for split in ("train", "validation")]
    for batch, share in zip(batches, (1.0, 0.5)):
        ids, labels = np.asarray(batch["input_ids"]), np.asarray(batch["labels"])
        words = ids > 4
        np.testing.assert_array_equal(ids[labels >= 0], labels[labels >= 0])
        assert (labels[words] >= 0).mean() == pytest.approx(share, abs=0.25 * (share < 1))
