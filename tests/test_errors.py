"""A mistake ends a run with one line on stderr that says what to do, status 2, and nothing touched."""

import dataclasses
import json
import shutil

import pytest
from conftest import BOTH, SCRIPTS, error_line, flags, make_model, run_script, sentences, write_lines

TORCH, FLAX = ("run_mlm",), ("run_mlm_flax",)


class Place:
    """The folders of one case: `inputs` (a model, texts), `output`, and ways to change them."""

    def __init__(self, folder):
        self.inputs, self.output = folder / "inputs", folder / "output"
        self.model, self.train, self.valid = (str(self.inputs / name) for name in ("model", "train.txt", "valid.txt"))

    def file(self, name, content):
        """Write text, bytes or an object as JSON to an input file and return its path."""
        path = self.inputs / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    def data(self, name, content, **settings):
        """Return the settings that train on a new file."""
        return {"train_file": self.file(name, content), "do_train": True, **settings}

    def model_with(self, **changes):
        """Change the model's configuration and return no settings."""
        path = self.inputs / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return {}

    def without(self, *names):
        """Delete files of the model folder and return no settings."""
        for name in names:
            (self.inputs / "model" / name).unlink()
        return {}

    def corrupt(self, name, content=b"no such thing"):
        """Write nonsense over a file of the model folder and return no settings."""
        (self.inputs / "model" / name).write_bytes(content)
        return {}

    def tokenizer(self, **changes):
        """Copy the model's tokenizer, with changes to its configuration, and return the settings that name it."""
        folder = self.inputs / "tokenizer"
        shutil.copytree(self.model, folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return {"tokenizer_name": folder}

    def config(self, content, *more):
        """Return the command line with a JSON file of settings."""
        return [self.file("arguments.json", content), *more]


@dataclasses.dataclass
class Mistake:
    """What to do with a place, which parts the message has, and the scripts for which it is one.

    `make` returns changes to the settings of a whole run (None: left out), or a command line.
    """

    name: str
    make: object
    words: list
    scripts: tuple = SCRIPTS


NO_FILES = {"train_file": None, "validation_file": None}
NO_MASK = {"mask_token": None, "added_tokens_decoder": {}}
ONE_LINE = '{"text": "the baker bakes bread ."}\n'


def number(name, value, **others):
    """Return the mistake of a number that is out of its range."""
    return Mistake(
        f"{name}={value}",
        lambda place: {name: value, **others},
        [f"--{name}", f"{float(value):g}" if isinstance(value, str) else str(value), "outside"],
    )


ARGUMENTS = [
    Mistake("no data", lambda place: {"train_file": None, "validation_file": None}, ["--dataset_name", "--train_file"]),
    Mistake(
        "files beside a data set",
        lambda place: {"dataset_name": data_set(place)},
        ["--dataset_name", "--train_file", "--validation_file"],
    ),
    Mistake(
        "a validation file beside a data set",
        lambda place: {"dataset_name": data_set(place), "train_file": None},
        ["--dataset_name", "--train_file", "--validation_file"],
    ),
    Mistake(
        "a training file beside a data set",
        lambda place: {"dataset_name": data_set(place), "validation_file": None},
        ["--dataset_name", "--train_file", "--validation_file"],
    ),
    Mistake(
        "a metric that is not computed",
        lambda place: {"metric_for_best_model": "f1"},
        ["--metric_for_best_model f1", "loss, accuracy, perplexity"],
        TORCH,
    ),
    Mistake(
        "a first evaluation alone",
        lambda place: {"eval_on_start": True},
        ["--eval_on_start needs --do_eval"],
        TORCH,
    ),
    Mistake("no training data", lambda place: {"train_file": None}, ["--do_train", "--train_file"]),
    Mistake("no output_dir", lambda place: {"output_dir": None}, ["--output_dir", "required"]),
    Mistake("no model", lambda place: {"model_name_or_path": None}, ["--model_name_or_path", "--model_type"]),
    Mistake("no tokenizer", lambda place: {"model_name_or_path": None, "model_type": "bert"}, ["--tokenizer_name"]),
    Mistake(
        "model and overrides",
        lambda place: {"config_overrides": "hidden_size=8"},
        ["--config_overrides", "new models only"],
    ),
    Mistake(
        "model and another type", lambda place: {"model_type": "roberta"}, ["--model_type roberta", "of type bert"]
    ),
    Mistake(
        "unknown type",
        lambda place: {"model_name_or_path": None, "model_type": "robreta", "tokenizer_name": place.model},
        ["--model_type robreta", "roberta"],
    ),
    Mistake(
        "type that is like no other",
        lambda place: {"model_name_or_path": None, "model_type": "xyzzy", "tokenizer_name": place.model},
        ["--model_type xyzzy", "albert", "bert", "electra"],
    ),
    Mistake(
        "type without a masked-LM head",
        lambda place: {"model_name_or_path": None, "model_type": "gpt2", "tokenizer_name": place.model},
        ["--model_type gpt2", "albert", "bert", "electra"],
    ),
    Mistake(
        "type without a Flax model",
        lambda place: {"model_name_or_path": None, "model_type": "deberta", "tokenizer_name": place.model},
        ["--model_type deberta", "albert, bert", "run_mlm.py has more"],
        FLAX,
    ),
    Mistake(
        "unknown flag",
        lambda place: {"learnin_rate": 1},
        ["unknown argument --learnin_rate", "did you mean --learning_rate"],
    ),
    Mistake(
        "flag of the Flax script",
        lambda place: {"coordinator_address": "localhost:1"},
        ["unknown argument --coordinator_address"],
        TORCH,
    ),
    Mistake("flags of the Trainer", lambda place: {"torch_compile": True}, ["--torch_compile"], FLAX),
    Mistake("fp16 in Flax", lambda place: {"fp16": True}, ["unknown argument --fp16"], FLAX),
    Mistake(
        "references alone",
        lambda place: {"train_ref_file": place.train, "line_by_line": "false"},
        ["--train_ref_file", "--line_by_line true"],
    ),
    Mistake(
        "resume and overwrite",
        lambda place: {"resume_from_checkpoint": "true", "overwrite_output_dir": True},
        ["use either --resume_from_checkpoint true or --overwrite_output_dir"],
    ),
    Mistake("wrong type", lambda place: {"max_seq_length": "long"}, ["--max_seq_length", "long"]),
    Mistake("no value", lambda place: ["--max_seq_length"], ["--max_seq_length", "expected one argument"]),
    Mistake("a switch with a text", lambda place: {"do_eval": "perhaps"}, ["--do_eval", "perhaps"]),
    Mistake("token as a switch", lambda place: {"use_auth_token": "hf_secret"}, ["--use_auth_token is true or false"]),
    Mistake("tf32", lambda place: {"tf32": "true"}, ["tf32"], TORCH),
    Mistake(
        "split batches",
        lambda place: {"accelerator_config": '{"split_batches": true}'},
        ["--accelerator_config split_batches does not work here"],
        TORCH,
    ),
    Mistake("schedule", lambda place: {"lr_scheduler_type": "constnat"}, ["constnat", "constant"]),
    Mistake("strategy", lambda place: {"save_strategy": "often"}, ["often", "steps", "epoch"]),
]
NUMBERS = [
    number("mlm_probability", 1.5),
    number("mlm_probability", 0),
    number("mlm_probability", -0.1),
    number("mlm_probability", "nan"),
    number("eval_mlm_probability", 0),
    number("eval_mlm_probability", 2),
    number("mask_replace_prob", 1.5),
    number("random_replace_prob", -1),
    number("dropout_rate", 1),
    number("label_smoothing_factor", 1),
    number("train_batch_size", 0),
    number("eval_batch_size", -1),
    number("gradient_accumulation_steps", 0),
    number("max_seq_length", 0),
    Mistake("max_steps=0", lambda place: {"max_steps": 0}, ["--max_steps 0 ", "above 0"]),
    number("max_steps", -7),
    number("num_train_epochs", 0, max_steps=-1),
    number("num_train_epochs", "inf"),
    number("num_train_epochs", 1e300, max_steps=-1),
    number("learning_rate", -1),
    number("learning_rate", "nan"),
    Mistake("warmup_steps=-1", lambda place: {"warmup_steps": -1}, ["warmup_steps"]),
    number("weight_decay", -0.1),
    number("max_grad_norm", -1),
    number("adam_beta1", 1),
    number("adam_epsilon", 0),
    Mistake("logging_steps=0", lambda place: {"logging_steps": 0}, ["--logging_steps"]),
    number("save_steps", 0),
    number("eval_steps", 0),
    number("save_total_limit", 0),
    number("max_train_samples", 0),
    number("max_val_samples", -1),
    number("preprocessing_num_workers", 0),
    number("seed", -1),
    number("validation_split_percentage", 0),
    number("validation_split_percentage", 100),
    Mistake(
        "nothing hidden",
        lambda place: {"mask_replace_prob": 0, "random_replace_prob": 0},
        ["--mask_replace_prob", "add up to 0,"],
    ),
    Mistake(
        "all probabilities",
        lambda place: {"mask_replace_prob": 0.8, "random_replace_prob": 0.3},
        ["--random_replace_prob", "add up to 1.1,"],
    ),
    Mistake("max_seq_length=2", lambda place: {"max_seq_length": 2}, ["--max_seq_length 2", "no room"]),
]
CONFIGS = [
    Mistake("no such config", lambda place: ["nowhere/a.json"], ["error: nowhere/a.json: No such file or directory"]),
    Mistake("empty config", lambda place: place.config(""), ["arguments.json is not valid JSON: ", "line 1 column 1"]),
    Mistake("config is a folder", lambda place: [str(fill(place.inputs / "dir.json"))], ["dir.json", "directory"]),
    Mistake(
        "malformed config",
        lambda place: place.config('{"seed": 1,\n "max_steps" 2}'),
        ["arguments.json is not valid JSON: ", "line 2 column 14"],
    ),
    Mistake("config is a list", lambda place: place.config("[1, 2]"), ["arguments.json", "list", "object"]),
    Mistake("config is a text", lambda place: place.config('"output"'), ["arguments.json", "str", "object"]),
    Mistake("config not UTF-8", lambda place: place.config(b'{"seed": "\xe9"}'), ["arguments.json", "position 10"]),
    Mistake(
        "unknown key",
        lambda place: place.config({"max_seq_lenght": 16}),
        ["arguments.json: unknown argument --max_seq_lenght", "did you mean --max_seq_length"],
    ),
    Mistake("odd key", lambda place: place.config({"": []}), ["unknown argument --"]),
    Mistake(
        "key of a wrong type",
        lambda place: place.config({"max_seq_length": 16.5}),
        ["arguments.json: ", "max_seq_length", "16.5"],
    ),
    Mistake(
        "a flag after a config",
        lambda place: place.config({"seed": 1}, "--max_seq_length", "long"),
        ["error: argument --max_seq_length", "long"],
    ),
    Mistake("switch of a wrong type", lambda place: place.config({"do_train": "maybe"}), ["do_train", "maybe"]),
    Mistake("a list for a number", lambda place: place.config({"mlm_probability": [0.1, 0.2]}), ["0.2"]),
    Mistake("an empty list for a number", lambda place: place.config({"seed": []}), ["--seed", "one argument"]),
]
FILES = [
    Mistake("no such file", lambda place: {"train_file": "nowhere.txt"}, ["--train_file nowhere.txt: ", "nowhere.txt"]),
    Mistake("no such glob", lambda place: {"validation_file": "no*.txt"}, ["--validation_file no*.txt: "]),
    Mistake(
        "no such references",
        lambda place: {"train_ref_file": "no.ref", "line_by_line": "true"},
        ["error: no.ref: No such file or directory"],
    ),
    Mistake("empty file", lambda place: place.data("a.txt", ""), ["--train_file ", "a.txt: no text"]),
    Mistake("empty json lines", lambda place: place.data("a.jsonl", ""), ["--train_file ", "a.jsonl: no text"]),
    Mistake("a folder", lambda place: {"train_file": place.inputs}, ["--train_file", "inputs"]),
    Mistake("unsupported", lambda place: place.data("a.pdf", "text"), ["--train_file", "a.pdf", "jsonl"]),
    Mistake("no extension", lambda place: place.data("a", "text"), ["--train_file", "jsonl"]),
    Mistake(
        "no model folder",
        lambda place: {"model_name_or_path": "./nowhere"},
        ["./nowhere"],
    ),
    Mistake("no tokenizer folder", lambda place: {"tokenizer_name": "/no/where"}, ["/no/where"]),
    Mistake(
        "no weights",
        lambda place: place.without("model.safetensors"),
        ["the model ", "no file named"],
    ),
    Mistake("no config", lambda place: place.without("config.json"), ["the configuration ", "config.json"]),
    Mistake("corrupt config", lambda place: place.corrupt("config.json"), ["config.json"]),
    Mistake(
        "a vocabulary alone",
        lambda place: {"model_name_or_path": vocabulary(place)},
        ["the tokenizer ", "inputs/bare: "],
    ),
    Mistake("config of a list", lambda place: place.corrupt("config.json", b"[]"), ["inputs/model: "]),
    Mistake("corrupt weights", lambda place: place.corrupt("model.safetensors"), ["the model "]),
    Mistake("output_dir is a file", lambda place: {"output_dir": place.train}, ["--output_dir", "train.txt"]),
    Mistake(
        "output_dir under a file",
        lambda place: {"output_dir": f"{place.train}/out"},
        ["--output_dir", "train.txt/out"],
    ),
    Mistake(
        "output_dir in /proc", lambda place: {"output_dir": "/proc/nowhere/out"}, ["--output_dir /proc/nowhere/out"]
    ),
    Mistake(
        "output_dir of something else",
        lambda place: {"output_dir": fill(place.output, "my thesis")},
        ["--output_dir", "not empty", "--overwrite_output_dir"],
    ),
    Mistake(
        "no checkpoint",
        lambda place: {"resume_from_checkpoint": place.inputs},
        ["--resume_from_checkpoint", "no complete checkpoint"],
    ),
]
MODELS = [
    Mistake("hub name", lambda place: {"model_name_or_path": "no/such"}, ["no/such"]),
    Mistake("hub tokenizer", lambda place: {"tokenizer_name": "no/such"}, ["the tokenizer no/such"]),
    Mistake("hub data", lambda place: {"dataset_name": "no/such", **NO_FILES}, ["--dataset_name no/such"]),
    Mistake("no masked-LM head", lambda place: place.model_with(model_type="gpt2"), ["gpt2", "albert, "]),
    Mistake(
        "no Flax model",
        lambda place: place.model_with(model_type="deberta"),
        ["deberta", "albert, bert", "run_mlm.py has more"],
        FLAX,
    ),
    Mistake(
        "unknown architecture", lambda place: place.model_with(model_type="xyzzy"), ["the configuration ", "xyzzy"]
    ),
    Mistake(
        "no mask token",
        lambda place: place.tokenizer(**NO_MASK),
        ["the tokenizer ", "no mask token", "--tokenizer_name"],
    ),
    Mistake("corrupt tokenizer", lambda place: place.corrupt("tokenizer.json"), ["the tokenizer "]),
    Mistake(
        "weights of another shape",
        lambda place: place.model_with(hidden_size=16),
        ["the model "],
    ),
    Mistake(
        "code of its own",
        lambda place: place.model_with(model_type="own", auto_map={"AutoConfig": "own.Own"}),
        ["the configuration "],
    ),
    Mistake(
        "wrong override",
        lambda place: {
            **{"model_name_or_path": None, "config_name": place.model, "tokenizer_name": place.model},
            "config_overrides": "hidden_siz=3",
        },
        ["--config_overrides", "hidden_siz"],
    ),
    Mistake(
        "override that does not fit",
        lambda place: {
            **{"model_name_or_path": None, "config_name": place.model, "tokenizer_name": place.model},
            "config_overrides": "num_attention_heads=5",
        },
        ["--config_overrides", "multiple of"],
    ),
    Mistake(
        "TensorFlow",
        lambda place: {
            "model_name_or_path": f"{place.model}.ckpt",
            "config_name": place.model,
            "tokenizer_name": place.model,
        },
        ["ckpt"],
    ),
]
DATA = [
    Mistake("latin-1 text", lambda place: place.data("a.txt", b"the baker\ncaf\xe9 x\n"), ["a.txt", "utf-8"]),
    Mistake("latin-1 csv", lambda place: place.data("a.csv", b"text\nx\ncaf\xe9\n"), ["a.csv", "utf-8"]),
    Mistake(
        "latin-1 json lines",
        lambda place: place.data("a.jsonl", ONE_LINE.encode() + b'{"text": "\xe9"}'),
        ["a.jsonl"],
    ),
    Mistake("malformed lines", lambda place: place.data("a.jsonl", ONE_LINE * 2 + '{"text": '), ["a.jsonl"]),
    Mistake("cut lines", lambda place: place.data("a.jsonl", ONE_LINE + '{"text": "b'), ["a.jsonl"]),
    Mistake(
        "malformed document",
        lambda place: place.data("a.json", '[{"text": "a"},\n{"text" "b"}]'),
        ["a.json"],
    ),
    Mistake("a number as JSON", lambda place: place.data("a.json", "3"), ["a.json"]),
    Mistake("rows of text", lambda place: place.data("a.jsonl", '"a"\n"b"\n'), ["a.jsonl"]),
    Mistake("malformed csv", lambda place: place.data("a.csv", "text,n\na,1\nb,2,3\n"), ["a.csv", "line 3"]),
    Mistake("open quote", lambda place: place.data("a.csv", 'text\na\n"b\nc\n'), ["a.csv"]),
    Mistake("no parquet", lambda place: place.data("a.parquet", b"PAR1xxxxxx"), ["a.parquet"]),
    Mistake("no gzip", lambda place: place.data("a.txt.gz", b"text"), ["a.txt.gz"]),
    Mistake("blank lines", lambda place: place.data("a.txt", "\n \n\n"), ["the train data holds no sample"]),
    Mistake("blank json lines", lambda place: place.data("a.jsonl", "\n\n\n"), ["a.jsonl"]),
    Mistake("blank csv", lambda place: place.data("a.csv", "\n\n\n"), ["a.csv"]),
    Mistake("only a header", lambda place: place.data("a.csv", "text\n"), ["a.csv"]),
    Mistake("no row with text", lambda place: place.data("a.csv", 'text,n\n,1\n"  ",2\n'), ["train data"]),
    Mistake(
        "no such column",
        lambda place: place.data("a.csv", "text,n\na,1\n", text_column_name="body"),
        ["--text_column_name body", "text, n"],
    ),
    Mistake(
        "numbers",
        lambda place: place.data("a.jsonl", '{"text": 1}'),
        ["a.jsonl: line 1: the column text holds 1, not text"],
    ),
    Mistake(
        "a number among texts",
        lambda place: place.data("a.jsonl", ONE_LINE * 2 + '{"text": 3}'),
        ["a.jsonl"],
    ),
    Mistake(
        "too few texts for a row",
        lambda place: place.data("a.txt", "the baker bakes .\n" * 3, line_by_line="false", max_seq_length=64),
        ["train data holds no sample", "--max_seq_length"],
    ),
    Mistake(
        "too few texts for a batch",
        lambda place: place.data("a.txt", "the baker .\n" * 3, line_by_line="true", dataloader_drop_last="true"),
        ["fewer samples (3) than a step (8)", "--train_batch_size", "--dataloader_drop_last false"],
    ),
    Mistake(
        "an empty validation split",
        lambda place: place.data("a.txt", "the baker .\n" * 3, validation_file=None, do_eval=True, line_by_line="true"),
        ["the validation data holds no sample"],
    ),
    Mistake(
        "an empty train split",
        lambda place: {
            **place.data("a.txt", "the baker .\n" * 3, validation_file=None, line_by_line="true"),
            "validation_split_percentage": 99,
        },
        ["the train data holds no sample"],
    ),
    *(  # In each script, by default too: the call is each one's own.
        Mistake(
            "nothing to predict",
            lambda place: {"do_eval": True, "eval_mlm_probability": 1e-9},
            ["no token of the validation data is masked", "--eval_mlm_probability"],
            scripts,
        )
        for scripts in (TORCH, FLAX)
    ),
    Mistake(
        "data set without a known split",
        lambda place: {"dataset_name": data_set(place), **NO_FILES},
        ["no sample"],
    ),
]
DECAY = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0}
ADAPTATION = [
    Mistake(
        "a checkpoint without training",
        lambda place: {"do_train": "false", "do_eval": True, "resume_from_checkpoint": "checkpoint-3"},
        ["--resume_from_checkpoint needs --do_train", "--model_name_or_path"],
    ),
    Mistake(
        "no new tokens", lambda place: {"new_tokens": "none.txt"}, ["--new_tokens none.txt: No such file or directory"]
    ),
    Mistake(
        "empty new tokens",
        lambda place: {"new_tokens": place.file("new.txt", " \n\n")},
        ["--new_tokens ", "new.txt", "no token"],
    ),
    Mistake(
        "new tokens not UTF-8",
        lambda place: {"new_tokens": place.file("new.txt", b"caf\xe9\n")},
        ["--new_tokens ", "new.txt", "utf-8"],
    ),
    Mistake(
        "rising share",
        lambda place: {"final_mlm_probability": 0.3},
        ["--final_mlm_probability 0.3", "above --mlm_probability"],
    ),
    number("final_mlm_probability", 0),
    number("final_mlm_probability", 1.5),
    Mistake(
        "unknown argument of a schedule",
        lambda place: {**DECAY, "lr_scheduler_kwargs": '{"num_decay_steps": 1, "decay_steps": 2}'},
        ["--lr_scheduler_", "decay_steps"],
    ),
    Mistake(
        "unknown decay",
        lambda place: {**DECAY, "lr_scheduler_kwargs": '{"num_decay_steps": 1, "decay_type": "sudden"}'},
        ["--lr_scheduler_", "sudden"],
    ),
    Mistake(
        "decay steps in words",
        lambda place: {**DECAY, "lr_scheduler_kwargs": '{"num_decay_steps": "four"}'},
        ["--lr_scheduler_kwargs"],
    ),
    Mistake(
        "a schedule that fails at the last step",
        lambda place: {"lr_scheduler_type": "polynomial", "warmup_steps": 2},
        ["--lr_scheduler_type", "--warmup_steps", "division by zero"],
        TORCH,
    ),
    Mistake("no decay steps", lambda place: DECAY, ["--lr_scheduler_", "num_decay_steps"]),
    Mistake(
        "arguments of another schedule",
        lambda place: {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"num_decay_steps": 1}'},
        ["num_decay_steps", "linear"],
        TORCH,
    ),
    Mistake(
        "arguments of another schedule",
        lambda place: {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"num_decay_steps": 1}'},
        ["--lr_scheduler_kwargs", "warmup_stable_decay only"],
        FLAX,
    ),
]
MISTAKES = [*ARGUMENTS, *NUMBERS, *CONFIGS, *FILES, *MODELS, *DATA, *ADAPTATION]
# Found before anything is loaded: not even the output folder is made.
FOUND_FIRST = [
    *NUMBERS[:-1],
    *CONFIGS,
    *(mistake for mistake in FILES if mistake.name in ("no such file", "no such glob")),
]
# Started as programs, once by each script.
SAMPLE = ("unknown key", "corrupt weights", "malformed lines")


