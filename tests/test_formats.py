"""A text is what the file says: in every format, packed or not, cached or streamed, and never a number or a date."""

import csv
import gzip
import io
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import flags, make_byte_level_tokenizer, make_tokenizer, sentences, write_lines

pytestmark = pytest.mark.shared
LENGTH = 16
WORDS = ["the baker .", "", "a dog sees the sea ."]
ODD = "000 1.50 020000 1e5 -7 NA null None nan NULL true False 2020-01-01 2020-01-01T10:00:00Z 12:30 [1] {} inf".split()
ODD += ["", " ", " \t", " spaced  out ", 'a "quoted", text', "it's; a | row", "é ü 字 \U0001f600", "the end ."]
FORMATS = ["txt", "csv", "tsv", "json", "jsonl", "parquet"]
PACKED = [(name, packing) for name in FORMATS for packing in ("", ".gz", ".zst") if name != "parquet" or not packing]


def encode(name, texts):
    """Return the content of a file of a format with a column of numbers beside the texts."""
    if name == "txt":
        return "".join(f"{text}\n" for text in texts).encode()
    if name in ("csv", "tsv"):
        file = io.StringIO()
        csv.writer(file, delimiter="," if name == "csv" else "\t").writerows([("n", "text"), *enumerate(texts)])
        return file.getvalue().encode()
    if name == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.table({"n": range(len(texts)), "text": texts}), file, row_group_size=5)
        return file.getvalue()
    rows = [{"n": i, "text": text} for i, text in enumerate(texts)]
    return json.dumps(rows).encode() if name == "json" else "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def write(path, name, texts, packing=""):
    """Write texts as a file of a format, packed or not, and return its path."""
    content = encode(name, texts)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    # In two parts, as programs that work in parallel write them.
    path = path.with_name(f"{path.name}.{name}{packing}")
    path.write_bytes(pack(content) if not packing else pack(content[:50]) + pack(content[50:]))
    return path


def load(script, *names, **settings):
    """Return the raw data of a run, and its arguments."""
    needed = flags(model_name_or_path="m", output_dir="o", do_train=True, max_steps=9, **settings)
    args = script.parse_args(["--train_file", *map(str, names), "--validation_file", str(names[-1]), *needed])
    return script.load_raw_datasets(*args[:2]), *args[1:]


def read(script, *names, **settings):
    """Return the training texts of a run."""
    return [row["text"] for row in load(script, *names, **settings)[0]["train"]]


def expected_rows(tokenizer, texts, line_by_line):
    """Return the rows by the tokenizer's own call."""
    if line_by_line == "true":
        return [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts if text.strip()]
    tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]


@pytest.mark.parametrize(("name", "packing"), PACKED)
def test_every_format_gives_the_rows_of_its_texts(script, tmp_path, name, packing):
    tokenizer, texts = make_byte_level_tokenizer(tmp_path), [*WORDS, *ODD]
    files = [write(tmp_path / f"{i}", name, part, packing) for i, part in enumerate((WORDS, ODD))]
    for line_by_line, streaming in itertools.product(("true", "false"), (False, True)):
        more = {"streaming": True} if streaming else {}
        raw, data_args, training_args = load(script, *files, line_by_line=line_by_line, **more)
        tokenized = script.tokenize_datasets(raw, tokenizer, data_args, LENGTH, training_args)
        train, validation = tokenized["train"], tokenized["validation"]
        samples = itertools.takewhile(lambda sample: sample["epoch"] == 0, train.samples(1, 0)) if streaming else train
        rows = [row["input_ids"].tolist() for row in sorted(samples, key=lambda sample: sample["index"])]
        assert rows == expected_rows(tokenizer, texts, line_by_line)
        rows = [validation[i]["input_ids"].tolist() for i in range(len(validation))]
        assert rows == expected_rows(tokenizer, ODD, line_by_line)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_text_column_is_looked_at(script, tmp_path, streaming):
    more = {"streaming": True} if streaming else {}
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.csv")]
    files[0].write_text('{"text": null, "x": 1}\n' * 3)
    files[1].write_text('{"more": [1], "text": "2020-01-01", "x": "two"}\n{"x": {}}\n{"text": "the \\u00fc"}\n')
    files[2].write_text('references,text\n"[""a"", 1]",000\n')
    assert read(script, *files, **more) == ["", "", "", "2020-01-01", "", "the ü", "000"]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_text_in_parquet(script, tmp_path, kind, streaming):
    texts = ["the baker .", None, "000", "the baker ."]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet", row_group_size=2)
    more = {"streaming": True} if streaming else {}
    assert read(script, tmp_path / "a.parquet", **more) == [text or "" for text in texts]


