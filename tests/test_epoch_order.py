"""Every epoch has an order of its own, the same batches in both scripts."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import flags, optional_module, sentences, set_up, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import run_mlm

jax = optional_module("jax")
run_mlm_flax = optional_module("run_mlm_flax")


@pytest.mark.flax
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 3, 30, 301]))
def test_the_order_is_jaxs_permutation_in_both_scripts(seed, epoch, count):
    key = jax.random.fold_in(jax.random.PRNGKey(seed), epoch)
    expected = np.asarray(jax.random.permutation(key, count))
    for script in (run_mlm, run_mlm_flax):
        order = script.epoch_permutation(seed, epoch, count)
        np.testing.assert_array_equal(order, expected)
    assert sorted(expected.tolist()) == list(range(count))


@pytest.mark.flax
@pytest.mark.parametrize("count", [1625, 1626, 1627, 5000])  # From 1,626 samples on, JAX sorts twice.
def test_the_order_of_many_samples_is_jaxs_too(count):
    np.testing.assert_array_equal(run_mlm.epoch_permutation(42, 3, count), run_mlm_flax.epoch_permutation(42, 3, count))


@pytest.mark.flax
def test_the_order_does_not_depend_on_jaxs_configuration():
    expected = run_mlm.epoch_permutation(42, 3, 300)
    for options in ({"jax_default_prng_impl": "rbg"}, {"jax_threefry_partitionable": False}):
        (name, value), before = *options.items(), getattr(jax.config, next(iter(options)))
        jax.config.update(name, value)
        try:
            np.testing.assert_array_equal(run_mlm_flax.epoch_permutation(42, 3, 300), expected)
        finally:
            jax.config.update(name, before)


def test_epochs_and_seeds_have_orders_of_their_own(script):
    orders = {script.epoch_permutation(seed, epoch, 50).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.flax
def test_batch_splits_drop_the_remainder():
    split = run_mlm_flax.generate_batch_splits
    order = np.array([4, 2, 0, 1, 3, 6, 5])
    assert [batch.tolist() for batch in split(order, 3)] == [[4, 2, 0], [1, 3, 6]]
    assert [batch.tolist() for batch in split(order, 3, drop_last=False)] == [[4, 2, 0], [1, 3, 6], [5]]
    assert [batch.tolist() for batch in split(order[:6], 3, drop_last=False)] == [[4, 2, 0], [1, 3, 6]]
    assert list(split(order[:2], 3)) == []
    assert [batch.tolist() for batch in split(order[:2], 3, drop_last=False)] == [[4, 2]]
    assert list(split(order[:0], 3, drop_last=False)) == []


@pytest.mark.flax
@pytest.mark.parametrize("drop", ["true", "false"])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_steps_of_a_run_follow_from_jaxs_permutation(script, model_folder, tmp_path, monkeypatch, drop, grouped):
    """The order of three epochs, worked out sample by sample: shuffle, drop, sort each window by length."""
    monkeypatch.setattr(script, "LENGTH_WINDOW", 2)
    texts = [" ".join(["boats"] * (1 + i * 7 % 11)) for i in range(23)]
    settings = {"model_name_or_path": model_folder, "output_dir": tmp_path / "output", "max_seq_length": 16, "seed": 5}
    path = write_lines(tmp_path / "train.txt", texts)
    settings |= {"train_file": path, "validation_file": path, "line_by_line": "true"}
    settings |= {"train_batch_size": 4, "num_train_epochs": 3, "dataloader_drop_last": drop}
    run = set_up(script, flags(**settings, **({"group_by_length": True} if grouped else {})))
    expected = []
    for epoch in range(3):
        key = jax.random.fold_in(jax.random.PRNGKey(5), epoch)
        order = jax.random.permutation(key, 23).tolist()
        order = order[:20] if drop == "true" else order
        windows = [order[i : i + 2 * 4] for i in range(0, len(order), 2 * 4)]
        if grouped:
            windows = [sorted(window, key=lambda index: -len(texts[index])) for window in windows]
        order = [index for window in windows for index in window]
        expected += [[(epoch, index) for index in order[i : i + 4]] for i in range(0, len(order), 4)]
    steps = [[(key.epoch, key.index) for key in keys if key.labelled] for keys in run.plan.steps()]
    assert steps == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2000), st.integers(1, 16))
def test_grouping_by_length_keeps_the_permutation_and_saves_padding(seed, count, batch_size):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 512, count)
    order = generator.permutation(count)

    def padded_tokens(order):
        return sum(batch_size * lengths[order[i : i + batch_size]].max() for i in range(0, count, batch_size))

    grouped = run_mlm.group_by_length(order, lengths, batch_size)
    assert sorted(grouped.tolist()) == list(range(count))
    assert padded_tokens(grouped) <= padded_tokens(order)
    if count > 100 and batch_size > 3:
        assert padded_tokens(grouped) < 0.8 * padded_tokens(order)
        # Windows stay where they were: the order is still random beyond them.
        window = run_mlm.LENGTH_WINDOW * batch_size
        assert set(grouped[:window].tolist()) == set(order[:window].tolist())


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_samples_are_counted_as_the_steps_train_them(data):
    """Also behind a checkpoint of another batch size, and without fillers."""
    draw = lambda *span: data.draw(st.integers(*span))  # noqa: E731
    size, batch, epochs = draw(1, 40), draw(1, 9), draw(1, 3)
    args = SimpleNamespace(
        **{"global_batch_size": batch, "drop_last_step": data.draw(st.booleans()) and batch <= size, "max_steps": -1},
        **{"num_train_epochs": epochs, "group_by_length": False, "order_seed": 3},
    )
    first_step = draw(0, 5)
    start = run_mlm.Position(0, draw(0, size - 1), draw(1, 9)) if first_step else None
    plan = run_mlm.RunPlan(range(size), args, first_step, start)
    trained = [0, *itertools.accumulate(sum(key.labelled for key in keys) for keys in plan.steps())]
    assert [plan.num_samples(step) for step in range(first_step, plan.num_steps + 1)] == trained


def pytorch_batches(trainer):
    """Return the rows of token ids that each optimizer step sees, as the Trainer's loop fetches them."""
    batches = [batch["input_ids"].numpy() for batch in trainer.get_train_dataloader()]
    accumulation = trainer.args.gradient_accumulation_steps
    steps = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    return [sorted(row[row != 0].tolist() for batch in step for row in batch) for step in steps]


def flax_batches(run):
    """Return the same of the Flax loop."""
    rows = []
    for keys in run.plan.steps():
        batch = run.batch(run.train_dataset, keys, run.args.train_batch_size, run.args.gradient_accumulation_steps)
        step = batch["input_ids"].reshape(-1, batch["input_ids"].shape[-1])[: len(keys)]
        rows.append(sorted(row[row != 0].tolist() for row in step))
    return rows


@pytest.mark.flax
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("more", [["--line_by_line", "false"], ["--line_by_line", "true", "--group_by_length"]])
def test_both_scripts_train_on_the_same_batches(model_folder, tmp_path, accumulation, more):
    arguments = flags(model_name_or_path=model_folder, output_dir=tmp_path / "output", max_seq_length=16, seed=7)
    arguments += flags(train_file=write_lines(tmp_path / "train.txt", sentences(110)), train_batch_size=8)
    arguments += flags(gradient_accumulation_steps=accumulation, dataloader_drop_last="true", num_train_epochs=2)
    expected = pytorch_batches(set_up(run_mlm, arguments + more))
    assert len(expected) > 4
    assert flax_batches(set_up(run_mlm_flax, arguments + more)) == expected