def fill(folder, content=None):
    """Make a folder, with a file in it where there is a content, and return it."""
    folder.mkdir()
    if content:
        (folder / "notes.txt").write_text(content)
    return folder


def vocabulary(place):
    """Write a folder that holds a vocabulary and nothing else, and return it."""
    fill(place.inputs / "bare")
    place.file("bare/vocab.json", {"a": 0})
    return place.inputs / "bare"


def data_set(place):
    """Write a data set with a test split alone and return its folder."""
    write_lines(fill(place.inputs / "set") / "test.txt", sentences(5))
    return place.inputs / "set"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with a tiny model, a training and a validation file."""
    folder = tmp_path_factory.mktemp("template")
    make_model(folder / "model", num_hidden_layers=1)
    write_lines(folder / "train.txt", sentences(60))
    write_lines(folder / "valid.txt", sentences(20, seed=1))
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    """A place of its own with copies of the template's files; also the working directory."""
    shutil.copytree(template, tmp_path / "inputs")
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def command_line(place, mistake):
    """Return the command line of a mistake, which `make` has prepared."""
    changes = mistake.make(place)
    if isinstance(changes, list):
        return changes
    settings = {"model_name_or_path": place.model, "train_file": place.train, "validation_file": place.valid}
    settings |= {"output_dir": place.output, "do_train": True, "max_steps": 2, "max_seq_length": 16}
    settings |= changes
    return flags(**{name: value for name, value in settings.items() if value is not None})