def test_a_folder_is_read_like_files(script, tmp_path):
    write(tmp_path / "train", "csv", ODD)
    args = script.parse_args(flags(model_name_or_path="m", output_dir="o", dataset_name=tmp_path))
    raw = script.load_raw_datasets(*args[:2])
    assert [row["text"] for split in ("validation", "train") for row in raw[split]] == ODD
    (tmp_path / "README.md").write_text('---\nconfigs:\n- config_name: a\n  sep: ";"\n  data_files: t.csv\n---\n')
    (tmp_path / "t.csv").write_text("n;text\n1;000\n" * 1 + "2;a, b\n" * 19)
    raw = script.load_raw_datasets(*args[:2])
    assert [row["text"] for split in ("validation", "train") for row in raw[split]] == ["000", *["a, b"] * 19]


def test_a_column_called_references_is_a_column(script, tmp_path):
    path = tmp_path / "papers.jsonl"
    path.write_text("".join(f'{{"references": ["x", {i}], "text": "a dog {i}"}}\n' for i in range(20)))
    (tmp_path / "references.txt").write_text("[2]\n" * 20)
    for more, names in (({}, {"input_ids"}), ({"train_ref_file": 1}, {"input_ids", "continues_word"})):
        more = dict.fromkeys(more, tmp_path / "references.txt")
        raw, data_args, _ = load(script, path, line_by_line="true", **more)
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        tokenized = script.tokenize_datasets(raw, make_tokenizer(tmp_path / "tokenizer"), data_args, LENGTH)
        assert set(tokenized["train"].dataset.column_names) == names


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"the baker\ncaf\xe9 x\n", "not UTF-8 .*iconv"),
        ("a.csv", "text\nthe\n".encode("utf-16"), "not UTF-8 .*iconv"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b \\ud800"}\n', "line 3: .*surrogates not allowed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: the column text holds 3, not text"),
        ("a.csv", b"n,text\n1,a\n2,b, c\n", "line 3: 3 fields, but the header has 2"),
        ("a.tsv", b'n\ttext\n1\t"a\n', "line 2: unexpected end of data"),
    ],
)
def test_what_cannot_be_read_names_the_file_and_the_line(script, tmp_path, name, content, message, streaming):
    good = write(tmp_path / "good", "jsonl", WORDS)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(script.UserError, match=rf"{tmp_path / name}: {message}"):
        read(script, good, tmp_path / name, **({"streaming": True} if streaming else {}))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_text_column_is_the_same_in_all_lines_and_files(script, tmp_path, streaming):
    texts, titles, late = [tmp_path / name for name in ("texts.csv", "titles.csv", "late.jsonl")]
    texts.write_text("title,text\na,the baker\n")
    titles.write_text("title,body\na,the sea\n")
    late.write_text('{"id": "7"}\n{"id": "8", "text": "a dog"}\n')
    more = {"streaming": True} if streaming else {}
    for one, other in ((texts, titles), (titles, texts)):
        with pytest.raises(
            script.UserError, match=rf"text column of {one} is .*, that of {other} is .*text_column_name"
        ):
            read(script, one, other, **more)
    with pytest.raises(script.UserError, match=rf"{late}: line 2: the first line has no column text"):
        read(script, late, **more)
    assert read(script, texts, titles, text_column_name="title", **more) == ["a", "a"]
    late.write_text('{"id": "7", "text": null}\n{"id": "8", "text": "a dog"}\n')
    assert read(script, late, **more) == ["", "a dog"]


def test_the_log_names_file_format_and_column(script, tmp_path, caplog):
    caplog.set_level("INFO")
    path = write(tmp_path / "a", "tsv", WORDS, ".gz")
    read(script, path)
    assert f"--train_file {path}: tsv, text column: text" in caplog.messages
    read(script, path, text_column_name="n")
    assert f"--train_file {path}: tsv, text column: n" in caplog.messages


def test_one_long_text_without_validation_data(script, tmp_path):
    path = write_lines(tmp_path / "a.txt", [" ".join(sentences(50))])
    args = script.parse_args(flags(model_name_or_path="m", output_dir="o", train_file=path, do_eval=True))
    raw = script.load_raw_datasets(*args[:2])
    with pytest.raises(script.UserError, match="holds no sample: 5 % of 1 texts is no text; give --validation_file"):
        script.needed_splits(raw, *args[1:])
