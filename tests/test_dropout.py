"""Dropout that draws its random numbers cheaply is dropout: its probability, scale, gradients, and where it is on."""

import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import flags, make_model, sentences, write_lines
from flax import linen as nn
from setups import set_up
from torch.nn import functional

import run_mlm
import run_mlm_flax

ROWS, LENGTH, HIDDEN, HEADS = 4, 16, 32, 2


def assert_share(kept, probability):
    """Check the share of True within five standard errors."""
    error = math.sqrt(probability * (1 - probability) / kept.size)
    assert kept.mean() == pytest.approx(probability, abs=5 * error)


@pytest.mark.parametrize("probability", [0.5, 0.9, 0.999])
def test_a_share_is_kept_and_the_four_of_a_draw_are_independent(probability):
    torch.manual_seed(0)
    kept = run_mlm.keep_mask((1024, 1023), probability).numpy().astype(bool)
    assert_share(kept, probability)
    lanes = kept.reshape(-1, 4)
    for i in range(4):
        assert_share(lanes[:, i], probability)
    for i, j in itertools.combinations(range(4), 2):
        assert_share(lanes[:, i] & lanes[:, j], probability**2)
    assert_share(kept[:, 1:] & kept[:, :-1], probability**2)


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (2, 3, 5), (1, 7), (2, 0, 3)])
def test_mask_has_the_shape_asked_for_and_the_seed_decides_it(shape):
    torch.manual_seed(3)
    mask = run_mlm.keep_mask(shape, 0.5)
    assert (mask.dtype, mask.shape) == (torch.uint8, shape)
    assert set(mask.unique().tolist()) <= {0, 1}
    torch.manual_seed(3)
    assert torch.equal(run_mlm.keep_mask(shape, 0.5), mask)
    big = [run_mlm.keep_mask((999,), 0.5) for _ in range(2)]
    assert not torch.equal(*big)


@pytest.mark.parametrize(("probability", "expected"), [(1e-9, 0), (1e-6, 0), (1 - 1e-6, 1), (1 - 1e-9, 1), (1, 1)])
def test_extreme_probabilities_do_not_wrap_around(probability, expected):
    torch.manual_seed(0)
    share = run_mlm.keep_mask((2**18,), probability).double().mean().item()
    assert share == pytest.approx(expected, abs=2e-4)


def test_quick_dropout_keeps_the_mean_and_its_gradient_is_the_scaled_mask():
    torch.manual_seed(0)
    inputs = torch.rand(500, 401, requires_grad=True)
    output = run_mlm.quick_dropout(inputs, 0.3)
    output.sum().backward()
    kept = output != 0
    torch.testing.assert_close(output, torch.where(kept, inputs / 0.7, 0.0))
    torch.testing.assert_close(inputs.grad, kept / 0.7)
    assert_share(kept.numpy(), 0.7)
    assert output.mean().item() == pytest.approx(inputs.mean().item(), rel=0.01)


@pytest.mark.parametrize("settings", [{"p": 0.3, "training": False}, {"p": 0.0}, {"p": 1.0}])
def test_nothing_is_drawn_where_dropout_is_not_random(settings):
    inputs = torch.rand(5, 7)
    with mock.patch.object(run_mlm, "keep_mask", side_effect=AssertionError("drawn")):
        output = run_mlm.quick_dropout(inputs, **settings)
    assert torch.equal(output, inputs * (settings["p"] < 1))


def test_quick_dropout_keeps_the_type_of_its_input():
    for dtype in (torch.bfloat16, torch.float64):
        assert run_mlm.quick_dropout(torch.ones(9, dtype=dtype), 0.5).dtype == dtype


def test_the_mode_replaces_pytorchs_functions_and_only_within():
    inputs = torch.ones(1, 2, 3, 4)
    with mock.patch.object(run_mlm, "keep_mask", wraps=run_mlm.keep_mask) as draws:
        with run_mlm.QuickDropout():
            functional.dropout(inputs, 0.5)
            torch.nn.Dropout(0.5)(inputs)
            functional.scaled_dot_product_attention(inputs, inputs, inputs, dropout_p=0.5)
            torch.nn.Dropout(0.5).eval()(inputs)
            functional.scaled_dot_product_attention(inputs, inputs, inputs)
        assert [call.args[0] for call in draws.call_args_list] == [(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 3)]
        draws.reset_mock()
        functional.dropout(inputs, 0.5)
        functional.scaled_dot_product_attention(inputs, inputs, inputs, dropout_p=0.5)
        draws.assert_not_called()


def attention(query, key, value, mask, keep, dropout_p, scale=None):
    """Return what attention with dropout is, line by line, for a given uint8 `keep`."""
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) * keep / (1 - dropout_p)) @ value


