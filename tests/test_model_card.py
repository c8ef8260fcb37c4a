"""Both scripts write one model card: true about data, results, arguments and versions, and never over a user's file."""

import importlib
import importlib.metadata
import json
import os
import re
from dataclasses import fields
from unittest import mock

import pytest
import yaml
from conftest import SCRIPTS, flags, make_model, read_json, sentences, write_lines
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

import run_mlm

LIBRARIES = {"run_mlm": {"torch", "transformers"}, "run_mlm_flax": {"jax", "flax", "transformers"}}


def run_flags(model_folder, text_files, output, **changes):
    """Return the command line of a run of three steps."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "do_eval": True}
    settings |= {"max_steps": 3, "max_seq_length": 16, "line_by_line": "true", "lr_scheduler_type": "linear"}
    return flags(**settings | text_files | changes)


def section(card, title):
    """Return the text of a section of a card."""
    return card.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(card, title):
    """Return {first cell: second cell} of the table of a section."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", section(card, title), re.MULTILINE)
    return dict(rows[2:])


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """{script: (output folder, card)} of the same run of both scripts, in files of one machine."""
    folder = tmp_path_factory.mktemp("cards")
    model = make_model(folder / "model")
    files = {"train_file": write_lines(folder / "train.txt", sentences(100))}
    files["validation_file"] = write_lines(folder / "validation.txt", sentences(20, seed=1))
    made = {}
    for name in SCRIPTS:
        output = folder / name / "tiny-mlm"
        with mock.patch.dict(os.environ):  # The Trainer tells Accelerate there of `--bf16`.
            importlib.import_module(name).main(run_flags(model, files, output, token="hf_cardsecret", bf16="true"))
        made[name] = output, (output / "README.md").read_text(encoding="utf-8")
    return made


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_metadata_is_what_the_hub_reads(cards, name):
    output, _ = cards[name]
    results = read_json(output, "eval_results.json")
    data = ModelCard.load(output / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "fill-mask", "tiny-mlm")
    assert data.base_model is None  # A folder of this machine.
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    expected = {"loss": results["eval_loss"], "accuracy": results["eval_accuracy"]}
    assert values == expected | {"perplexity": results["perplexity"]}
    assert {(result.task_type, result.dataset_name) for result in data.eval_results} == {
        ("fill-mask", "validation.txt")
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_tables_are_true(cards, name):
    output, card = cards[name]
    results = read_json(output, "all_results.json")
    data = table(card, "Data")
    assert (data["train file"], data["validation file"]) == ("train.txt", "validation.txt")
    assert data["train data"].startswith("100 texts, 100 samples, ")
    shown = {key: float(value) for key, value in table(card, "Results").items()}
    assert shown == {key: pytest.approx(results[key], rel=1e-3) for key in shown}
    assert shown.keys() == {"eval_loss", "eval_accuracy", "perplexity", "train_loss"}
    versions = table(card, "Versions")
    assert LIBRARIES[name] < versions.keys()
    assert {versions[library] == importlib.metadata.version(library) for library in LIBRARIES[name]} == {True}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_arguments_are_a_configuration_of_the_same_run(cards, name, tmp_path, monkeypatch):
    _, card = cards[name]
    script = importlib.import_module(name)
    path = tmp_path / "again.json"
    path.write_text(re.search(r"```json\n(.*?)```", section(card, "Arguments"), re.DOTALL)[1])
    given = run_flags(
        "model", {"train_file": "train.txt", "validation_file": "validation.txt"}, "tiny-mlm", bf16="true"
    )
    monkeypatch.chdir(tmp_path)
    for group, other in zip(script.parse_args([str(path)]), script.parse_args(given)):
        for item in fields(group):
            if item.name != "logging_dir":  # It holds the time of day.
                assert getattr(group, item.name) == getattr(other, item.name), item.name
    assert json.loads(path.read_text())["max_steps"] == 3


def test_both_scripts_write_the_same_text(cards):
    """But for measured numbers, the libraries, and arguments that are a default in one script."""
    texts = []
    for name, (_, card) in cards.items():
        before, versions = card.split("\n## Versions\n")
        assert versions.count("<!--") == 1
        text = re.sub(r"\d+\.[\d.e-]+%?", "0", before).replace(f"`{name}.py`", "")
        texts.append([line for line in text.splitlines() if not re.search("line_by_line|lr_scheduler_type", line)])
    assert texts[0] == texts[1]
    assert len(texts[0]) > 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_of_this_machine_is_in_a_card(cards, name):
    output, card = cards[name]
    assert "hf_cardsecret" not in card
    assert str(output.parent.parent) not in card


def test_a_hub_model_and_data_set_are_named(script):
    arguments = flags(model_name_or_path="some/base", dataset_name="some/text", output_dir="out")
    model_args, data_args, training_args = script.parse_args([*arguments, "--hub_model_id", "me/named"])
    metrics = {"train_loss": 1.0, "eval_loss": 900.0, "eval_accuracy": 0.1, "perplexity": float("inf")}
    card = script.model_card({}, model_args, data_args, training_args, {}, metrics)
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["base_model"], data["datasets"]) == ("some/base", ["some/text"])
    (entry,) = data["model-index"]
    assert entry["name"] == "named"
    (result,) = entry["results"]
    assert [metric["type"] for metric in result["metrics"]] == ["loss", "accuracy"]  # Infinity is no number there.
    assert "fine-tuned from `some/base`" in card
    untrained = script.model_card({}, model_args, data_args, training_args, {}, {"train_loss": 1.0})
    assert "model-index" not in untrained


