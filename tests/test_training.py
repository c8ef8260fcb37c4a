"""Training and evaluation from end to end; options of the Trainer that leave the losses as they are."""

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo
import transformers
from conftest import finished_run, flags, make_model, read_json, run_script, sentences, set_up, write_lines
from safetensors.numpy import load_file

import run_mlm

RESULT_KEYS = {
    "train": {
        "epoch",
        "train_loss",
        "train_runtime",
        "train_samples",
        "train_samples_per_second",
        "train_steps_per_second",
    },
    "eval": {
        "epoch",
        "eval_accuracy",
        "eval_loss",
        "eval_masked_share",
        "eval_runtime",
        "eval_samples",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "perplexity",
    },
}


@pytest.mark.parametrize("line_by_line", ["true", "false"])
def test_fine_tuning_learns_and_writes_all_results(script, text_files, model_folder, tmp_path, line_by_line):
    before = script.main(
        flags(model_name_or_path=model_folder, do_eval=True, output_dir=tmp_path / "before", line_by_line=line_by_line)
        + flags(max_seq_length=16, **text_files)
    )
    output = tmp_path / "output"
    metrics = script.main(
        flags(model_name_or_path=model_folder, output_dir=output, do_train=True, do_eval=True, max_seq_length=16)
        + flags(line_by_line=line_by_line, learning_rate=5e-3, lr_scheduler_type="linear", num_train_epochs=4)
        + flags(logging_steps=5, **text_files)
    )
    assert set(read_json(tmp_path / "before", "eval_results.json")) == RESULT_KEYS["eval"] - {"epoch"}
    assert metrics["eval_loss"] < before["eval_loss"] - 0.5
    for split, keys in RESULT_KEYS.items():
        results = read_json(output, f"{split}_results.json")
        assert set(results) - {"total_flos"} == keys  # The Trainer's own estimate.
        assert results.items() <= metrics.items()
    assert set(read_json(output, "all_results.json")) >= RESULT_KEYS["train"] | RESULT_KEYS["eval"]
    state = read_json(output, "trainer_state.json")
    assert state["global_step"] == state["max_steps"] > 0
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step"} <= set(state["log_history"][0])
    assert (Path(output) / "model.safetensors").exists()


@pytest.mark.parametrize("bars", [False, True])
def test_a_log_in_a_file_has_lines_and_no_bars(script, text_files, model_folder, tmp_path, bars):
    arguments = flags(model_name_or_path=model_folder, output_dir=tmp_path / "output", do_train=True, do_eval=True)
    arguments += flags(max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=3, **text_files)
    done = run_script(script.__name__, arguments + flags(disable_tqdm="false") * bars)
    assert done.returncode == 0, done.stderr
    assert ("it/s" in done.stderr) == bars
    reports = re.findall(r"INFO step (\d) of 4 \((\d+)%(, \d:\d\d:\d\d left)?\): (eval_)?loss \d", done.stdout)
    expected = [
        ("2", "50", True, ""),
        ("3", "75", False, "eval_"),
        ("4", "100", True, ""),
        ("4", "100", False, "eval_"),
    ]
    assert [(step, share, bool(left), kind) for step, share, left, kind in reports] == ([] if bars else expected)


