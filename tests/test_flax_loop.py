"""The Flax loop: few compilations, none repeated; one copy of the weights; a host that works ahead; no full logits."""

import functools
import gc
import logging
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import ROOT, flags, make_model, read_json, sentences, write_lines
from setups import NotTrainedError, set_up

import run_mlm_flax

ROWS, LENGTH = 8, 16
STARTED = "Compiling a step for batches of shape"


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
    counts, log = [], run_mlm_flax.Run.log

    def record(run, logs):
        log(run, logs)
        counts.append(len(compiled()))

    with mock.patch.object(run_mlm_flax.Run, "log", record):
        run_mlm_flax.main([*arguments, "--do_train", "--max_steps", "9"])
    started = [message for message in caplog.messages if message.startswith(STARTED)]
    assert sorted(started) == [f"{STARTED} (1, 2, {length})." for length in (16, 8)]
    # The step and nothing else is made for the device's batches and the parameters.
    steps = [shapes for shapes in compiled() if {("int32", "1,2,8"), ("int32", "1,2,16")} & set(shapes)]
    assert len(steps) == 2 and min(map(len, steps)) > 20
    assert len(counts) == 10  # Nine reports and that of the whole run.
    assert counts[0] > 0 and len(set(counts[:9])) == 2  # Only the first step of a shape compiles anything.


def test_the_evaluation_step_is_named_as_it_compiles(arguments, tmp_path, caplog):
    arguments = [*arguments, "--validation_file", write_lines(tmp_path / "validation.txt", sentences(20))]
    run_mlm_flax.main([*arguments, "--do_train", "--do_eval", "--max_steps", "2", "--eval_batch_size", str(ROWS)])
    shape = f"for batches of shape (1, {ROWS}, {LENGTH})."  # One shape, two steps.
    started = [message for message in caplog.messages if message.startswith("Compiling")]
    assert started == [f"Compiling a step {shape}", f"Compiling an evaluation step {shape}"]


def test_at_most_six_lengths_in_line_by_line_mode(arguments, caplog):
    more = ("--line_by_line", "--max_seq_length", "64", "--train_batch_size", "3", "--dataloader_drop_last", "false")
    run = set_up(run_mlm_flax, [*arguments, *more])
    caplog.clear()
    keys, shapes, lengths = run_mlm_flax.training_order(run), set(), set()
    for _ in range(200):  # Six epochs, whose last batches are not full.
        batch = run.device_batch(run.tokenized["train"], next(keys), 3)
        shapes.add(tuple(array.shape for array in batch.values()))
        lengths.add(batch["input_ids"].shape[-1])
    started = [message for message in caplog.messages if message.startswith(STARTED)]
    assert sorted(started) == sorted(f"{STARTED} (1, 3, {length})." for length in lengths)
    assert 1 < len(lengths) <= 6
    assert len(shapes) == len(lengths)  # For each length one K.
    for longest in (8, 16, 61, 62, 64, 128, 500, 512, 1000):
        run.max_seq_length = longest
        padded = [run.padded_length(length) for length in range(1, longest + 1)]
        assert len(set(padded)) <= 6
        assert all(length <= length_of_batch <= longest for length, length_of_batch in enumerate(padded, 1))


def test_the_host_keeps_no_second_copy_of_the_parameters(arguments):
    run = set_up(run_mlm_flax, [*arguments, "--max_steps", "1"])
    shapes = jax.tree.map(np.shape, run.model.params)
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(run.model.params)]
    assert len(kept) > 10 and all(reference() is not None for reference in kept)
    optimizer, _ = run_mlm_flax.create_training_state(run, None)
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(run.model.params))
    assert jax.tree.map(np.shape, run.model.params) == shapes
    assert jax.tree.map(lambda leaf: leaf.shape[1:], optimizer.params) == shapes