def snapshot(place):
    """Return {path: (kind, size, time of the last change)} of all below the inputs and the output but the lock."""
    found = {}
    for folder in (place.inputs, place.output):
        for path in folder.rglob("*"):
            if path.name != "_lock":
                status = path.stat()
                found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


def check_message(stderr, words):
    """Check that stderr holds one error line, that it has all the words, and no traceback."""
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert lines == stderr.splitlines()[-1:], stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in lines[0]
    assert len(lines[0]) < 1000


# Readers of `datasets` leave a file open when it is broken.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
# What both scripts report is one source: through one of them by default.
MARKS = {TORCH: [], FLAX: [pytest.mark.flax], SCRIPTS: [pytest.mark.flax, pytest.mark.long]}
CASES = [
    pytest.param(name, mistake, id=f"{mistake.name}-{name}", marks=MARKS[mistake.scripts] if name in FLAX else [])
    for mistake in MISTAKES
    for name in mistake.scripts
]


@pytest.mark.parametrize(("script", "mistake"), CASES, indirect=["script"])
def test_a_mistake_is_one_line_and_touches_nothing(script, mistake, place, capfd):
    arguments = command_line(place, mistake)
    before = snapshot(place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main(arguments)
    assert exit_.value.code == 2
    check_message(capfd.readouterr().err, mistake.words)
    assert snapshot(place) == before
    assert not (mistake in FOUND_FIRST and place.output.exists())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "mistake", [mistake for mistake in MISTAKES if mistake.name in SAMPLE], ids=lambda case: case.name
)
def test_a_program_ends_with_one_line_and_status_2(name, mistake, place):
    arguments = command_line(place, mistake)
    before = snapshot(place)
    done = run_script(name, arguments)
    assert done.returncode == 2
    check_message(done.stderr, mistake.words)
    assert snapshot(place) == before


