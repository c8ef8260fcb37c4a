"""Every text format, packed or not, becomes exactly the rows it should, tokenized once; the log counts them."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
import tokenizers
import transformers
from conftest import (
    INSTALLED,
    RARE,
    ROOT,
    flags,
    make_model,
    make_slow_tokenizer,
    make_tokenizer,
    read_json,
    run_script,
    sentences,
    write_lines,
)
from safetensors.numpy import load_file

pytestmark = pytest.mark.shared
LENGTH = 16


@pytest.fixture
def tokenizer(tmp_path):
    """A tiny WordPiece tokenizer, and beside its files no model."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    return make_tokenizer(folder)


@pytest.fixture
def small_model(tmp_path):
    """A BERT folder of one layer."""
    return make_model(tmp_path / "model", num_hidden_layers=1)


def tokenize(script, tokenizer, max_seq_length=LENGTH, **settings):
    """Return {split: rows of token ids} as a run with these settings sees them."""
    needed = flags(model_name_or_path="some-model", output_dir="unused")
    model_args, data_args, _ = script.parse_args(needed + flags(**settings))
    raw = script.load_raw_datasets(model_args, data_args)
    return script.tokenize_datasets(raw, tokenizer, data_args, max_seq_length)


def rows(dataset):
    """Return the samples of a data set as lists of token ids."""
    return [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


def plain_rows(tokenizer, lines, length=LENGTH):
    """Return the tokenizer's own output, line by line, each at most `length` tokens."""
    return [tokenizer(line, truncation=True, max_length=length)["input_ids"] for line in lines if line.strip()]


def joined_rows(tokenizer, lines, length=LENGTH):
    """Return the tokenizer's own output for all lines, joined and cut into rows of `length`, the rest dropped."""
    stream = [token for line in lines for token in tokenizer(line)["input_ids"]]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def batched_rows(tokenizer, lines, size=1000):
    """Return the same where the texts are joined `size` at a time, as documented."""
    return [row for i in range(0, len(lines), size) for row in joined_rows(tokenizer, lines[i : i + size])]


def write_format(folder, extension, lines, column="text"):
    """Write lines in one of the formats and return the path."""
    path = str(folder / f"lines.{extension}")
    frame = pandas.DataFrame({"number": range(len(lines)), column: lines})
    if extension == "txt":
        write_lines(path, lines)
    elif extension == "csv":
        frame.to_csv(path, index=False)
    elif extension == "parquet":
        frame.to_parquet(path, index=False)
    elif extension == "json":
        frame.to_json(path, orient="records")
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


class Encoded:
    """True once something was tokenized, which writes a file to the cache, since the beginning or `clear()`."""

    def __init__(self, folder):
        self.folder = folder
        self.clear()

    def files(self):
        return {(path, path.stat().st_mtime_ns) for path in self.folder.rglob("cache-*.arrow")}

    def clear(self):
        self.before = self.files()

    def __bool__(self):
        return self.files() != self.before


@pytest.fixture
def count_encoded(tmp_path):
    """Whether something was tokenized."""
    return Encoded(tmp_path / "datasets_cache")


def test_text_is_the_named_column_or_text_or_the_first(script, tokenizer, tmp_path):
    columns = {"title": sentences(5, seed=1), "text": sentences(5, seed=2), "note": sentences(5, seed=3)}
    settings = {"validation_file": str(tmp_path / "data.csv"), "line_by_line": "true"}

    def read(**more):
        return rows(tokenize(script, tokenizer, **settings, **more)["validation"])

    pandas.DataFrame(columns).to_csv(settings["validation_file"], index=False)
    assert read() == plain_rows(tokenizer, columns["text"])
    assert read(text_column_name="note") == plain_rows(tokenizer, columns["note"])
    pandas.DataFrame(columns).drop(columns="text").to_csv(settings["validation_file"], index=False)
    assert read() == plain_rows(tokenizer, columns["title"])
    with pytest.raises(script.UserError, match=r"text_column_name titel.*title, note"):
        read(text_column_name="titel")


def test_a_column_without_text_is_an_error(script, tokenizer, tmp_path):
    path = write_format(tmp_path, "jsonl", sentences(3))
    with pytest.raises(script.UserError, match=r"lines\.jsonl: line 1: the column number holds 0, not text"):
        tokenize(script, tokenizer, validation_file=path, text_column_name="number")


def test_files_of_several_formats_are_read_and_unknown_ones_are_errors(script, tmp_path):
    names = [write_lines(tmp_path / name, ["text", "the baker"]) for name in ("a.docx", "b.txt", "b.csv")]
    with pytest.raises(script.UserError, match=r"--train_file .*a\.docx: the formats are txt, csv, tsv"):
        read(script, names[0])
    assert read(script, *names[1:]) == ["text", "the baker", "the baker"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_with_brackets_is_itself_and_no_glob(script, tmp_path, streaming):
    names = [write_lines(tmp_path / name, [name]) for name in ("a[1].txt", "a1.txt", "a2.txt")]
    more = {"streaming": True} if streaming else {}
    assert read(script, names[0], **more) == ["a[1].txt"]
    assert read(script, tmp_path / "a[0-9].txt", names[0], **more) == ["a1.txt", "a2.txt", "a[1].txt"]
    with pytest.raises(script.UserError, match=r"--train_file .*a\[3\].txt: no such file"):
        read(script, tmp_path / "a[3].txt", names[1])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["txt", "csv", "json", "jsonl"])
def test_empty_files_are_left_out(script, tmp_path, caplog, extension, streaming):
    full, empty = write_format(tmp_path, extension, sentences(5)), tmp_path / f"empty.{extension}"
    empty.touch()
    marked, packed = tmp_path / f"marked.{extension}", tmp_path / f"empty.{extension}.gz"
    marked.write_bytes(b"\xef\xbb\xbf")
    with pa.output_stream(packed, compression="gzip"):
        pass
    more = {"streaming": True} if streaming else {}
    for names in ((empty, full), (marked, packed, full, empty, full), (full, marked)):
        caplog.clear()
        assert read(script, *names, validation_file=full, **more) == sentences(5) * names.count(full)
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert sorted(warnings) == sorted(f"{name} is empty." for name in names if name != full)
    with pytest.raises(script.UserError, match=rf"--train_file {empty}: no text"):
        read(script, empty, validation_file=full, **more)


def test_a_tokenizer_that_drops_latin_letters(script, tmp_path):
    lines = ["αβγ αβ", "γαβ"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(special_tokens=["[PAD]", "<s>", "</s>"]))
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    assert not tokenizer("a", add_special_tokens=False)["input_ids"]
    path = write_lines(tmp_path / "a.txt", lines)
    found = rows(tokenize(script, tokenizer, train_file=path, validation_file=path, line_by_line="true")["train"])
    assert found == [tokenizer(line)["input_ids"] for line in lines]
    assert all(row[0] == 1 and row[-1] == 2 for row in found)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_data_set_is_read(script, tmp_path, streaming):
    lines, more = {"train": sentences(40), "validation": sentences(3, seed=1)}, {"streaming": True} if streaming else {}
    splits = {split: datasets.Dataset.from_dict({"text": part}) for split, part in lines.items()}
    datasets.Dataset.from_dict({"text": ["old"] * 9}).save_to_disk(tmp_path / "one[1]", num_shards=3)
    splits["train"].save_to_disk(tmp_path / "one[1]", num_shards=2)  # Leaves the files of the former one.
    datasets.load_from_disk(tmp_path / "one[1]").map(lambda row: {"text": ""})  # Leaves a file in the folder.
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")

    def read_named(name):
        model_args, data_args, _ = script.parse_args(
            flags(model_name_or_path="m", output_dir="o", dataset_name=tmp_path / name, max_val_samples=2, **more)
        )
        raw = script.load_raw_datasets(model_args, data_args)
        return {split: [row["text"] for row in raw[split]] for split in raw}

    assert read_named("two") == lines
    first = 0 if streaming else 2  # 5 % of 40; of a stream, both are the whole.
    assert read_named("one[1]")["train"] == lines["train"][first:]


def test_a_glob_reads_all_its_files(script, tokenizer, tmp_path):
    parts = [sentences(4, seed=seed) for seed in range(3)]
    for number, lines in enumerate(parts):
        write_lines(tmp_path / f"part-{number}.txt", lines)
    tokenized = tokenize(script, tokenizer, validation_file=tmp_path / "part-*.txt", line_by_line="true")
    assert rows(tokenized["validation"]) == plain_rows(tokenizer, [line for lines in parts for line in lines])


def test_line_by_line_leaves_out_blank_lines_and_truncates(script, tokenizer, tmp_path):
    lines = ["the baker bakes bread .", "", " \t ", "a " * 50, "", "the child sees a dog ."]
    path = write_lines(tmp_path / "lines.txt", lines)
    result = rows(tokenize(script, tokenizer, validation_file=path, line_by_line="true")["validation"])
    assert result == plain_rows(tokenizer, lines)
    assert [len(row) for row in result] == [7, LENGTH, 10]
    assert result[1][-1] == tokenizer.sep_token_id


@pytest.mark.parametrize("use_fast", [True, False])
def test_joined_texts_lose_less_than_one_row_per_thousand_texts(script, tokenizer, tmp_path, use_fast):
    lines = sentences(2500)  # Several batches of `datasets.map`.
    path = write_lines(tmp_path / "lines.txt", lines)
    if not use_fast:
        tokenizer = make_slow_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.is_fast == use_fast
    result = rows(tokenize(script, tokenizer, validation_file=path, line_by_line="false")["validation"])
    assert result == batched_rows(tokenizer, lines)


@pytest.mark.parametrize("use_fast", [True, False])
@pytest.mark.parametrize("line_by_line", ["true", "false"])
@pytest.mark.parametrize(("highest_id", "bytes_per_id"), [(2**16 - 1, 2), (2**16, 4)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(
    script, tmp_path, highest_id, bytes_per_id, line_by_line, use_fast
):
    before = len(make_tokenizer(tmp_path))
    tokenizer = make_tokenizer(tmp_path, [f"word{i}" for i in range(highest_id - before)] + ["highest"])
    if not use_fast:
        tokenizer = transformers.BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic")
    train_file = write_lines(tmp_path / "train.txt", ["the highest old boats"] * 6)
    dataset = tokenize(script, tokenizer, 6, train_file=train_file, line_by_line=line_by_line)["train"]
    words = tokenizer.convert_tokens_to_ids("[CLS] the highest old boats [SEP]".split())
    assert words[2] == highest_id
    assert rows(dataset) == [words] * 6
    assert dataset[0]["input_ids"].itemsize == bytes_per_id


def test_a_slow_tokenizer_gives_the_same_lines(script, tmp_path, tokenizer, text_files):
    make_slow_tokenizer(tmp_path / "tokenizer")
    model_args, _, _ = script.parse_args(
        flags(tokenizer_name=tmp_path / "tokenizer", model_type="bert", output_dir="unused", use_fast_tokenizer="false")
        + flags(**text_files)
    )
    slow = script.load_tokenizer(model_args)
    assert not slow.is_fast
    results = [tokenize(script, each, line_by_line="true", **text_files) for each in (slow, tokenizer)]
    assert rows(results[0]["train"]) == rows(results[1]["train"])


@pytest.mark.parametrize("more", [{}, pytest.param({"whole_word_mask": True}, marks=pytest.mark.long)])
def test_another_process_finds_what_workers_have_tokenized(script, tokenizer, tmp_path, count_encoded, more):
    lines = sentences(1500)  # A batch for each worker.
    settings = {"validation_file": write_lines(tmp_path / "lines.txt", lines), "line_by_line": "false"}
    settings |= {"preprocessing_num_workers": 2, **more}
    program = flags(model_type="bert", tokenizer_name=tmp_path / "tokenizer", output_dir=tmp_path / "o", **settings)
    program += flags(max_seq_length=LENGTH)
    # A program of its own: workers are forked, which JAX threads of other tests in this process do not allow.
    for again in (False, True):
        count_encoded.clear()
        done = run_script(script.__name__, program, HF_DATASETS_CACHE=str(tmp_path / "datasets_cache"))
        assert done.returncode == 0, done.stderr
        assert "fork" not in done.stderr
        assert bool(count_encoded) != again  # Another process finds the cache.
    parts = sorted((tmp_path / "datasets_cache").rglob("cache-*.arrow"))
    result = [row for path in parts for row in datasets.Dataset.from_file(str(path))["input_ids"]]
    assert len(parts) == 2
    assert result == batched_rows(tokenizer, lines)


def check_workers(name, folder):
    """Check the rows with several numbers of workers, of an empty cache and of one that another number has filled."""
    script, tokenizer = importlib.import_module(name), transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    cases = [(1000, 2500, order, {}) for order in ((0, 3), (2, 0), (3, 2))]
    small = ((1, (2, 0)), (15, (3, 0)), (40, (2, 3)))
    cases += [(7, count, order, {"whole_word_mask": True}) for count, order in small]
    for size, count, order, settings in cases:
        script.ENCODE_BATCH, datasets.config.HF_DATASETS_CACHE = size, folder / f"{count} {order}"
        lines = [RARE, *sentences(count - 1, seed=count)]
        expected = batched_rows(tokenizer, lines, size)
        settings |= {"validation_file": write_lines(folder / "lines.txt", lines), "line_by_line": "false"}
        for workers in order:
            used = {**settings, **({"preprocessing_num_workers": workers} if workers else {})}
            dataset = tokenize(script, tokenizer, **used)["validation"]
            assert rows(dataset) == expected, (size, count, order, workers)
            for i in range(len(dataset) if "whole_word_mask" in used else 0):
                tokens = tokenizer.convert_ids_to_tokens(dataset[i]["input_ids"].tolist())
                assert dataset[i]["continues_word"].tolist() == [token.startswith("##") for token in tokens]


def test_rows_do_not_depend_on_the_number_of_workers(script, tokenizer, tmp_path):
    # A program of its own: workers are forked, which JAX threads of other tests in this process do not allow.
    code = "import pathlib, sys, test_data; test_data.check_workers(sys.argv[1], pathlib.Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, script.__name__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fork" not in done.stderr


def test_validation_is_the_first_percent_of_the_training_data(script, tokenizer, tmp_path):
    lines = sentences(200)
    path = write_lines(tmp_path / "train.txt", lines)
    for percent, first in ((None, 10), (25, 50)):
        settings = {} if percent is None else {"validation_split_percentage": percent}
        tokenized = tokenize(script, tokenizer, train_file=path, line_by_line="true", **settings)
        assert rows(tokenized["validation"]) == plain_rows(tokenizer, lines[:first])
        assert rows(tokenized["train"]) == plain_rows(tokenizer, lines[first:])


def test_given_validation_data_leaves_the_training_data_whole(script, tokenizer, text_files):
    tokenized = tokenize(script, tokenizer, line_by_line="true", **text_files)
    for split in ("train", "validation"):
        lines = Path(text_files[f"{split}_file"]).read_text(encoding="utf-8").splitlines()
        assert rows(tokenized[split]) == plain_rows(tokenizer, lines)


def test_sample_limits_keep_the_first_samples(script, tokenizer, text_files):
    whole = tokenize(script, tokenizer, **text_files)
    limited = tokenize(script, tokenizer, max_train_samples=7, max_eval_samples=3, **text_files)
    assert rows(limited["train"]) == rows(whole["train"])[:7]
    assert rows(limited["validation"]) == rows(whole["validation"])[:3]
    more = tokenize(script, tokenizer, max_train_samples=10**6, **text_files)
    assert rows(more["train"]) == rows(whole["train"])


def test_a_second_run_reads_the_cache(script, tokenizer, text_files, count_encoded):
    for line_by_line in ("true", "false"):
        settings = {"line_by_line": line_by_line, **text_files}
        expected = tokenize(script, tokenizer, **settings)
        assert count_encoded
        count_encoded.clear()
        tokenizer("the baker", truncation=True, padding="max_length", max_length=4)  # Changes the tokenizer's state.
        again = tokenize(script, tokenizer, **settings)
        assert not count_encoded
        assert rows(again["train"]) == rows(expected["train"])


def test_a_split_of_the_training_data_is_cached_too(script, tokenizer, text_files, count_encoded):
    tokenize(script, tokenizer, train_file=text_files["train_file"])
    assert count_encoded
    count_encoded.clear()
    tokenize(script, tokenizer, train_file=text_files["train_file"])
    assert not count_encoded


def test_overwriting_the_cache_tokenizes_again(script, tokenizer, text_files, count_encoded):
    tokenize(script, tokenizer, **text_files)
    count_encoded.clear()
    tokenize(script, tokenizer, overwrite_cache=True, **text_files)
    assert count_encoded


def test_what_decides_the_rows_decides_the_cache(script, tokenizer, tmp_path, text_files, count_encoded):
    (tmp_path / "other").mkdir()
    other = make_tokenizer(tmp_path / "other", extra=["bakes##bread"])
    lowered = transformers.BertTokenizerFast.from_pretrained(tmp_path / "other", do_lower_case=False)
    runs = [
        (tokenizer, {}),
        (tokenizer, {"max_seq_length": 15}),
        (tokenizer, {"line_by_line": "true"}),
        (tokenizer, {"line_by_line": "true", "max_seq_length": 15}),
        (tokenizer, {"line_by_line": "false"}),
        (tokenizer, {"line_by_line": "false", "whole_word_mask": True}),
        (tokenizer, {"line_by_line": "true", "whole_word_mask": True}),
        (other, {"line_by_line": "false"}),
        (lowered, {"line_by_line": "false"}),
    ]
    default = {"run_mlm": "false", "run_mlm_flax": "true"}[script.__name__]
    seen = set()
    for used, settings in runs:
        count_encoded.clear()
        tokenize(script, used, **settings, **text_files)
        mode = (id(used), settings.get("max_seq_length", LENGTH), settings.get("line_by_line", default))
        mode += (settings.get("whole_word_mask", False),)
        assert bool(count_encoded) == (mode not in seen), mode
        seen.add(mode)


def test_changed_text_is_tokenized_anew(script, tokenizer, tmp_path):
    path = write_lines(tmp_path / "lines.txt", ["the baker bakes bread ."])
    tokenize(script, tokenizer, validation_file=path, line_by_line="true")
    write_lines(path, ["the sailor sails boats ."])
    tokenized = tokenize(script, tokenizer, validation_file=path, line_by_line="true")
    assert rows(tokenized["validation"]) == plain_rows(tokenizer, ["the sailor sails boats ."])


def replace(path, lines):
    """Write text anew, with a time of last change that is always the same, as `cp -p` or an image may leave it."""
    if path.suffix:
        write_lines(path, lines)
    else:
        shutil.rmtree(path)
        datasets.Dataset.from_dict({"text": lines}).save_to_disk(path)
    for written in [path] if path.suffix else path.iterdir():
        os.utime(written, (10**9, 10**9))


@pytest.mark.parametrize("name", ["lines.txt", "folder/train.txt", "folder"])
def test_a_file_that_was_replaced_is_read_again(script, tokenizer, tmp_path, count_encoded, name):
    (tmp_path / "folder").mkdir()
    folder = {"dataset_name": tmp_path / "folder", "validation_split_percentage": 1}
    settings = {"train_file": tmp_path / name, "validation_file": tmp_path / name} if name == "lines.txt" else folder

    def read_again(lines, **more):
        replace(tmp_path / name, lines)
        count_encoded.clear()
        return rows(tokenize(script, tokenizer, line_by_line="true", **settings, **more)["train"])

    first, longer, other = (["the baker ."] * 9, ["the baker ."] * 9 + ["a dog ."], ["the sailor."] * 9)
    assert read_again(first) == plain_rows(tokenizer, first)
    assert read_again(longer) == plain_rows(tokenizer, longer)
    assert read_again(first) == plain_rows(tokenizer, first)
    assert not count_encoded  # Both are in the cache.
    assert read_again(other, overwrite_cache=True) == plain_rows(tokenizer, other)
    assert read_again(other) == plain_rows(tokenizer, other)
    assert not count_encoded


def test_a_folder_laid_out_as_on_the_hub_is_a_data_set(script, tokenizer, tmp_path, monkeypatch):
    work = tmp_path / "work"
    configs = {"wikitext-2-raw-v1": {"train": sentences(12), "validation": sentences(5, seed=1), "test": ["a ."] * 3}}
    configs["other"] = {"train": sentences(40, seed=2)}
    card = ["---", "configs:"]
    for config, splits in configs.items():
        (work / "wikitext" / config).mkdir(parents=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for split, lines in splits.items():
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            pandas.DataFrame({"text": lines}).to_parquet(work / "wikitext" / config / f"{split}-00000-of-00001.parquet")
    write_lines(work / "wikitext" / "README.md", [*card, "---"])
    monkeypatch.chdir(work)

    settings = {"dataset_name": "wikitext", "line_by_line": "true"}
    tokenized = tokenize(script, tokenizer, dataset_config_name="wikitext-2-raw-v1", **settings)
    assert list(tokenized) == ["train", "validation"]
    for split, lines in configs["wikitext-2-raw-v1"].items():
        assert split == "test" or rows(tokenized[split]) == plain_rows(tokenizer, lines)
    tokenized = tokenize(script, tokenizer, dataset_config_name="other", **settings)
    assert rows(tokenized["validation"]) == plain_rows(tokenizer, configs["other"]["train"][:2])
    assert rows(tokenized["train"]) == plain_rows(tokenizer, configs["other"]["train"][2:])


def test_without_a_task_a_run_only_fills_the_cache(
    script, model_folder, text_files, tmp_path, monkeypatch, caplog, count_encoded
):
    output = tmp_path / "output"
    monkeypatch.setattr(script, "load_model", None)  # Not to be called.
    for again in (False, True):
        caplog.clear()
        count_encoded.clear()
        metrics = script.main(
            flags(model_name_or_path=model_folder, output_dir=output, max_seq_length=LENGTH, **text_files)
        )
        assert metrics == {}
        assert "tokenized and cached" in caplog.text
        assert bool(count_encoded) != again
    assert not output.exists()


@pytest.mark.parametrize("line_by_line", ["true", "false"])
def test_tokenizing_leaves_no_truncation_to_be_saved(script, tokenizer, text_files, tmp_path, line_by_line):
    for _ in range(2):  # Encoded, then read from the cache.
        tokenize(script, tokenizer, line_by_line=line_by_line, **text_files)
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = read_json(tmp_path / "saved", "tokenizer.json")
        assert (saved["truncation"], saved["padding"]) == (None, None)


@pytest.mark.shared
def test_a_column_of_numbers_comes_with_its_sample(script):
    rows = {"input_ids": [[1], [2, 3], [4]], "domain": [3, 4, 5]}
    samples = script.TokenizedDataset(datasets.Dataset.from_dict(rows)).__getitems__([2, 0])
    assert [(sample["input_ids"].tolist(), sample["domain"]) for sample in samples] == [([4], 5), ([1], 3)]


def test_padding_to_the_maximum_length_makes_all_batches_alike(script, small_model, tmp_path, monkeypatch):
    lengths = []
    collate = script.MaskingCollator.collate

    def watched(self, examples, *args, **kwargs):
        batch = collate(self, examples, *args, **kwargs)
        if len(examples) == 8:  # With other numbers, the sparse head is tried, or predictions are shown.
            lengths.append(batch["input_ids"].shape[1])
            assert (batch["attention_mask"].sum(1) == [len(example["input_ids"]) for example in examples]).all()
        return batch

    monkeypatch.setattr(script.MaskingCollator, "collate", watched)
    path = write_lines(tmp_path / "short.txt", ["the baker bakes bread ."] * 16)
    settings = {"model_name_or_path": small_model, "validation_file": path, "max_seq_length": LENGTH}

    def evaluate(folder, **more):
        lengths.clear()
        output = tmp_path / folder
        metrics = script.main(flags(output_dir=output, do_eval=True, line_by_line="true", **settings, **more))
        return metrics["eval_loss"]

    loss = evaluate("short")
    assert len(lengths) == 2
    assert max(lengths) < LENGTH
    padded_loss = evaluate("padded", pad_to_max_length=True)
    assert lengths == [LENGTH] * 2
    assert padded_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("task", "file"), [("do_eval", "validation_file"), ("do_train", "train_file")])
def test_a_task_needs_only_its_own_file(script, small_model, text_files, tmp_path, task, file):
    output = tmp_path / "output"
    metrics = script.main(
        flags(model_name_or_path=small_model, output_dir=output, max_seq_length=LENGTH, max_steps=2)
        + flags(line_by_line="false", learning_rate=1e-3, lr_scheduler_type="linear", dropout_rate=0)
        + flags(**{task: True, file: text_files[file]})
    )
    done, other = ("eval", "train") if task == "do_eval" else ("train", "eval")
    assert np.isfinite(metrics[f"{done}_loss"])
    assert not any(name.startswith(other) for name in metrics)
    assert (output / f"{done}_results.json").exists()
    assert not (output / f"{other}_results.json").exists()


def write_references(path, references):
    """Write one JSON list of positions a line and return the path."""
    return write_lines(path, [json.dumps(positions) for positions in references])


def word_flags(dataset):
    """Return the positions flagged as the continuation of a word, per sample."""
    return [np.flatnonzero(dataset[i]["continues_word"]).tolist() for i in range(len(dataset))]


def test_references_flag_the_positions_they_list(script, tokenizer, tmp_path):
    lines = ["the baker bakes bread .", "", "a " * 50, "the child sees ."]
    references = [[2, 4], [], [3, LENGTH - 1, LENGTH, 40], []]
    tokenized = tokenize(
        script,
        tokenizer,
        train_file=write_lines(tmp_path / "train.txt", lines),
        train_ref_file=write_references(tmp_path / "train.ref", references),
        validation_file=write_lines(tmp_path / "validation.txt", lines[:1]),
        validation_ref_file=write_references(tmp_path / "validation.ref", [[5]]),
        line_by_line="true",
    )
    assert word_flags(tokenized["train"]) == [[2, 4], [3], []]  # What is truncated counts for nothing.
    assert word_flags(tokenized["validation"]) == [[5]]
    for dataset in tokenized.values():
        for i in range(len(dataset)):
            assert len(dataset[i]["continues_word"]) == len(dataset[i]["input_ids"])


def test_references_follow_the_validation_split(script, tokenizer, tmp_path):
    references = [[2 + i % 4] for i in range(40)]
    tokenized = tokenize(
        script,
        tokenizer,
        train_file=write_lines(tmp_path / "train.txt", ["the baker bakes bread ."] * 40),
        train_ref_file=write_references(tmp_path / "train.ref", references),
        validation_split_percentage=25,
        line_by_line="true",
    )
    assert word_flags(tokenized["validation"]) == references[:10]
    assert word_flags(tokenized["train"]) == references[10:]


def test_references_need_their_text_and_line_by_line(script, text_files, tmp_path):
    needed = flags(model_name_or_path="some-model", output_dir="unused", train_ref_file="train.ref")
    with pytest.raises(script.UserError, match="--train_ref_file needs --train_file"):
        script.parse_args(needed + flags(dataset_name="wikitext", line_by_line="true"))
    with pytest.raises(script.UserError, match="--line_by_line"):
        script.parse_args(needed + flags(train_file=text_files["train_file"], line_by_line="false"))


@pytest.mark.parametrize("line_by_line", ["true", "false"])
def test_the_summary_is_true(script, tmp_path, caplog, line_by_line):
    lines = [*sentences(90), "", "the § dog § sees .", " "]
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    settings = {"model_name_or_path": model, "output_dir": tmp_path / "o", "max_seq_length": LENGTH}
    settings |= {"train_file": write_lines(tmp_path / "t.txt", lines), "do_train": True, "max_steps": 2}
    settings |= {"train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 3e-4}
    script.main(flags(**settings, lr_scheduler_type="constant", line_by_line=line_by_line))
    tokenizer = script.load_tokenizer(script.ModelArguments(model_name_or_path=model))
    limit = {"truncation": True, "max_length": LENGTH} if line_by_line == "true" else {}
    rows = [tokenizer(line, **limit)["input_ids"] for line in lines if line.strip() or line_by_line == "false"]
    joined = [token for row in rows for token in row]
    first = round(len(lines) * 0.05)  # The validation split; none of its lines is blank.
    rows, joined = rows[first:], joined[sum(map(len, rows[:first])) :]
    samples = len(rows) if line_by_line == "true" else len(joined) // LENGTH
    tokens = len(joined) if line_by_line == "true" else samples * LENGTH
    unknown = sum(token == tokenizer.unk_token_id for token in joined[:tokens]) / tokens
    expected = f"train: {len(lines) - first} texts, {samples} samples, {tokens:,} tokens ({unknown:.2%} unknown)"
    assert expected in caplog.text
    parameters = sum(value.size for value in load_file(tmp_path / "o" / "model.safetensors").values())
    assert f"training: {parameters:,} parameters, 2 of 2 steps to go, peak learning rate 0.0003" in caplog.text
    assert "global batch size: 6 (batch 3, accumulation 2, devices 1)" in caplog.text


ODD = ["the baker \U0001f600 ünï 字", "nul \0 byte", "word " * 2_000_000 + "end", "NA", 'a "quoted", text', "the end ."]


def read(script, *names, **settings):
    """Return the texts that a run with these training files would encode."""
    settings = {"model_name_or_path": "m", "output_dir": "o", "validation_file": names[-1], **settings}
    model_args, data_args, _ = script.parse_args(["--train_file", *map(str, names), *flags(**settings)])
    return [row["text"] for row in script.load_raw_datasets(model_args, data_args)["train"]]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_parquet_is_an_error(script, tmp_path, packing):
    path = tmp_path / f"lines.parquet{packing}"
    path.write_bytes(b"")
    with pytest.raises(script.UserError, match=rf"lines\.parquet{packing}: "):
        read(script, path)


def test_several_files_and_globs_are_read_in_their_order(script, tmp_path):
    parts = {name: sentences(3, seed=seed) for seed, name in enumerate(("z.txt", "part-1.txt", "part-0.txt", "a.txt"))}
    for name, lines in parts.items():
        write_lines(tmp_path / name, lines)
    expected = [line for name in ("z.txt", "part-0.txt", "part-1.txt", "a.txt") for line in parts[name]]
    names = [str(tmp_path / name) for name in ("z.txt", "part-*.txt", "a.txt")]
    assert read(script, *names) == expected
    config = tmp_path / "config.json"
    settings = {"model_name_or_path": "m", "output_dir": "o", "train_file": names}
    config.write_text(json.dumps(settings))
    assert script.parse_args([str(config)])[1].train_file == names
    config.write_text(json.dumps({**settings, "train_file": names[0]}))
    assert script.parse_args([str(config)])[1].train_file == names[0]
    with pytest.raises(script.UserError, match=r"--train_file .*missing"):
        read(script, names[0], tmp_path / "missing-*.txt")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["txt", "csv", "json", "jsonl"])
def test_odd_text_survives(extension, streaming, tmp_path):
    """A byte-order mark in each file, CRLF, a line of 10 MB, NUL bytes, emoji and words that look like no value."""
    script = importlib.import_module(INSTALLED[0])
    clean = write_format(tmp_path, extension, ODD)
    odd = [tmp_path / f"odd-{i}.{extension}" for i in range(2)]
    for path in odd:
        with open(clean, "rb") as file:
            path.write_bytes(b"\xef\xbb\xbf" + file.read().replace(b"\n", b"\r\n"))
    more = {"streaming": True, "do_train": True, "max_steps": 1} if streaming else {}
    assert read(script, *odd, **more) == ODD * 2


@pytest.mark.parametrize("line_by_line", ["true", "false"])
@pytest.mark.parametrize("more", [{}, {"whole_word_mask": True}])
def test_a_long_text_has_the_rows_of_one_call(script, tokenizer, tmp_path, monkeypatch, line_by_line, more):
    monkeypatch.setattr(script, "CALL_LENGTH", 6_000)
    monkeypatch.setattr(script, "OVERLAP", 2_000)
    repeated, letters, blank = "a dogs " * 5_000, "z" * 9_000, "the " * 2_000 + " " * 9_000 + "end ."
    lines = [repeated, "the end .", " ".join([RARE, *sentences(500)]), letters, "", blank, *sentences(40, seed=1)]
    tokenized = tokenize(
        script, tokenizer, validation_file=write_lines(tmp_path / "t.txt", lines), line_by_line=line_by_line, **more
    )["validation"]
    expected = plain_rows if line_by_line == "true" else joined_rows
    assert rows(tokenized) == expected(tokenizer, lines)
    for i in range(len(tokenized) if more else 0):
        tokens = tokenizer.convert_ids_to_tokens(tokenized[i]["input_ids"].tolist())
        assert tokenized[i]["continues_word"].tolist() == [token.startswith("##") for token in tokens]
