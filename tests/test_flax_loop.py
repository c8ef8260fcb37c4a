"""The Flax loop: few compilations, none repeated; no full logits; dropout in both scripts."""

import functools
import logging
import math
import os
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, flags, make_model, read_json, sentences, set_up, write_lines

import run_mlm_flax

ROWS, LENGTH = 8, 16


@pytest.fixture
def arguments(tmp_path):
    """A command line of a tiny model, rows of 16 tokens."""
    return flags(
        model_name_or_path=make_model(tmp_path / "model", num_hidden_layers=1),
        train_file=write_lines(tmp_path / "train.txt", sentences(100)),
        output_dir=tmp_path / "output",
        **{"line_by_line": "false", "max_seq_length": LENGTH, "train_batch_size": ROWS, "logging_steps": 1},
        **{"save_strategy": "no", "eval_strategy": "no"},
    )


@pytest.fixture
def compiled(caplog):
    """Return a function that lists, in order, the shapes of the inputs of all that was compiled."""
    caplog.set_level(logging.INFO, logger="jax")
    before = jax.config.jax_log_compiles
    jax.config.update("jax_log_compiles", True)
    yield lambda: [
        re.findall(r"(\w+)\[([\d,]*)\]", message)
        for message in (record.getMessage() for record in caplog.records)
        if message.startswith("Compiling ") and " with global shapes and types " in message
    ]
    jax.config.update("jax_log_compiles", before)


def test_one_compilation_for_each_shape(arguments, compiled, caplog, tmp_path):
    lines = write_lines(tmp_path / "lines.txt", [words for words in ("boats", "old boats " * 9) for _ in range(6)])
    arguments = [*arguments, "--train_file", lines, "--line_by_line", "--group_by_length", "--train_batch_size", "2"]
    counts, log = [], run_mlm_flax.MaskedLMTrainer.log

    def record(run, *logs):
        log(run, *logs)
        counts.append(len(compiled()))

    with mock.patch.object(run_mlm_flax.MaskedLMTrainer, "log", record):
        run_mlm_flax.main([*arguments, "--do_train", "--max_steps", "9"])
    # The step and nothing else is made for the device's batches and the parameters.
    steps = [shapes for shapes in compiled() if {("int32", "1,1,2,8"), ("int32", "1,1,2,16")} & set(shapes)]
    assert len(steps) == 2 and min(map(len, steps)) > 20
    assert len(counts) == 10  # Nine reports and that of the whole run.
    assert counts[0] > 0 and len(set(counts[:9])) == 2  # Only the first step of a shape compiles anything.


def test_at_most_six_lengths_in_line_by_line_mode(arguments):
    more = ("--line_by_line", "--max_seq_length", "64", "--train_batch_size", "3", "--dataloader_drop_last", "false")
    run = set_up(run_mlm_flax, [*arguments, *more])
    shapes, lengths = set(), set()
    for keys in run.plan.steps():  # Three epochs, whose last batches are not full.
        batch = run.batch(run.train_dataset, keys, 3)
        batch = run_mlm_flax.select_slots(batch, run.needed_slots(batch))
        shapes.add(tuple(array.shape for array in batch.values()))
        lengths.add(batch["input_ids"].shape[-1])
    assert 1 < len(lengths) <= 6
    assert len(shapes) == len(lengths)  # For each length one K.