def diverging(model_folder, text_files, output, **changes):
    """Return the command line of a run whose learning rate is so high that its second loss is not a number."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "max_steps": 6}
    settings |= {"max_seq_length": 16, "line_by_line": "true", "train_batch_size": 4, "dropout_rate": 0}
    settings |= {"learning_rate": 1e30, "lr_scheduler_type": "constant", "save_steps": 1, **text_files}
    return flags(**settings | changes)


# A checkpoint is due before the step of the loss, at that step, after it; the step is the last one of the run.
NOT_FINITE = [{"save_steps": 1}, {"save_steps": 2}, {"save_steps": 4, "gradient_accumulation_steps": 2}]
NOT_FINITE += [{"save_steps": 4, "logging_steps": 4, "max_steps": 2}]


@pytest.mark.parametrize("changes", NOT_FINITE, ids=str)
def test_a_loss_that_is_not_finite(script, model_folder, text_files, tmp_path, capfd, changes):
    output = tmp_path / "output"
    line = error_line(script, diverging(model_folder, text_files, output, **changes), capfd)
    assert "the loss is nan in step 2" in line
    assert "--learning_rate" in line
    saved = [f"checkpoint-{step}" for step in (1,) if changes["save_steps"] == 1]
    assert [path.name for path in output.glob("checkpoint-*")] == saved
    assert [step for step, _ in script.list_checkpoints(str(output))] == [1] * len(saved)
    assert not (output / "model.safetensors").exists()
