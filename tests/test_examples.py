"""Every usage example of the documents, as printed, and the quickstart."""

import json
import math
import shlex
import subprocess
import sys
from collections import Counter

import pandas
import pytest
from conftest import ROOT, flags, make_model, read_json, run_script, sentences, write_lines
from transformers import AutoTokenizer

# Word for word, but for the path of the scripts and the folder under /tmp.
EXAMPLES = {
    "import of run_mlm": r"""
python run_mlm.py \
    --model_name_or_path bert-base-uncased \
    --dataset_name wikitext \
    --dataset_config_name wikitext-2-raw-v1 \
    --output_dir ./output/test-mlm
""",
    "bert on wikitext": r"""
python run_mlm.py \
    --model_name_or_path bert-base-uncased \
    --dataset_name wikitext \
    --dataset_config_name wikitext-2-raw-v1 \
    --do_train \
    --do_eval \
    --output_dir ./output/mlm-bert \
    --per_device_train_batch_size 8 \
    --num_train_epochs 3
""",
    "roberta line by line": r"""
python run_mlm.py \
    --model_name_or_path roberta-base \
    --train_file ./data/train.txt \
    --validation_file ./data/valid.txt \
    --do_train \
    --do_eval \
    --line_by_line \
    --max_seq_length 128 \
    --mlm_probability 0.15 \
    --output_dir ./output/mlm-roberta \
    --overwrite_output_dir
""",
    "json": r"""
python run_mlm.py config.json
""",
    "import of run_mlm_flax": r"""
python run_mlm_flax.py \
    --model_name_or_path bert-base-cased \
    --dataset_name wikitext \
    --dataset_config_name wikitext-2-raw-v1 \
    --output_dir ./output/test-mlm-flax
""",
    "flax bert on wikitext": r"""
python run_mlm_flax.py \
    --model_name_or_path bert-base-cased \
    --dataset_name wikitext \
    --dataset_config_name wikitext-2-raw-v1 \
    --do_train \
    --do_eval \
    --output_dir ./output/mlm-flax-bert \
    --train_batch_size 32 \
    --num_train_epochs 3 \
    --learning_rate 5e-5
""",
    "flax text files": r"""
python run_mlm_flax.py \
    --model_name_or_path bert-base-cased \
    --train_file ./data/train.txt \
    --validation_file ./data/valid.txt \
    --do_train \
    --do_eval \
    --max_seq_length 128 \
    --mlm_probability 0.15 \
    --output_dir ./output/mlm-flax-custom \
    --overwrite_output_dir
""",
    "flax json": r"""
python run_mlm_flax.py config.json
""",
}
RESULTS = {
    "all_results.json",
    "config.json",
    "eval_results.json",
    "model.safetensors",
    "tokenizer.json",
    "train_results.json",
    "trainer_state.json",
}


def long_sentences(count, seed=0):
    """Return sentences of nearly one length: their batches have one shape, which JAX compiles once."""
    return [line for line in sentences(8 * count, seed) if len(line.split()) > 16][:count]


