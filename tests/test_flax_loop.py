"""The Flax loop: few compilations, none repeated; one copy of the weights; a host that works ahead; no full logits."""

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
from setups import set_up

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


def test_one_compilation_for_all_steps_of_one_shape(arguments, compiled, caplog):
    counts, log = [], run_mlm_flax.Run.log

    def record(run, logs):
        log(run, logs)
        counts.append(len(compiled()))

    with mock.patch.object(run_mlm_flax.Run, "log", record):
        run_mlm_flax.main([*arguments, "--do_train", "--max_steps", "5"])
    started = [message for message in caplog.messages if message.startswith(STARTED)]
    assert started == [f"{STARTED} (1, {ROWS}, {LENGTH})."]
    # The step and nothing else is made for the device's batches and the parameters.
    steps = [shapes for shapes in compiled() if ("int32", f"1,{ROWS},{LENGTH}") in shapes]
    assert len(steps) == 1 and len(steps[0]) > 20
    assert len(counts) == 6  # Five reports and that of the whole run.
    assert counts[0] > 0 and set(counts[:5]) == {counts[0]}  # Once the first step is done, nothing is compiled.


def test_one_compilation_for_each_length_in_line_by_line_mode(arguments, compiled, caplog, tmp_path):
    lines = write_lines(tmp_path / "lines.txt", [words for words in ("boats", "old boats " * 9) for _ in range(6)])
    arguments = [*arguments, "--train_file", lines, "--line_by_line", "--group_by_length", "--train_batch_size", "2"]
    run_mlm_flax.main([*arguments, "--do_train", "--max_steps", "9"])
    started = [message for message in caplog.messages if message.startswith(STARTED)]
    assert started == [f"{STARTED} (1, 2, {length})." for length in (16, 8)]
    assert len([shapes for shapes in compiled() if {("int32", "1,2,8"), ("int32", "1,2,16")} & set(shapes)]) == 2


def test_at_most_six_lengths_in_line_by_line_mode(arguments, caplog):
    run = set_up(run_mlm_flax, [*arguments, "--line_by_line", "--max_seq_length", "64", "--train_batch_size", "2"])
    caplog.clear()
    keys, lengths = run_mlm_flax.training_order(run), set()
    for _ in range(200):
        lengths.add(run.device_batch(run.tokenized["train"], next(keys), 2)["input_ids"].shape[-1])
    started = [message for message in caplog.messages if message.startswith(STARTED)]
    assert 1 < len(lengths) <= 6
    assert len(started) == len(run.seen_shapes)
    assert {int(re.search(r"(\d+)\)", message)[1]) for message in started} == lengths
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
            assert started[i + 1].wait(60)  # Nobody has asked for it yet.
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
    before = threading.active_count()
    prepared = run_mlm_flax.prefetch(str, range(5))
    next(prepared)
    prepared.close()  # As a signal does that stops the training.
    assert threading.active_count() == before


def sizes(jaxpr):
    """Yield the number of elements of each array in a jaxpr and those within it."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda item: hasattr(item, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("dense_head", ["false", "true"])
def test_a_training_step_has_no_logits_of_all_positions(arguments, dense_head):
    run = set_up(run_mlm_flax, [*arguments, "--max_steps", "1", "--dense_head", dense_head])
    full = ROWS * LENGTH * run.model.config.vocab_size
    batch = run.device_batch(run.tokenized["train"], range(ROWS), ROWS)
    optimizer = run_mlm_flax.Optimizer.create(
        apply_fn=run.apply_fn,
        params=run.model.params,
        tx=run_mlm_flax.create_optimizer(run.args, run.schedule),
        grad_norm=np.zeros((), np.float32),
    )
    step = jax.make_jaxpr(jax.vmap(run_mlm_flax.training_step, (None, 0, 0), axis_name="batch"))
    found = list(sizes(step(optimizer, batch, jax.random.split(jax.random.key(0), 1)).jaxpr))
    assert len(found) > 200
    assert (max(found) >= full) == (dense_head == "true")


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
    """Run the script in a process whose compiled code is kept where the script keeps it; return its events."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "JAX_DUMP_IR_TO": str(tmp_path / f"{name}-ir")}
    program, report = tmp_path / "program.py", tmp_path / f"{name}.json"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(ROOT / "run_mlm_flax.py"), str(report), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return read_json(report)


def largest_array(folder):
    """Return the number of elements of the largest array in the programs that JAX wrote there."""
    found = [
        math.prod(map(int, shape[:-1].split("x")))
        for path in folder.glob("*.mlir")
        for shape in re.findall(r"tensor<((?:\d+x)+)[a-z]", path.read_text())
    ]
    return len(found), max(found)


def test_a_second_process_compiles_nothing_and_neither_makes_full_logits(arguments, tmp_path):
    arguments = [*arguments, "--do_train", "--max_steps", "2", "--overwrite_output_dir"]
    first, second = (start(tmp_path, name, arguments) for name in ("first", "second"))
    assert first["cache_misses"] > 10
    assert second["cache_misses"] == 0 and second["cache_hits"] >= first["cache_misses"]
    assert not first["torch"]
    # From the start to the end of the run, initialisation of the model included.
    vocabulary = len((tmp_path / "model" / "vocab.txt").read_text().splitlines())
    for name in ("first", "second"):
        count, largest = largest_array(tmp_path / f"{name}-ir")
        assert count > 1000
        assert largest < ROWS * LENGTH * vocabulary
