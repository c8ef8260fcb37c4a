"""Dropout that draws its random numbers cheaply is dropout: its probability, scale, gradients, and where it is on."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import flags, make_model, sentences, write_lines
from flax import linen as nn
from setups import set_up

import run_mlm
import run_mlm_flax

ROWS, LENGTH = 4, 16


def assert_share(kept, probability):
    """Check the share of True within five standard errors."""
    error = math.sqrt(probability * (1 - probability) / kept.size)
    assert kept.mean() == pytest.approx(probability, abs=5 * error)


def build(script, folder, tmp_path, **settings):
    """Return what `main` would train on 16-token rows, `ROWS` at a time."""
    lines = write_lines(tmp_path / "train.txt", sentences(60))
    settings = {"line_by_line": "false", "max_seq_length": LENGTH, "train_batch_size": ROWS, "max_steps": 1, **settings}
    return set_up(
        script, flags(model_name_or_path=folder, train_file=lines, output_dir=tmp_path / "output", **settings)
    )


class Dropped(nn.Module):
    """`fast_dropout` in place of an `nn.Dropout`."""

    rate: float
    broadcast_dims: tuple = ()

    @nn.compact
    def __call__(self, inputs):
        return run_mlm_flax.fast_dropout(nn.Dropout(self.rate, self.broadcast_dims), inputs)


def drop(inputs, rate, key=0, broadcast_dims=()):
    return Dropped(rate, broadcast_dims).apply({}, inputs, rngs={"dropout": jax.random.key(key)})


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.001])
def test_flax_keeps_a_share_and_scales_it(rate):
    inputs = np.random.default_rng(0).uniform(1, 2, (601, 401)).astype(np.float32)
    output = np.asarray(drop(inputs, rate))
    kept = output != 0
    assert_share(kept, 1 - rate)
    assert_share(kept.ravel()[1:] & kept.ravel()[:-1], (1 - rate) ** 2)
    np.testing.assert_allclose(output, np.where(kept, inputs / (1 - rate), 0), rtol=1e-6)
    gradient = jax.grad(lambda inputs: drop(inputs, rate).sum())(inputs)
    np.testing.assert_allclose(gradient, kept / (1 - rate), rtol=1e-6)
    assert drop(jnp.ones((3, 5), jnp.bfloat16), rate).dtype == jnp.bfloat16


@pytest.mark.parametrize(("rate", "expected"), [(1e-9, 1), (1e-6, 1), (1 - 1e-6, 0)])
def test_extreme_flax_rates_do_not_wrap_around(rate, expected):
    kept = np.asarray(drop(jnp.ones(2**16), rate)) != 0
    assert kept.mean() == pytest.approx(expected, abs=2e-4)


def test_flax_masks_are_those_of_their_keys_and_broadcast():
    inputs = jnp.ones((6, 50, 70))
    one, again, other = (np.asarray(drop(inputs, 0.5, key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() == pytest.approx(0.5, abs=0.02)
    shared = np.asarray(drop(inputs, 0.5, broadcast_dims=(0, 2)))
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1, :, :1], shared.shape))
    assert set(np.unique(shared)) == {0, 2}


@pytest.mark.parametrize("dropout_rate", [0.0, 0.1])
def test_a_pytorch_training_step_drops_and_an_evaluation_does_not(tmp_path, dropout_rate):
    trainer = build(run_mlm, make_model(tmp_path / "model", num_hidden_layers=1), tmp_path, dropout_rate=dropout_rate)
    batch, losses = next(iter(trainer.get_train_dataloader())), []
    labels = (batch["labels"] >= 0).sum()
    for _ in range(2):
        trainer.model.train()
        losses.append(trainer.training_step(trainer.model, dict(batch), labels).item())
    assert (losses[0] == losses[1]) == (dropout_rate == 0)
    trainer.model.eval()
    sums = [trainer.prediction_step(trainer.model, dict(batch), False)[1] for _ in range(2)]
    assert torch.equal(*sums)


@pytest.mark.parametrize("sparse_start", ["encoder", "layer"])
def test_the_flax_model_drops_with_a_key_and_not_without(sparse_start, tmp_path):
    run = build(run_mlm_flax, make_model(tmp_path / "model", num_hidden_layers=1), tmp_path)
    generator = np.random.default_rng(0)
    batch = {"input_ids": generator.integers(5, 50, (ROWS, LENGTH)), "attention_mask": np.ones((ROWS, LENGTH), int)}
    batch |= {"positions": np.arange(0, 40, 5), "labels": np.zeros(8, int)}
    logits = functools.partial(run_mlm_flax.masked_logits, model=run.model, sparse_start=sparse_start)
    logits = jax.jit(logits)
    one, again, other = (logits(run.model.params, batch, jax.random.key(key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3
    full = jax.jit(lambda batch: run.model(batch["input_ids"], batch["attention_mask"])[0])(batch)
    full = full.reshape(ROWS * LENGTH, -1)[batch["positions"]]
    np.testing.assert_allclose(logits(run.model.params, batch), full, rtol=1e-4, atol=1e-5)
