"""The model card: metadata that the hub reads, true results, nothing of this machine."""

import importlib
import os
from unittest import mock

import pytest
from conftest import INSTALLED, flags, make_model, read_json, sentences, write_lines
from huggingface_hub import ModelCard


def run_flags(model_folder, text_files, output, **changes):
    """Return the command line of a run of three steps."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "do_eval": True}
    settings |= {"max_steps": 3, "max_seq_length": 16, "line_by_line": "true", "lr_scheduler_type": "linear"}
    return flags(**settings | text_files | changes)


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """{script: output folder} of the same run of the scripts."""
    folder = tmp_path_factory.mktemp("cards")
    model, made = make_model(folder / "model"), {}
    files = {"train_file": write_lines(folder / "train.txt", sentences(100))}
    files["validation_file"] = write_lines(folder / "validation.txt", sentences(20, seed=1))
    for name in INSTALLED:
        made[name] = folder / name / "tiny-mlm"
        with mock.patch.dict(os.environ):  # The Trainer tells Accelerate there of `--bf16`.
            importlib.import_module(name).main(run_flags(model, files, made[name], token="hf_cardsecret"))
    return made


@pytest.mark.parametrize("name", INSTALLED)
def test_the_metadata_is_what_the_hub_reads(cards, name):
    data = ModelCard.load(cards[name] / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == (None if name == "run_mlm" else "fill-mask")  # The hub finds it in config.json.
    assert data.base_model is None  # A folder of this machine.
    assert "masked-language-modeling" in data.tags


@pytest.mark.parametrize("name", INSTALLED)
def test_the_results_are_true(cards, name):
    text = (cards[name] / "README.md").read_text(encoding="utf-8")
    results = read_json(cards[name], "eval_results.json")
    for shown, key in (("Loss", "eval_loss"), ("Accuracy", "eval_accuracy"), ("Perplexity", "perplexity")):
        (line,) = [line for line in text.lower().splitlines() if line.startswith(f"- {shown.lower()}: ")]
        assert float(line.split(": ")[1]) == pytest.approx(results[key], rel=1e-3)
    assert "# tiny-mlm" in text


@pytest.mark.parametrize("name", INSTALLED)
def test_nothing_of_this_machine_is_in_a_card(cards, name):
    text = (cards[name] / "README.md").read_text(encoding="utf-8")
    assert "hf_cardsecret" not in text
    assert str(cards[name].parent.parent) not in text


def test_a_new_model_is_not_called_fine_tuned(script, model_folder, text_files, tmp_path):
    settings = {"config_name": model_folder, "tokenizer_name": model_folder, "output_dir": tmp_path / "o"}
    settings |= {"do_train": True, "max_steps": 1, "max_seq_length": 16, **text_files}
    script.main(flags(**settings))
    assert "fine-tuned" not in (tmp_path / "o" / "README.md").read_text(encoding="utf-8")


def test_an_evaluation_writes_no_card(script, model_folder, text_files, tmp_path):
    script.main(run_flags(model_folder, text_files, tmp_path / "output", do_train="false"))
    assert not (tmp_path / "output" / "README.md").exists()
