"""Every format, packed or not, alone or with others, gives exactly its text."""

import importlib
import json

import pyarrow as pa
import pytest
from conftest import flags, make_tokenizer, sentences, write_lines
from test_data import write_format

# The csv loader of `datasets` leaves its reader to the garbage collector.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*:ResourceWarning")
PACKINGS = [".gz", ".zst"]
ODD = ["the baker \U0001f600 ünï 字", "nul \0 byte", "word " * 2_000_000 + "end", "NA", 'a "quoted", text', "the end ."]


def read(script, *names, **settings):
    """Return the texts that a run with these training files would encode."""
    settings = {"model_name_or_path": "m", "output_dir": "o", "validation_file": names[-1], **settings}
    model_args, data_args, _ = script.parse_args(["--train_file", *map(str, names), *flags(**settings)])
    raw = script.load_raw_datasets(model_args, data_args)["train"]
    column, _ = script.find_text_column(raw, data_args.text_column_name)
    return [row[column] for row in raw]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("extension", ["txt", "csv", "json", "jsonl"])
def test_packed_files_are_read(script, tmp_path, extension, packing):
    lines = sentences(20)
    path = write_format(tmp_path, extension, lines)
    with (
        pa.output_stream(path + packing, compression="gzip" if packing == ".gz" else "zstd") as file,
        open(path, "rb") as source,
    ):
        file.write(source.read())
    for more in ({}, {"streaming": True, "do_train": True, "max_steps": 1}):
        assert read(script, path + packing, **more) == lines
        assert read(script, path, path + packing, **more) == lines * 2


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_parquet_is_an_error(script, tmp_path, packing):
    path = tmp_path / f"lines.parquet{packing}"
    path.write_bytes(b"")
    with pytest.raises(script.UserError, match=rf"--train_file .*lines\.parquet{packing}"):
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
    script = importlib.import_module("run_mlm" if streaming else "run_mlm_flax")
    clean = write_format(tmp_path, extension, ODD)
    odd = [tmp_path / f"odd-{i}.{extension}" for i in range(2)]
    for path in odd:
        with open(clean, "rb") as file:
            path.write_bytes(b"\xef\xbb\xbf" + file.read().replace(b"\n", b"\r\n"))
    more = {"streaming": True, "do_train": True, "max_steps": 1} if streaming else {}
    if (extension, streaming) == ("json", False):  # `datasets` 5.0.1 takes the mark off the first file alone.
        with pytest.raises(script.UserError, match="--train_file"):
            read(script, *odd)
        assert read(script, odd[0], clean) == ODD * 2
        return
    assert read(script, *odd, **more) == ODD * 2


def test_a_very_long_line_is_encoded(script, tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    for line_by_line, words in ((True, False), (False, False), (False, True)):
        texts = pa.table({"text": ["a dogs " * 40_000, "the end ."]})
        table = script.encode_texts(texts, tokenizer, "text", line_by_line, 16, words, "uint16")
        ids = [tokenizer.convert_tokens_to_ids(word) for word in ("a", "dogs")]
        assert table["input_ids"][0].as_py()[:5] == [tokenizer.cls_token_id, *ids, *ids]
        assert len(table) == (2 if line_by_line else (80_002 + 5) // 16)
