"""Tiny tokenizers, models and texts, made here: no test needs the network, `../shared/` or a GPU."""

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

# Before any import of the libraries that read them.
os.environ.update(USE_TF="0", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Two test processes share two cores.
# Workers and subprocesses inherit these from the first process: a step of one shape is compiled once for all tests.
os.environ.setdefault("MLM_TEST_CACHE", os.path.join(tempfile.gettempdir(), f"mlm-tests-{os.getpid()}"))
os.environ.update(
    {
        name: os.path.join(os.environ["MLM_TEST_CACHE"], name.lower())
        for name in ("HF_HOME", "HF_DATASETS_CACHE", "JAX_COMPILATION_CACHE_DIR")
    }
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import datasets
import pytest
import tokenizers
import torch
import transformers

# Set by the second leg of `.ci/run`: Transformers 5, where there are no Flax models.
WITHOUT_FLAX = os.environ.get("MLM_TEST_WITHOUT_FLAX") == "1"
slow_tokenizers = pytest.mark.skipif(WITHOUT_FLAX, reason="Transformers 5 has no slow tokenizer for BERT")
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("run_mlm", "run_mlm_flax")
INSTALLED = SCRIPTS[:1] if WITHOUT_FLAX else SCRIPTS
flax_only = pytest.mark.skipif(WITHOUT_FLAX, reason="needs Flax")
ARCHITECTURES = ("bert", "roberta", "albert", "distilbert", "electra")
SIZES = {
    "vocab_size": None,
    "hidden_size": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
}
WORDS = (
    "the a baker farmer teacher sailor child bakes grows reads sails sees bread corn books boats dogs old new small "
    "big and in on near house field school harbour every morning evening slowly quickly ."
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class Absent(types.ModuleType):
    """Stands for a module that Transformers 5 is tested without: what a test does with it skips the test."""

    def __init__(self, *anything):
        super().__init__("absent")

    def __getattr__(self, name):
        return self("attribute") if not name.startswith("__") else super().__getattribute__(name)

    def __call__(self, *args, **kwargs):
        if "PYTEST_CURRENT_TEST" in os.environ:
            pytest.skip("needs Flax")
        return Absent()

    def __iter__(self):
        return iter(())


def pytest_configure():
    """Where there is no Flax, let the test files be imported nevertheless."""
    if WITHOUT_FLAX:
        names = "run_mlm_flax jax jax.numpy flax flax.linen transformers.modeling_flax_pytorch_utils"
        sys.modules.update({name: Absent() for name in names.split()})


def pytest_report_header():
    """Name the versions, and what is left out."""
    versions = f"transformers {transformers.__version__}, datasets {datasets.__version__}, torch {torch.__version__}"
    return versions + WITHOUT_FLAX * ": the tests of run_mlm_flax.py are left out"


def pytest_collection_modifyitems(config, items):
    """Leave out what is for the Flax script, where there is none."""
    if WITHOUT_FLAX:
        left_out = [item for item in items if "run_mlm_flax" in item.name]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_unconfigure():
    """Remove the caches at the end of the process that began them."""
    if os.environ["MLM_TEST_CACHE"].endswith(f"-{os.getpid()}"):
        shutil.rmtree(os.environ["MLM_TEST_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def private_environment():
    """Give each test an environment of its own: the Trainer tells Accelerate there of `--bf16`, for good."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Give each test a `datasets` cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the two scripts, imported."""
    return importlib.import_module(request.param)


def sentences(count, seed=0):
    """Return `count` short sentences of the tiny tokenizers' words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[:-1], k=rng.randint(3, 18))) + " ." for _ in range(count)]


def write_lines(path, lines):
    """Write the lines to a UTF-8 file and return its path as a string."""
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def text_files(tmp_path):
    """A training file of 120 lines, some blank, and a validation file of 30."""
    train = sentences(110)
    for i in range(0, 110, 11):
        train.insert(i, "")
    return {
        "train_file": write_lines(tmp_path / "train.txt", train),
        "validation_file": write_lines(tmp_path / "validation.txt", sentences(30, seed=1)),
    }


def make_tokenizer(folder, extra=()):
    """Write a BERT tokenizer of whole words, letters and word pieces, and return it."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*SPECIAL, *dict.fromkeys([*WORDS, *letters]), *(f"##{letter}" for letter in letters), *extra]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(folder, name).unlink(missing_ok=True)  # Of a tokenizer that was there before.
    write_lines(Path(folder) / "vocab.txt", vocabulary)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_byte_level_tokenizer(folder):
    """Write a RoBERTa tokenizer (byte-level BPE) trained on the tiny sentences, and return it."""
    trained = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(sentences(200), vocab_size=400, special_tokens=special, show_progress=False)
    trained.save_model(str(folder))
    tokenizer = transformers.RobertaTokenizerFast(
        str(Path(folder) / "vocab.json"), str(Path(folder) / "merges.txt"), model_max_length=62
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_config(model_type, tokenizer, **changes):
    """Return a tiny configuration of an architecture."""
    config = transformers.CONFIG_MAPPING[model_type]()
    for name, value in {**SIZES, "vocab_size": len(tokenizer), **changes}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.pad_token_id = tokenizer.pad_token_id
    return config


def make_model(folder, model_type="bert", seed=0, **changes):
    """Write a tiny model folder with weights and tokenizer, and return the folder as a string."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer = make_byte_level_tokenizer(folder) if model_type == "roberta" else make_tokenizer(folder)
    torch.manual_seed(seed)
    model = transformers.AutoModelForMaskedLM.from_config(make_config(model_type, tokenizer, **changes))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model_folder(tmp_path):
    """A tiny BERT folder."""
    return make_model(tmp_path / "model")


def flags(**settings):
    """Return a command line for settings: True is a flag alone, other values follow their flag."""
    line = []
    for name, value in settings.items():
        line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def read_json(*path):
    """Return the content of a JSON file."""
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def run_script(name, arguments, cwd=None, **environment):
    """Run a script as a program and return the completed process, output as text."""
    if WITHOUT_FLAX and name == "run_mlm_flax":
        pytest.skip("needs Flax")
    return subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