def test_bf16_trains_on_a_cpu_and_keeps_float32_weights(script, text_files, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # The Trainer leaves its choice in the environment.
    output = tmp_path / "output"
    settings = {"do_train": True, "max_steps": 3, "max_seq_length": 16, "logging_steps": 1, "dropout_rate": 0}
    settings |= {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "model_name_or_path": model_folder, **text_files}
    losses = []
    for name, bf16 in (("float32", "false"), ("bfloat16", "true")):
        script.main(flags(output_dir=output / name, bf16=bf16, **settings))
        history = read_json(output / name, "trainer_state.json")["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    dtypes = {array.dtype for array in load_file(output / "bfloat16" / "model.safetensors").values()}
    assert dtypes == {np.dtype("float32")}


def test_result_folder_is_an_ordinary_transformers_folder(script):
    output = finished_run(script)
    _, loading = transformers.AutoModelForMaskedLM.from_pretrained(output, output_loading_info=True)
    assert not any(loading.values())
    fill = transformers.pipeline("fill-mask", model=str(output), device="cpu")
    guesses = fill("the baker bakes [MASK] every morning .", top_k=3)
    assert len(guesses) == 3
    assert read_json(output, "config.json")["architectures"] == ["BertForMaskedLM"]


def test_an_evaluation_shows_a_few_predictions(script, tmp_path, text_files, caplog):
    folder = make_model(tmp_path / "short", max_position_embeddings=10)
    arguments = flags(model_name_or_path=folder, output_dir=tmp_path / "output", do_eval=True, line_by_line="true")
    script.main(arguments + flags(eval_mlm_probability=0.1, **text_files))
    messages = [record.getMessage() for record in caplog.records]
    shown = [i for i, message in enumerate(messages) if message.startswith("    predicted (in the text): ")]
    assert len(shown) == 3
    for i in shown:
        assert messages[i - 1].count("[MASK]") == messages[i].count("(") - 1 > 0


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
            counts.append(int((labels >= 0).sum()))
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


@pytest.mark.long
def test_data_workers(train, spawn):
    assert train("workers", dataloader_num_workers=2) == train("plain")


def test_data_workers_start_with_stop_signals_blocked(tmp_path, monkeypatch):
    """A signal to the group must not end a worker, not even before it has run a line of its own."""
    blocked = lambda *loader: signal.pthread_sigmask(signal.SIG_BLOCK, ())  # noqa: E731
    monkeypatch.setattr(torch.utils.data.DataLoader, "_get_iterator", blocked)
    settings = {"model_name_or_path": make_model(tmp_path / "model", num_hidden_layers=1), "max_steps": 9}
    settings |= {"train_file": write_lines(tmp_path / "train.txt", sentences(60)), "output_dir": tmp_path / "output"}
    loader = set_up(run_mlm, flags(**settings, max_seq_length=16, dataloader_num_workers=1)).get_train_dataloader()
    assert getattr(loader, "base_dataloader", loader)._get_iterator() >= {signal.SIGTERM, signal.SIGINT}
    assert not blocked() & {signal.SIGTERM, signal.SIGINT}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # Transformers 5 has another name for it.
@pytest.mark.parametrize("reentrant", ["true", "false"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_gradient_checkpointing(train, model_type, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": f'{{"use_reentrant": {reentrant}}}'}
    checkpointed, counts = train("checkpointed", model_type, **options)
    plain, plain_counts = train("plain", model_type)
    assert counts == plain_counts
    assert_same(checkpointed, plain, rel=1e-4)


def test_gradient_checkpointing_by_the_configuration(train, tmp_path):
    folder = Path(make_model(tmp_path / "configuration"))
    (folder / "config.json").write_text(json.dumps(read_json(folder, "config.json") | {"gradient_checkpointing": True}))
    checkpointed, counts = train("checkpointed", config_name=folder)
    plain, plain_counts = train("plain")
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
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_torch_compile_of_lines_of_any_length(train, compilations, tmp_path):
    # Batches are padded to 8 or 16 tokens; each line has `length` tokens, two of them special.
    lengths = [3, 8, 9, 16, 5, 12, 16, 15, 4]
    lines = [" ".join(["baker"] * (length - 2)) for length in lengths]
    text = {"train_file": write_lines(tmp_path / "lengths.txt", lines), "validation_split_percentage": 1}
    settings = {"line_by_line": "true", "train_batch_size": 1, "max_steps": len(lines)}
    _, counts = train("compiled", torch_compile_backend="aot_eager", **settings, **text)
    assert len(counts) == len(lines)
    assert compilations() == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.pytorch
def test_the_dropout_of_a_micro_batch_is_its_own(tmp_path, monkeypatch):
    """It is a function of seed, step, micro-batch and process alone."""
    settings = {"model_name_or_path": make_model(tmp_path / "model", num_hidden_layers=1), "max_seq_length": 16}
    settings |= {"train_file": write_lines(tmp_path / "train.txt", sentences(60)), "output_dir": tmp_path / "output"}
    trainer = set_up(run_mlm, flags(**settings, max_steps=1, dropout_rate=0.1))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()

    def loss(seed=42, step=0, micro_batch=0, process=0):
        monkeypatch.setattr(type(trainer.args), "process_index", process)
        trainer.args.seed, trainer.state.global_step, trainer.micro_batch = seed, step, micro_batch
        return trainer.training_step(trainer.model, dict(batch), (batch["labels"] >= 0).sum()).item()

    places = [{}, {"seed": 7}, {"step": 1}, {"micro_batch": 1}, {"process": 1}]
    losses = [loss(**place) for place in places]
    assert len(set(losses)) == len(places)
    assert [loss(**place) for place in reversed(places)] == losses[::-1]


@pytest.mark.parametrize("dropout_rate", [0.0, 0.1])
def test_a_pytorch_training_step_drops_and_an_evaluation_does_not(tmp_path, dropout_rate):
    settings = {"model_name_or_path": make_model(tmp_path / "model", num_hidden_layers=1), "max_seq_length": 16}
    settings |= {"train_file": write_lines(tmp_path / "train.txt", sentences(60)), "output_dir": tmp_path / "output"}
    trainer = set_up(run_mlm, flags(**settings, max_steps=1, dropout_rate=dropout_rate))
    batch, losses = next(iter(trainer.get_train_dataloader())), []
    labels = (batch["labels"] >= 0).sum()
    for _ in range(2):
        trainer.model.train()
        losses.append(trainer.training_step(trainer.model, dict(batch), labels).item())
    assert (losses[0] == losses[1]) == (dropout_rate == 0)
    trainer.model.eval()
    sums = [trainer.prediction_step(trainer.model, dict(batch), False)[1] for _ in range(2)]
    assert torch.equal(*sums)