def make_wikitext(folder):
    """Write a data set folder laid out as on the hub, with one configuration."""
    card = ["---", "configs:", "- config_name: wikitext-2-raw-v1", "  data_files:"]
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    for seed, (split, count) in enumerate({"train": 64, "validation": 24, "test": 8}.items()):
        text = ["", " = the bread = ", *long_sentences(count, seed)]
        pandas.DataFrame({"text": text}).to_parquet(folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
        card += [f"  - split: {split}", f"    path: wikitext-2-raw-v1/{split}-*"]
    write_lines(folder / "README.md", [*card, "---"])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folder that the examples are run in."""
    folder = tmp_path_factory.mktemp("workplace")
    for name, model_type in (("bert-base-uncased", "bert"), ("bert-base-cased", "bert"), ("roberta-base", "roberta")):
        make_model(folder / name, model_type, num_hidden_layers=1)
    make_wikitext(folder / "wikitext")
    (folder / "data").mkdir()
    write_lines(folder / "data" / "train.txt", long_sentences(40))
    write_lines(folder / "data" / "valid.txt", long_sentences(12, seed=1))
    settings = {
        "model_name_or_path": "bert-base-cased",
        "dataset_name": "wikitext",
        "dataset_config_name": "wikitext-2-raw-v1",
        "do_train": True,
        "do_eval": True,
        "output_dir": "./output/json",
        "overwrite_output_dir": True,
        "num_train_epochs": 3,
        "learning_rate": 5e-5,
        "train_batch_size": 32,
        "max_seq_length": None,
    }
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(text, marks=[] if name in ("import of run_mlm", "json", "flax text files") else pytest.mark.long)
        for name, text in EXAMPLES.items()
    ],
    ids=EXAMPLES,
)
def test_documented_example_runs(workplace, command):
    python, path, *arguments = shlex.split(command.replace("\\\n", ""))  # As a shell joins lines.
    assert python == "python"
    before = {file for file in workplace.rglob("*") if "output" not in file.parts and "cache" not in file.parts}
    done = run_script(path.removesuffix(".py"), arguments, cwd=workplace, HF_HOME=str(workplace / "cache"))
    assert done.returncode == 0, done.stderr
    if "--output_dir" in arguments:
        output = workplace / arguments[arguments.index("--output_dir") + 1]
    else:
        output = workplace / "output" / "json"
    if arguments == ["config.json"] or "--do_train" in arguments:
        assert {file.name for file in output.iterdir()} >= RESULTS
        results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
        assert results["epoch"] == 3
        assert 0 < results["eval_loss"] < 10
    else:
        assert "tokenized and cached" in done.stdout
        assert not output.exists()
    after = {file for file in workplace.rglob("*") if "output" not in file.parts and "cache" not in file.parts}
    assert after == before


DATA = ROOT / "configs" / "quickstart"
# For fewer steps than the config has.
SHORT = {
    "learning_rate": 0.002,
    "adam_beta2": 0.98,
    "eval_strategy": "no",
    "save_strategy": "no",
}


def read_lines(name):
    """Return the lines of a committed text."""
    return (DATA / name).read_text(encoding="utf-8").splitlines()


def count_tokens(name, tokenizer):
    """Return {token id: occurrences} of a committed text, special tokens left out."""
    return Counter(i for ids in tokenizer(read_lines(name), add_special_tokens=False)["input_ids"] for i in ids)


@pytest.fixture(scope="module")
def unigram_perplexity():
    """The validation text's perplexity under the word frequencies of the training text, one added to each."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "model")
    train, validation = (count_tokens(name, tokenizer) for name in ("train.txt", "validation.txt"))
    total = sum(train.values()) + len(tokenizer)
    loss = -sum(count * math.log((train[i] + 1) / total) for i, count in validation.items())
    return math.exp(loss / sum(validation.values()))


def test_the_generator_writes_the_committed_data(tmp_path):
    subprocess.run([sys.executable, DATA / "make_corpus.py", "--output_dir", tmp_path], check=True, timeout=120)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    sources = {DATA / "make_corpus.py", DATA / "world.txt"}
    committed = {path for path in DATA.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert made == sorted(path.relative_to(DATA) for path in committed - sources)
    for name in made:
        if name.suffix == ".json":
            new, old = json.loads((tmp_path / name).read_text()), read_json(DATA, name)
            new.pop("transformers_version", None)  # That of the installed release.
            old.pop("transformers_version", None)
            assert new == old, name
        else:
            assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_the_corpus_is_large_varied_and_cleanly_split():
    train, validation = read_lines("train.txt"), read_lines("validation.txt")
    assert len(train) == 15_000  # As README says.
    assert len(set(train)) == len(train)
    assert not set(train) & set(validation)
    assert len(set(validation)) == len(validation)


@pytest.mark.parametrize(("steps", "share"), [(120, 1), pytest.param(700, 0.3, marks=pytest.mark.long)])
def test_a_short_run_gets_below_the_unigram_perplexity(
    script, unigram_perplexity, tmp_path, monkeypatch, caplog, steps, share
):
    monkeypatch.chdir(ROOT)
    settings = {**SHORT, "max_steps": steps, "warmup_steps": steps // 5}
    metrics = script.main(["configs/quickstart.json", *flags(output_dir=tmp_path / "output", **settings)])
    assert metrics["perplexity"] < unigram_perplexity * share
    assert caplog.text.count("predicted (in the text): ") == 3
