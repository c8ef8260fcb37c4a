"""The quickstart: its data is reproducible and split cleanly, and the model learns from it."""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, flags, read_json
from transformers import AutoTokenizer

import run_mlm

DATA = ROOT / "configs" / "quickstart"
# Fewer steps than the config has, and a schedule that is as short: half a minute on one core.
SHORT = {
    "max_steps": 700,
    "warmup_steps": 150,
    "learning_rate": 0.002,
    "adam_beta2": 0.98,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
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
    assert len(train) >= 2_000
    assert len(set(train)) == len(train)
    assert not set(train) & set(validation)
    assert len(set(validation)) == len(validation)


def test_unigram_perplexity_is_the_one_in_readme(unigram_perplexity):
    assert unigram_perplexity == pytest.approx(310, abs=0.5)


def test_a_short_run_gets_below_a_quarter_of_the_unigram_perplexity(unigram_perplexity, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    metrics = run_mlm.main(["configs/quickstart.json", *flags(output_dir=tmp_path / "output", **SHORT)])
    assert metrics["perplexity"] < unigram_perplexity / 4
    assert caplog.text.count("predicted (in the text): ") == 3
