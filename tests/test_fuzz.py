"""Random JSON files of settings and random data files: an error in one line or a run, nothing else, in finite time."""

import contextlib
import io
import json
import os
import re
import signal
from unittest import mock

import pytest
from conftest import flags, make_model, sentences, write_lines
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import run_mlm

SLOW = 60  # Seconds of computing that no case may take: a hang.
FUZZ = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
PARSER = run_mlm.ArgumentParser(
    (run_mlm.ModelArguments, run_mlm.DataTrainingArguments, run_mlm.TrainingArguments), add_help=False
)
NAMES = [option.lstrip("-") for option in PARSER._option_string_actions]
# Not drawn: where files are written outside the test's folder, how many processes start, how long a case takes.
LEFT_OUT = {"h", "help", "cache_dir", "preprocessing_num_workers", "local_rank", "log_level", "log_level_replica"}
KEYS = sorted({*NAMES, "learning_rat", "", "é", "-", "--seed"} - LEFT_OUT)
NUMBERS = st.integers() | st.integers(-2, 20) | st.floats() | st.floats(0, 1)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=12) | st.sampled_from(["steps", "linear", "true", "/"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
OBJECTS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=4)
CONFIGS = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
    *(VALUES.map(lambda value: json.dumps(value).encode()) for _ in range(2)),
    *(OBJECTS.map(lambda value: json.dumps(value).encode()) for _ in range(5)),
)
ROWS = st.one_of(
    VALUES, st.fixed_dictionaries({"text": st.text(max_size=40)}), st.fixed_dictionaries({"text": VALUES}), OBJECTS
)
FIELDS = st.lists(st.lists(st.text(max_size=8) | NUMBERS.map(str), min_size=1, max_size=3), max_size=6)
DATA = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(ROWS, max_size=8).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(ROWS, max_size=8).map(lambda rows: json.dumps(rows, indent=1).encode()),
    FIELDS.map(lambda rows: "\n".join(map(",".join, [["text"], *rows])).encode("utf-8", "surrogatepass")),
)


NULL_ROW = re.compile(rb"(\xef\xbb\xbf)?\s*\[?\s*null")  # PyArrow crashes there.


class LoadedError(Exception):
    """Raised where the model would be loaded: the arguments and the data are good."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and a training file."""
    folder = tmp_path_factory.mktemp("fuzz")
    make_model(folder / "model", num_hidden_layers=1)
    write_lines(folder / "train.txt", sentences(40))
    (folder / "inputs").mkdir()
    return folder


def too_slow(number, frame):
    """End a case that hangs."""
    raise TimeoutError


def run(script, arguments, path):
    """Run `main` to where the model is loaded: it gets there, or ends with one error line; `path` does not change."""
    assume(not NULL_ROW.match(path.read_bytes()))
    before = path.read_bytes(), path.stat().st_mtime_ns, os.listdir(path.parent)
    stderr = io.StringIO()
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        with contextlib.redirect_stderr(stderr), mock.patch.object(script, "load_model", side_effect=LoadedError):
            script.main(arguments)
    except LoadedError:
        pass
    except SystemExit as exit_:
        assert exit_.code == 2
        assert stderr.getvalue().count("error: ") >= 1
        assert "Traceback" not in stderr.getvalue()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert (path.read_bytes(), path.stat().st_mtime_ns, os.listdir(path.parent)) == before


# Readers of `datasets` leave a file open when it is broken; the Trainer's arguments warn of old ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(params=[12, pytest.param(200, marks=pytest.mark.long)])
def fuzz(request):
    """A few cases, which are always the same, or many new ones."""
    return settings(max_examples=request.param, derandomize=request.param < 100, **FUZZ)


def test_random_settings(script, place, monkeypatch, fuzz):
    monkeypatch.chdir(place)
    path = place / "inputs" / "arguments.json"

    @fuzz
    @given(CONFIGS)
    def check(content):
        path.write_bytes(content)
        fixed = flags(output_dir="output", overwrite_output_dir=True, do_train=True, train_file="train.txt")
        run(script, [str(path), *fixed, *flags(model_name_or_path="model")], path)

    check()


def test_random_data(script, place, monkeypatch, fuzz):
    monkeypatch.chdir(place)

    @fuzz
    @given(DATA, st.sampled_from(["csv", "json", "jsonl", "txt"]), st.booleans())
    def check(content, extension, line_by_line):
        path = place / "inputs" / f"data.{extension}"
        path.write_bytes(content)
        given_flags = flags(model_name_or_path="model", train_file=path, output_dir="output", do_train=True)
        run(script, [*given_flags, *flags(line_by_line=str(line_by_line).lower(), max_seq_length=8)], path)
        path.unlink()

    check()