def make_inputs(dtype=torch.float32, keys=9, width=4):
    """Return Q: [5, 2, 7, 4], K: [5, 2, keys, 4], V: [5, 2, keys, width], and what to keep: uint8 [5, 2, 7, keys]."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 2, 7, 4), (5, 2, keys, 4), (5, 2, keys, width)
    parts = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return parts, torch.randint(0, 2, (5, 2, 7, keys), generator=generator, dtype=torch.uint8)


def make_mask(kind, shape):
    """Return a mask of a kind: "none", "float", "lowest" (the lowest number instead of -inf) or "bool"."""
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(shape, generator=generator)
    allowed = torch.rand(shape, generator=generator) < 0.6
    allowed[..., 0] = True
    return allowed if kind == "bool" else torch.zeros(shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def compare(mask, part=2**20, dtype=torch.float32, width=4, **settings):
    """Check output and gradients of `quick_attention` against the second implementation."""
    results = []
    for function in (run_mlm.quick_attention, attention):
        parts, keep = make_inputs(dtype, width=width)
        with (
            mock.patch.object(run_mlm, "keep_mask", return_value=keep),
            mock.patch.object(run_mlm, "CACHED_NUMBERS", part),
        ):
            options = settings if function is run_mlm.quick_attention else {**settings, "keep": keep}
            output = function(*parts, mask, dropout_p=0.25, **options)
            (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        results.append([output, *(array.grad for array in parts)])
    for one, other in zip(*results):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


SHAPES = [(5, 1, 7, 9), (5, 2, 7, 9), (1, 1, 7, 9), (5, 1, 1, 9), (1, 2, 1, 9), (1, 1, 1, 9)]


@pytest.mark.parametrize("part", [1, 2 * 7 * 7 * 2, 2**20], ids=["each", "two", "all"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("none", None), *itertools.product(["float", "lowest", "bool"], SHAPES)], ids=str
)
def test_attention_is_the_plain_one_with_the_same_draws(kind, shape, part):
    compare(make_mask(kind, shape), part)


@pytest.mark.parametrize("part", [1, 2**20], ids=["each", "all"])
@pytest.mark.parametrize("shape", [(7, 9), (1, 9), (2, 7, 9), (1, 7, 9)], ids=str)
def test_masks_of_fewer_dimensions_are_broadcast_as_by_pytorch(shape, part):
    compare(make_mask("float", shape), part)


def test_attention_of_other_scales_and_types():
    compare(make_mask("float", (5, 1, 7, 9)), scale=0.3)
    compare(None, dtype=torch.float64)
    compare(None, width=3)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_may_attend_to_nothing_gets_zero_as_from_pytorch(kind):
    (query, key, value), _ = make_inputs()
    mask = torch.ones(5, 1, 7, 9, dtype=torch.bool)
    mask[2, 0, 3] = False
    mask = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    assert not functional.scaled_dot_product_attention(query, key, value, mask)[2, :, 3].any()
    assert not run_mlm.quick_attention(query, key, value, mask, 0.25)[2, :, 3].any()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "case", ["learned mask", "causal", "grouped heads", "shared keys", "three dimensions", "no dropout"]
)
def test_what_is_not_quick_is_left_to_pytorch(case):
    (query, key, value), _ = make_inputs(keys=7)
    settings = {"dropout_p": 0.25}
    if case == "learned mask":
        settings["attn_mask"] = torch.zeros(5, 1, 7, 7, requires_grad=True)
    elif case == "causal":
        settings["is_causal"] = True
    elif case == "grouped heads":
        key, value, settings["enable_gqa"] = key[:, :1], value[:, :1], True
    elif case == "shared keys":
        key = key[:1]
    elif case == "three dimensions":
        query, key, value = query[0], key[0], value[0]
    else:
        settings["dropout_p"] = 0.0
    results = []
    with mock.patch.object(run_mlm, "keep_mask", side_effect=AssertionError("drawn")):
        for function in (run_mlm.quick_attention, functional.scaled_dot_product_attention):
            torch.manual_seed(0)
            results.append(function(query, key, value, **settings))
    assert torch.equal(*results)
    if case == "learned mask":
        results[0].sum().backward()
        assert settings["attn_mask"].grad is not None


def test_the_output_can_be_changed_in_place():
    parts, _ = make_inputs(keys=7)
    output = run_mlm.quick_attention(*parts, dropout_p=0.25)
    (output.transpose(1, 2).contiguous().add_(1) * 2).sum().backward()  # As the models take it.
    assert all(array.grad is not None for array in parts)


def test_bfloat16_under_autocast_is_near_float32():
    torch.manual_seed(0)
    inputs, mask = torch.randn(3, 7, 16), make_mask("lowest", (3, 1, 1, 7))
    layers = [torch.nn.Linear(16, 16) for _ in range(3)]
    results = []
    for enabled in (False, True):
        for layer in layers:
            layer.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            parts = [layer(inputs).view(3, 7, 2, 8).transpose(1, 2) for layer in layers]
            output = run_mlm.quick_attention(*parts, mask, 0.25)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        output.float().square().sum().backward()
        results.append([output.float(), *(layer.weight.grad.clone() for layer in layers)])
    for one, other in zip(*results):
        assert other.isfinite().all()
        assert (one - other).norm() < 0.03 * one.norm()


def build(script, folder, tmp_path, **settings):
    """Return what `main` would train on 16-token rows, `ROWS` at a time."""
    lines = write_lines(tmp_path / "train.txt", sentences(60))
    settings = {"line_by_line": "false", "max_seq_length": LENGTH, "train_batch_size": ROWS, "max_steps": 1, **settings}
    return set_up(
        script, flags(model_name_or_path=folder, train_file=lines, output_dir=tmp_path / "output", **settings)
    )


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_a_training_step_draws_quickly_and_an_evaluation_not_at_all(tmp_path):
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    trainer = build(run_mlm, folder, tmp_path)
    batch = first_batch(trainer)
    trainer.create_optimizer()
    with mock.patch.object(run_mlm, "keep_mask", wraps=run_mlm.keep_mask) as draws:
        trainer.model.train()
        labels = (batch["labels"] >= 0).sum()
        trainer.training_step(trainer.model, batch, labels)
        shapes = [tuple(call.args[0]) for call in draws.call_args_list]
        after = (1, labels, HIDDEN) if trainer.selection == "layer" else (ROWS, LENGTH, HIDDEN)
        assert shapes == [(ROWS, LENGTH, HIDDEN), (ROWS, HEADS, LENGTH, LENGTH), after, after]
        assert {call.args[1] for call in draws.call_args_list} == {0.9}
        draws.reset_mock()
        trainer.model.eval()
        trainer.prediction_step(trainer.model, batch, False)
        draws.assert_not_called()


class Dropped(nn.Module):
    """`dropout_layer` in place of an `nn.Dropout`."""

    rate: float
    broadcast_dims: tuple = ()

    @nn.compact
    def __call__(self, inputs):
        return run_mlm_flax.dropout_layer(nn.Dropout(self.rate, self.broadcast_dims), inputs)


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


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_random_words_are_uniform_and_independent_between_keys_and_places(impl):
    shape = 64, 128, 128
    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    one, two, three = (np.asarray(run_mlm_flax.random_words(key, shape)) for key in keys)
    assert one.shape == shape and one.dtype == np.uint32
    pairs = one ^ two, one ^ three, two ^ three, one[1:] ^ one[:-1], one[..., 1:] ^ one[..., :-1], one ^ np.roll(two, 1)
    for words in (one, two, three, *pairs):
        for octet in range(4):
            counts = np.bincount((words >> np.uint32(8 * octet)).ravel() & np.uint32(255), minlength=256)
            expected = words.size / 256
            statistic = ((counts - expected) ** 2 / expected).sum()  # Chi-squared, of 255 degrees of freedom.
            assert abs(statistic - 255) < 6 * math.sqrt(2 * 255)


@pytest.mark.parametrize("selection", ["encoder", "layer"])
def test_the_flax_model_drops_with_a_key_and_not_without(selection, tmp_path):
    run = build(run_mlm_flax, make_model(tmp_path / "model", num_hidden_layers=1), tmp_path)
    generator = np.random.default_rng(0)
    batch = {"input_ids": generator.integers(5, 50, (ROWS, LENGTH)), "attention_mask": np.ones((ROWS, LENGTH), int)}
    batch |= {"positions": np.arange(0, 40, 5), "labels": np.zeros(8, int)}
    logits = functools.partial(run_mlm_flax.labelled_logits, model=run.model, selection=selection)
    shapes = []

    def record(module, inputs):
        shapes.append(inputs.shape)
        return drop_layer(module, inputs)

    drop_layer = run_mlm_flax.dropout_layer
    with mock.patch.object(run_mlm_flax, "dropout_layer", record):
        jax.eval_shape(logits, run.model.params, batch, jax.random.key(0))
        after = (1, 8, HIDDEN) if selection == "layer" else (ROWS, LENGTH, HIDDEN)
        assert shapes == [(ROWS, LENGTH, HIDDEN), after, after]  # Flax draws that of the attention weights itself.
        shapes.clear()
        jax.eval_shape(logits, run.model.params, batch)
        assert shapes == []
    logits = jax.jit(logits)
    one, again, other = (logits(run.model.params, batch, jax.random.key(key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3
    full = jax.jit(lambda batch: run.model(batch["input_ids"], batch["attention_mask"])[0])(batch)
    full = full.reshape(ROWS * LENGTH, -1)[batch["positions"]]
    np.testing.assert_allclose(logits(run.model.params, batch), full, rtol=1e-4, atol=1e-5)