def sizes(jaxpr):
    """Yield the number of elements of each array in a jaxpr and those within it."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda item: hasattr(item, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def largest_array(function, *args):
    """Return the number of elements of the largest array that a function computes."""
    found = list(sizes(jax.make_jaxpr(function)(*args).jaxpr))
    assert len(found) > 100
    return max(found)


@pytest.mark.parametrize("dense_head", ["false", "true"])
def test_no_step_has_logits_of_all_positions(arguments, dense_head):
    run = set_up(run_mlm_flax, [*arguments, "--max_steps", "1", "--dense_head", dense_head])
    full = ROWS * LENGTH * run.model.config.vocab_size
    batch = run.batch(run.train_dataset, next(run.plan.steps()), ROWS)
    batch = run_mlm_flax.select_slots(batch, run.needed_slots(batch))
    optimizer = run_mlm_flax.TrainState.create(
        apply_fn=run.apply_fn,
        params=run.params,
        tx=run_mlm_flax.create_optimizer(run.args, lambda step: 1e-3),
        grad_norm=np.zeros((), np.float32),
    )
    step = jax.vmap(run_mlm_flax.training_step, (None, 0, 0), axis_name="batch")
    largest = largest_array(step, optimizer, batch, jax.random.split(jax.random.key(0), 1))
    assert (largest >= full) == (dense_head == "true")
    eval_step = functools.partial(run_mlm_flax.eval_step, apply_fn=run.apply_fn)
    batch = {name: array[:, 0] for name, array in batch.items()}
    largest = largest_array(jax.vmap(eval_step, (None, 0), axis_name="batch"), run.params, batch)
    assert (largest >= full) == (dense_head == "true")


@pytest.mark.parametrize("source", ["config_name", "model_name_or_path"])
def test_a_model_is_made_without_logits_of_all_positions(tmp_path, source):
    folder = make_model(tmp_path / "model")
    args = run_mlm_flax.ModelArguments(**{source: folder, "tokenizer_name": folder})
    tokenizer = run_mlm_flax.load_tokenizer(args)
    config, training_args = run_mlm_flax.load_config(args, tokenizer), run_mlm_flax.TrainingArguments()
    model, _ = run_mlm_flax.load_model(args, config, tokenizer, training_args)
    ids = np.ones((1, 1), np.int32)
    assert largest_array(model.init, jax.random.key(0), ids, ids) == config.vocab_size * config.hidden_size


PROGRAM = """
import json, os, runpy, sys
import jax

events = {"cache_hits": 0, "cache_misses": 0}

def count(event, **others):
    if event.startswith("/jax/compilation_cache/cache_"):
        events[event.rsplit("/", 1)[1]] += 1

jax.monitoring.register_event_listener(count)
script, report, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
with open(report, "w") as file:
    json.dump(events, file)
"""


def start(tmp_path, name, arguments):
    """Run the script in a process; return how often it found compiled code where the script keeps it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment["HF_HOME"] = str(tmp_path / "home")
    program, report = tmp_path / "program.py", tmp_path / f"{name}.json"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(ROOT / "run_mlm_flax.py"), str(report), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return read_json(report)


def test_a_second_process_compiles_nothing(arguments, tmp_path):
    arguments = [*arguments, "--do_train", "--max_steps", "2", "--overwrite_output_dir"]
    first = start(tmp_path, "first", arguments)
    kept = {path.name for path in (tmp_path / "home" / "jax").iterdir()}
    second = start(tmp_path, "second", arguments)
    assert first["cache_misses"] > 10 and len(kept) > 10
    assert second["cache_misses"] == 0 and second["cache_hits"] >= first["cache_misses"]
    assert {path.name for path in (tmp_path / "home" / "jax").iterdir()} == kept


def test_compiled_code_that_cannot_be_read_is_replaced(arguments, tmp_path):
    arguments = [*arguments, "--do_train", "--max_steps", "1", "--overwrite_output_dir"]
    start(tmp_path, "first", arguments)
    entries = list((tmp_path / "home" / "jax").glob("*-cache"))
    for path in entries:  # As if the process had been killed while it wrote.
        path.write_bytes(path.read_bytes()[:100])
    damaged, repaired = (start(tmp_path, name, arguments) for name in ("damaged", "repaired"))
    assert damaged["cache_misses"] >= len(entries) > 10
    assert repaired["cache_misses"] == 0


def assert_share(kept, probability):
    """Check the share of True within five standard errors."""
    error = math.sqrt(probability * (1 - probability) / kept.size)
    assert kept.mean() == pytest.approx(probability, abs=5 * error)


def drop(inputs, rate, key=0):
    return run_mlm_flax.fast_dropout(inputs, rate, jax.random.key(key))


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


def test_flax_masks_are_those_of_their_keys():
    inputs = jnp.ones((6, 50, 70))
    one, again, other = (np.asarray(drop(inputs, 0.5, key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() == pytest.approx(0.5, abs=0.02)


def test_the_flax_model_drops_with_a_key_and_not_without(arguments):
    run = set_up(run_mlm_flax, [*arguments, "--max_steps", "1"])
    generator = np.random.default_rng(0)
    batch = {"input_ids": generator.integers(5, 50, (ROWS, LENGTH)), "attention_mask": np.ones((ROWS, LENGTH), int)}
    batch |= {"positions": np.arange(0, 40, 5), "labels": np.zeros(8, int)}
    logits = jax.jit(functools.partial(run_mlm_flax.masked_logits, model=run.model))
    one, again, other = (logits(run.params, batch, jax.random.key(key)) for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 1e-3
    np.testing.assert_array_equal(logits(run.params, batch), logits(run.params, batch))