def test_nor_does_it_where_it_only_evaluates(arguments):
    def evaluate(run, params):
        raise NotTrainedError(run.model.params, params)

    with mock.patch.object(run_mlm_flax, "evaluate", evaluate), pytest.raises(NotTrainedError) as caught:
        run_mlm_flax.main([*arguments, "--do_eval"])
    shapes, params = caught.value.args
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(shapes))
    assert jax.tree.map(lambda leaf: leaf.shape[1:], params) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_a_step_writes_over_the_buffers_of_the_one_before(arguments):
    states, create = [], run_mlm_flax.create_training_state

    def record(*args):
        states.append(create(*args))
        return states[0]

    with mock.patch.object(run_mlm_flax, "create_training_state", record):
        run_mlm_flax.main([*arguments, "--do_train", "--max_steps", "1"])
    (optimizer, dropout_rngs), *others = states
    leaves = jax.tree.leaves((optimizer.step, optimizer.params, optimizer.opt_state, dropout_rngs))
    assert len(leaves) > 60 and not others
    assert all(leaf.is_deleted() for leaf in leaves)


def test_prefetch_prepares_the_next_item_while_one_is_used():
    started, threads = {i: threading.Event() for i in range(4)}, set()

    def prepare(i):
        threads.add(threading.get_ident())
        started[i].set()
        return i * i

    prepared = run_mlm_flax.prefetch(prepare, range(4))
    assert not started[0].is_set()
    for i in range(4):
        assert next(prepared) == i * i
        if i < 3:
            assert started[i + 1].wait(30)  # Nobody has asked for it yet.
        if i < 2:
            assert not started[i + 2].is_set()  # And no more than that is kept in memory.
    assert list(prepared) == []
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_prefetch_yields_in_order_and_ends_with_its_items():
    assert list(run_mlm_flax.prefetch(str, range(50))) == [str(i) for i in range(50)]
    assert list(run_mlm_flax.prefetch(str, [7])) == ["7"]
    assert list(run_mlm_flax.prefetch(str, [])) == []


def test_prefetch_passes_exceptions_on():
    prepared = run_mlm_flax.prefetch(lambda i: 1 // (2 - i), range(5))
    assert [next(prepared), next(prepared)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(prepared)

    def items():
        yield 1
        yield 2
        raise KeyError("items")

    prepared, seen = run_mlm_flax.prefetch(str, items()), []
    with pytest.raises(KeyError, match="items"):
        seen.extend(prepared)


def test_prefetch_leaves_no_thread_behind():
    threads = []
    prepared = run_mlm_flax.prefetch(lambda i: threads.append(threading.current_thread()), range(5))
    next(prepared)
    assert threads[0].is_alive()
    prepared.close()  # As a signal does that stops the training.
    assert not threads[0].is_alive()


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
    batch = run.device_batch(run.tokenized["train"], range(ROWS), ROWS)
    optimizer = run_mlm_flax.Optimizer.create(
        apply_fn=run.apply_fn,
        params=run.model.params,
        tx=run_mlm_flax.create_optimizer(run.args, run.schedule),
        grad_norm=np.zeros((), np.float32),
    )
    step = jax.vmap(run_mlm_flax.training_step, (None, 0, 0), axis_name="batch")
    largest = largest_array(step, optimizer, batch, jax.random.split(jax.random.key(0), 1))
    assert (largest >= full) == (dense_head == "true")
    eval_step = functools.partial(run_mlm_flax.eval_step, apply_fn=run.apply_fn)
    largest = largest_array(jax.vmap(eval_step, (None, 0), axis_name="batch"), run.model.params, batch)
    assert (largest >= full) == (dense_head == "true")


@pytest.mark.parametrize("source", ["config_name", "model_name_or_path"])
def test_a_model_is_made_without_logits_of_all_positions(tmp_path, source):
    folder = make_model(tmp_path / "model")
    args = run_mlm_flax.ModelArguments(**{source: folder, "tokenizer_name": folder})
    config, tokenizer = run_mlm_flax.load_config(args), run_mlm_flax.load_tokenizer(args)
    largest = largest_array(lambda: run_mlm_flax.load_model(args, config, tokenizer).params)
    assert largest == config.vocab_size * config.hidden_size  # Nothing is larger than the largest parameter.


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
    json.dump(events | {"torch": "torch" in sys.modules}, file)
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
    assert not first["torch"]
