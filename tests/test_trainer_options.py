"""Options of the `Trainer` that change how a step is computed, not what: the losses stay those of a plain run."""

import multiprocessing
import os
from unittest import mock

import pytest
import torch
import torch._dynamo
from conftest import flags, make_model, read_json, sentences, write_lines

import run_mlm

STEPS = 6


@pytest.fixture
def train(tmp_path):
    """Return a function that trains through `main` and returns the logged [(loss, gradient norm)] and the K of each."""
    settings = {
        "train_file": write_lines(tmp_path / "train.txt", sentences(60)),
        **{"do_train": True, "line_by_line": "false", "max_seq_length": 16, "train_batch_size": 8, "logging_steps": 1},
        **{"dropout_rate": 0.0, "learning_rate": 2e-3, "lr_scheduler_type": "constant", "save_strategy": "no"},
        **{"report_to": "none", "max_steps": STEPS},
    }

    def run(name, model_type="bert", **changes):
        folder, counts = make_model(tmp_path / f"model-{model_type}", model_type), []
        masked_logits = run_mlm.MaskedLMTrainer.masked_logits

        def record(trainer, model, inputs):
            logits, labels = masked_logits(trainer, model, inputs)
            assert trainer.sparse_start is not None
            counts.append(len(labels))
            return logits, labels

        # The Trainer tells Accelerate through the environment what the arguments say, and leaves it there.
        with mock.patch.dict(os.environ), mock.patch.object(run_mlm.MaskedLMTrainer, "masked_logits", record):
            run_mlm.main(flags(**{**settings, **changes}, model_name_or_path=folder, output_dir=tmp_path / name))
        history = read_json(tmp_path, name, "trainer_state.json")["log_history"]
        return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry], counts

    return run


def assert_same(one, other, rel):
    assert len(one) == len(other) == STEPS
    for values, others in zip(one, other):
        assert values == pytest.approx(others, rel=rel)


def test_bf16(train):
    plain, plain_counts = train("plain")
    halved, counts = train("bf16", bf16=True)
    assert counts == plain_counts
    assert halved != plain
    assert_same(halved, plain, rel=2e-2)
    assert halved[-1][0] < halved[0][0] - 0.1


@pytest.fixture
def spawn():
    """Start processes anew, not forked as Linux does: another test may have begun the threads of JAX in this one."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_data_workers(train, spawn):
    assert train("workers", dataloader_num_workers=2) == train("plain")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # Transformers 5 has another name for it.
@pytest.mark.parametrize("reentrant", ["true", "false"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_gradient_checkpointing(train, model_type, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": f'{{"use_reentrant": {reentrant}}}'}
    checkpointed, counts = train("checkpointed", model_type, **options)
    plain, plain_counts = train("plain", model_type)
    assert counts == plain_counts
    assert_same(checkpointed, plain, rel=1e-4)


def test_group_by_length(train):
    # At a learning rate of 0 a loss depends on its samples alone, and an epoch has the same ones in any order.
    settings = {"line_by_line": True, "learning_rate": 0.0, "train_batch_size": 10, "max_steps": 6}
    grouped, counts = train("grouped", group_by_length=True, **settings)
    plain, plain_counts = train("plain", **settings)
    assert counts != plain_counts and sum(counts) == sum(plain_counts)
    sums = [sum(loss * count for (loss, _), count in zip(*run)) for run in ((grouped, counts), (plain, plain_counts))]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.fixture
def compilations():
    """Return a function that tells the number of graphs compiled since the beginning of the test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


# Of the compiler itself, and of what it imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_torch_compile(train, compilations, model_type):
    # The short batch at the end of an epoch would be another shape.
    plain, plain_counts = train("plain", model_type, dataloader_drop_last=True)
    graphs = []
    training_step = run_mlm.MaskedLMTrainer.training_step

    def record(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        graphs.append(compilations())
        return loss

    options = {"dataloader_drop_last": True, "torch_compile_backend": "aot_eager"}
    with mock.patch.object(run_mlm.MaskedLMTrainer, "training_step", record):
        # The same tracing as of the default backend, whose code a C++ compiler makes in a minute.
        compiled, counts = train("compiled", model_type, **options)
    assert counts == plain_counts and len(set(counts)) > 3
    assert_same(compiled, plain, rel=1e-4)
    assert graphs == [1] * STEPS  # The whole model is one graph, whatever the number of labels.
