"""Word references of Chinese text: made by the helper, checked line by line, followed by the masks."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import ROOT, SPECIAL, flags, make_config, make_tokenizer, read_json, write_lines
from test_data import tokenize, word_flags

pytestmark = pytest.mark.shared
EXAMPLE = ROOT / "configs" / "chinese"
LENGTH = 16
SEGMENTED = [
    "我 喜欢 北京 。",
    "",
    "他们 在 北京大学 学习 BERT 模型 and 语言",
    "今天 天气 很 好",
    " ",
    "学生 喜欢 学习 。",
]


def make_references(*paths):
    """Run the helper as a user does."""
    subprocess.run([sys.executable, EXAMPLE / "make_word_references.py", *paths], check=True, timeout=120)


@pytest.fixture
def chinese(tmp_path):
    """A character-level BERT folder, a text and its references."""
    folder = tmp_path / "chinese"
    folder.mkdir()
    characters = sorted({char.lower() for line in SEGMENTED for char in line} - {" "})
    pieces = [f"##{char}" for char in characters if char.isascii()]
    write_lines(folder / "vocab.txt", [*SPECIAL, *characters, *pieces])
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder, model_max_length=64)
    tokenizer.save_pretrained(folder)
    transformers.BertForMaskedLM(make_config("bert", tokenizer, num_hidden_layers=1)).save_pretrained(folder)
    segmented = write_lines(tmp_path / "segmented.txt", SEGMENTED)
    text, references = str(tmp_path / "text.txt"), str(tmp_path / "text.ref")
    make_references(segmented, folder, text, references)
    return folder, tokenizer, text, references


def test_the_helper_reports_a_missing_file_in_one_line(tmp_path):
    command = [sys.executable, EXAMPLE / "make_word_references.py", "no.txt", "no-tokenizer", "text.txt", "text.ref"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: no.txt: No such file or directory\n")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_tokenizer(tmp_path):
    """A tiny WordPiece tokenizer for the tests of errors."""
    (tmp_path / "tokenizer").mkdir()
    return make_tokenizer(tmp_path / "tokenizer")


def words_of(tokenizer, sample):
    """Return the words that the flags of a sample make, special tokens left out."""
    begins = [i for i, continues in enumerate(sample["continues_word"]) if not continues]
    ids = sample["input_ids"].tolist()
    tokens = [tokenizer.convert_ids_to_tokens(ids[a:b]) for a, b in itertools.pairwise([*begins, len(ids)])]
    return ["".join(part.removeprefix("##") for part in word) for word in tokens if word[0] not in SPECIAL]


def test_the_helper_writes_the_documented_positions(chinese):
    _, _, text, references = chinese
    lines = Path(references).read_text(encoding="utf-8").splitlines()
    assert Path(text).read_text(encoding="utf-8").splitlines()[:2] == ["我喜欢北京。", ""]
    assert [json.loads(line) for line in lines[:2]] == [[3, 5], []]
    # Words in ASCII letters keep the space between them; their pieces belong to them.
    assert Path(text).read_text(encoding="utf-8").splitlines()[2] == "他们在北京大学学习BERT模型and语言"


def test_the_example_is_what_the_helper_makes_of_its_text(tmp_path):
    names = [str(tmp_path / name) for name in ("text.txt", "references.txt")]
    make_references(EXAMPLE / "segmented.txt", EXAMPLE / "model", *names)
    for name in names:
        assert Path(name).read_bytes() == (EXAMPLE / Path(name).name).read_bytes()


def test_the_example_runs(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    metrics = script.main(["configs/chinese.json", *flags(output_dir=tmp_path / "output")])
    assert metrics["train_loss"] < np.log(read_json(EXAMPLE, "model", "config.json")["vocab_size"])
    assert metrics["eval_samples"] == 7  # A fifth of the lines, blank ones left out.


def test_chinese_words_are_masked_whole_from_end_to_end(script, chinese, tmp_path):
    folder, tokenizer, text, references = chinese
    settings = {"train_file": text, "train_ref_file": references, "line_by_line": "true"}
    settings |= {"validation_file": text, "validation_ref_file": references}
    dataset = tokenize(script, tokenizer, 64, **settings)["train"]
    kept = [line for line in SEGMENTED if line.strip()]
    assert [words_of(tokenizer, dataset[i]) for i in range(len(dataset))] == [line.lower().split() for line in kept]
    collator = script.MaskingCollator(tokenizer, mlm_probability=0.5)
    shares = set()
    for epoch, i in itertools.product(range(40), range(len(dataset))):
        sample = dataset[script.SampleKey(i, epoch)]
        _, labels = collator.mask(sample)
        chosen = np.split(labels >= 0, np.flatnonzero(sample["continues_word"] == 0))
        shares |= {float(word.mean()) for word in chosen if len(word)}
    assert shares == {0.0, 1.0}
    results = script.main(
        flags(model_name_or_path=folder, output_dir=tmp_path / "o", do_train=True, do_eval=True, max_steps=2)
        + flags(learning_rate=1e-3, lr_scheduler_type="linear", train_batch_size=2, **settings)
    )
    assert results["train_loss"] > 0 < results["eval_loss"]


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (["[]", "[]"], ""),
        (["[]", "[]", "[]", "[]"], ""),
        (["[]", "2 3", "[]"], ", line 2: "),
        (["[]", "[]", '["two"]'], ""),
        (["[]", "[[2]]", "[]"], ""),
        (["[]", '{"2": 3}', "[]"], ""),
        (["[]", "3", "[]"], ""),
        (["[]", "[" * 99999, "[]"], ", line 2: "),
        (["[]", f"[{2**70}]", "[]"], ""),
    ],
)
def test_malformed_files_are_named_before_anything_is_tokenized(
    script, tiny_tokenizer, tmp_path, monkeypatch, references, message
):
    monkeypatch.setattr(script, "encode_texts", None)  # Not to be called.
    with pytest.raises(script.UserError, match=rf"train\.ref{message}"):
        tokenize(
            script,
            tiny_tokenizer,
            train_file=write_lines(tmp_path / "train.txt", ["the baker bakes bread ."] * 3),
            train_ref_file=write_lines(tmp_path / "train.ref", references),
            line_by_line="true",
        )


@pytest.mark.parametrize("use_fast", [True, False])
def test_positions_beyond_truncation_are_dropped(script, tiny_tokenizer, tmp_path, use_fast):
    if not use_fast:
        tiny_tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "tokenizer")

    def read(positions):
        text = write_lines(tmp_path / "train.txt", ["a " * 50])
        given = {"train_file": text, "train_ref_file": write_lines(tmp_path / "train.ref", [json.dumps(positions)])}
        return word_flags(tokenize(script, tiny_tokenizer, validation_file=text, line_by_line="true", **given)["train"])

    assert read([2, LENGTH - 2, LENGTH, 49, 50]) == [[2, LENGTH - 2]]


def test_odd_line_breaks_do_not_shift_the_lines(script, tiny_tokenizer, tmp_path):
    text, reference = tmp_path / "train.txt", tmp_path / "train.ref"
    text.write_bytes("the baker\x0b bakes\u2028 bread\r\n\r\nthe child \x85 sees\r\n".encode())
    reference.write_bytes(b"\xef\xbb\xbf[2]\r\n\r\n[3]\r\n")
    given = {"train_file": text, "train_ref_file": reference, "validation_file": text}
    assert word_flags(tokenize(script, tiny_tokenizer, line_by_line="true", **given)["train"]) == [[2], [3]]


@pytest.mark.parametrize("position", ["-1", "0", "1", "6", "100000", "1.5", "true", '"2"'])
def test_a_position_where_no_word_continues_is_an_error(script, tiny_tokenizer, tmp_path, position):
    lines = ["the baker bakes bread ."] * 3
    given = {"train_file": write_lines(tmp_path / "train.txt", lines), "validation_file": tmp_path / "train.txt"}
    given |= {"train_ref_file": write_lines(tmp_path / "train.ref", ["[2]", f"[3, {position}]", "[5]"])}
    with pytest.raises(script.UserError, match=r"line 2[ ,:]"):
        tokenize(script, tiny_tokenizer, line_by_line="true", **given)


def test_a_file_of_another_length(script, tiny_tokenizer, tmp_path):
    text, path = write_lines(tmp_path / "train.txt", ["a dog ."] * 20), tmp_path / "train.ref"
    given = {"train_file": text, "train_ref_file": path, "validation_file": text, "line_by_line": "true"}
    for lines in (17, 21):
        write_lines(path, ["[2]"] * lines)
        with pytest.raises(script.UserError, match=rf"{path}: {lines} lines for the 20 texts of {text}"):
            tokenize(script, tiny_tokenizer, **given)
    write_lines(path, ["[2]"] * 20 + ["", ""])
    assert word_flags(tokenize(script, tiny_tokenizer, **given)["train"]) == [[2]] * 20
    with pytest.raises(script.UserError, match="/dev/zero: not a regular file"):
        tokenize(script, tiny_tokenizer, **{**given, "train_ref_file": "/dev/zero"})
