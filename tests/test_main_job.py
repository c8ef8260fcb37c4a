"""Training and evaluation from end to end, through `main`."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import flags, make_model, read_json
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


def test_the_results_do_not_depend_on_the_progress_bar(text_files, model_folder, tmp_path):
    run_mlm.main(
        flags(model_name_or_path=model_folder, output_dir=tmp_path / "output", do_train=True, disable_tqdm="true")
        + flags(max_steps=2, max_seq_length=16, **text_files)
    )
    assert set(read_json(tmp_path / "output", "train_results.json")) >= RESULT_KEYS["train"]


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


def test_result_folder_is_an_ordinary_transformers_folder(script, text_files, model_folder, tmp_path):
    output = tmp_path / "output"
    script.main(
        flags(model_name_or_path=model_folder, output_dir=output, do_train=True, max_steps=2, max_seq_length=16)
        + flags(**text_files)
    )
    _, loading = transformers.AutoModelForMaskedLM.from_pretrained(output, output_loading_info=True)
    assert not any(loading.values())
    fill = transformers.pipeline("fill-mask", model=str(output), device="cpu")
    guesses = fill("the baker bakes [MASK] every morning .", top_k=3)
    assert len(guesses) == 3
    assert read_json(output, "config.json")["architectures"] == ["BertForMaskedLM"]


def test_an_evaluation_shows_a_few_predictions(script, tmp_path, text_files, caplog):
    folder = make_model(tmp_path / "short", max_position_embeddings=10)
    arguments = flags(model_name_or_path=folder, output_dir=tmp_path / "output", do_eval=True, line_by_line="true")
    script.main(arguments + flags(**text_files))
    assert caplog.text.count("predicted (in the text): ") == 3
    assert caplog.text.count("[MASK]") >= 3
