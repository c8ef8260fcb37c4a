"""Learning rates: the six documented factors, and the Trainer's schedules."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import run_mlm_flax

make = run_mlm_flax.create_learning_rate_scheduler


def test_signature_is_the_documented_one():
    defaults = {name: item.default for name, item in inspect.signature(make).parameters.items()}
    assert list(defaults.items()) == [
        ("factors", "constant * linear_warmup * rsqrt_decay"),
        ("base_learning_rate", 0.5),
        ("warmup_steps", 1000),
        ("decay_factor", 0.5),
        ("steps_per_decay", 20000),
        ("steps_per_cycle", 100000),
    ]


@pytest.mark.parametrize(
    ("factor", "settings", "rates"),
    [
        ("constant", {"base_learning_rate": 0.25}, {0: 0.25, 10**6: 0.25}),
        ("linear_warmup", {"warmup_steps": 8}, {0: 0, 2: 0.25, 7: 0.875, 8: 1, 100: 1}),
        ("rsqrt_decay", {"warmup_steps": 16}, {0: 0.25, 16: 0.25, 64: 0.125, 10**6: 0.001}),
        ("rsqrt_normalized_decay", {"warmup_steps": 16}, {0: 1, 16: 1, 64: 0.5, 1600: 0.1}),
        ("decay_every", {"decay_factor": 0.1, "steps_per_decay": 10}, {0: 1, 9: 1, 10: 0.1, 29: 0.01, 30: 0.001}),
        (
            "cosine_decay",
            {"warmup_steps": 10, "steps_per_cycle": 40},
            {0: 1, 10: 1, 20: 0.5 + 0.5 * math.sqrt(0.5), 30: 0.5, 50: 1, 70: 0.5},
        ),
    ],
)
def test_each_factor_by_hand(factor, settings, rates):
    schedule = make(factor, **settings)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-6)
        assert float(schedule(np.int32(step))) == pytest.approx(rate, rel=1e-6)


def test_factors_multiply_whatever_the_spaces():
    settings = {"base_learning_rate": 0.5, "warmup_steps": 4, "decay_factor": 0.1, "steps_per_decay": 8}
    for factors in ("constant*linear_warmup * decay_every", " constant  *  decay_every*linear_warmup "):
        schedule = make(factors, **settings)
        assert [float(schedule(step)) for step in (1, 4, 9)] == pytest.approx([0.125, 0.5, 0.05])
    # The documented default at its documented settings: 0.5 * 500 / 1000 / sqrt(1000), and 0.5 / sqrt(4000).
    assert float(make()(500)) == pytest.approx(0.25 / math.sqrt(1000))
    assert float(make()(4000)) == pytest.approx(0.5 / math.sqrt(4000))


@pytest.mark.parametrize("factor", ["linear_warmup", "rsqrt_decay", "rsqrt_normalized_decay", "cosine_decay"])
def test_no_warmup_is_one_step_of_it(factor):
    none, one = make(factor, warmup_steps=0), make(factor, warmup_steps=1)
    for step in range(5):
        assert math.isfinite(float(none(step)))
        assert float(none(step)) == float(one(step))


@pytest.mark.parametrize("factors", ["constant * quadratic", "", "constant * ", "constant, linear_warmup"])
def test_an_unknown_factor_is_named(factors):
    with pytest.raises(ValueError, match="known: constant, linear_warmup, rsqrt_decay") as error:
        make(factors)
    assert repr(factors) in str(error.value)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", run_mlm_flax.SCHEDULES)
def test_named_schedules_are_the_trainers_at_every_step(name, warmup):
    args = SimpleNamespace(learning_rate=3e-4, warmup_steps=warmup, lr_scheduler_type=name)
    ours = run_mlm_flax.create_schedule(args, 40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    stock = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert float(ours(step)) == pytest.approx(stock.get_last_lr()[0], rel=1e-5, abs=1e-10)
        optimizer.step()
        stock.step()