def test_a_card_is_written_anew_until_someone_changes_it(script, tmp_path, caplog):
    path = tmp_path / "README.md"
    script.write_card(tmp_path, "first é\n")
    script.write_card(tmp_path, "second\n")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("second\n")
    assert caplog.text == ""
    for changed in (text.replace("second", "mine"), f"{text}mine\n", "mine\n", "", "\ufeffmine é"):
        path.write_text(changed, encoding="utf-8")
        caplog.clear()
        script.write_card(tmp_path, "third\n")
        assert path.read_text(encoding="utf-8") == changed
        assert f"{path} is kept" in caplog.text
    path.write_bytes(b"\xff\xfe")
    script.write_card(tmp_path, "third\n")
    assert path.read_bytes() == b"\xff\xfe"
    assert [item.name for item in tmp_path.iterdir()] == ["README.md"]


def test_a_users_file_is_kept_by_a_run(script, model_folder, text_files, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "README.md").write_text("mine\n")
    script.main(run_flags(model_folder, text_files, output, overwrite_output_dir=True))
    assert (output / "README.md").read_text() == "mine\n"
    assert load_file(output / "model.safetensors")


def test_an_evaluation_writes_no_card(script, model_folder, text_files, tmp_path):
    output = tmp_path / "output"
    script.main(run_flags(model_folder, text_files, output, do_train="false"))
    assert not (output / "README.md").exists()


def test_the_trainer_writes_no_card_of_its_own(model_folder, text_files, tmp_path, monkeypatch):
    monkeypatch.setattr(run_mlm.Trainer, "create_model_card", None)
    run_mlm.main(run_flags(model_folder, text_files, tmp_path / "output"))
    assert (tmp_path / "output" / "README.md").read_text().count("# output") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_addresses_and_tokens_are_not_on_the_card(name):
    argv = "--train_file my.txt --output_dir out --hub_token hf_cardsecret"
    argv += " --coordinator_address 10.0.0.1:1234 --num_processes 2 --process_id 1" if name == "run_mlm_flax" else ""
    settings = importlib.import_module(name).given_settings(argv.split())
    assert settings == {"train_file": ["my.txt"], "output_dir": "out"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_row_of_a_table_is_one_line(name):
    table = importlib.import_module(name).markdown_table(["a", "b"], [["one\ntwo", "x|y"]])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| one two | x\\|y |"]
