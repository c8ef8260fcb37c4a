"""Tiny tokenizers, models and texts, made here: no test needs the network, `../shared/` or a GPU."""

import gc
import importlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

# Before any import of the libraries that read them.
os.environ.update(USE_TF="0", HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Two test processes share two cores.
# Workers and subprocesses inherit these from the first process: a step of one shape is compiled once for all tests.
os.environ.setdefault("MLM_TEST_CACHE", os.path.join(tempfile.gettempdir(), f"mlm-tests-{os.getpid()}"))
os.environ.update(
    {name: os.path.join(os.environ["MLM_TEST_CACHE"], name.lower()) for name in ("HF_HOME", "HF_DATASETS_CACHE")}
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent / ".pytest_cache" / "jax"))
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # Compiles a quarter faster.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import datasets
import filelock
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file

WITHOUT = os.environ.get("MLM_TEST_WITHOUT", "")  # A leg of `.ci/run` sets "pytorch": the newest JAX alone.
if WITHOUT != "pytorch":
    import torch
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("run_mlm", "run_mlm_flax")
BOTH = (
    pytest.param("run_mlm", marks=pytest.mark.pytorch),
    pytest.param("run_mlm_flax", marks=pytest.mark.flax),
)
INSTALLED = SCRIPTS[1:] if WITHOUT == "pytorch" else SCRIPTS
# The first two are the two kinds of sparse head.
ARCHITECTURES = ["bert", "albert"]
ARCHITECTURES += [pytest.param(name, marks=pytest.mark.long) for name in ("roberta", "distilbert", "electra")]
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
RARE = "the baker zigzags over wobbly gravel and a sailor yawns"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def optional_module(name):
    """Return a module, or None where its framework is left out, and with it the tests that use the module."""
    framework = "pytorch" if name in ("run_mlm", "torch") else "flax"
    return None if framework == WITHOUT else importlib.import_module(name)


def pytest_report_header():
    """Name the versions, and what is left out."""
    versions = f"transformers {transformers.__version__}, datasets {datasets.__version__}"
    return f"{versions}; left out: {WITHOUT or 'nothing'}"


@pytest.hookimpl(tryfirst=True)  # Before `-m` selects.
def pytest_collection_modifyitems(config, items):
    """Leave out what needs a framework that is not there; by default, run what both scripts share through one."""
    left_out = [item for item in items if WITHOUT and item.get_closest_marker(WITHOUT)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items:
        if INSTALLED == SCRIPTS and item.get_closest_marker("shared") and item.get_closest_marker("flax"):
            item.add_marker("long")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Make a skip a failure."""
    report = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report


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


@pytest.fixture(autouse=True)
def few_programs():
    """Forget what JAX has compiled before its programs take all the memory maps that a process may have (65,530)."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(params=BOTH)
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


def make_text_files(folder):
    """Write a training file of 120 lines, some blank, and a validation file of 30; return the settings."""
    train = sentences(110)
    for i in range(0, 110, 11):
        train.insert(i, "")
    return {
        "train_file": write_lines(folder / "train.txt", train),
        "validation_file": write_lines(folder / "validation.txt", sentences(30, seed=1)),
    }


@pytest.fixture
def text_files(tmp_path):
    """A training and a validation file."""
    return make_text_files(tmp_path)


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


def make_slow_tokenizer(folder):
    """Write a tokenizer in Python of the same vocabulary, and return it."""
    make_tokenizer(folder)
    (Path(folder) / "tokenizer.json").unlink()
    kinds = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
    vocabulary = str(Path(folder) / "vocab.txt")
    tokenizer = transformers.BertJapaneseTokenizer(vocabulary, do_lower_case=True, model_max_length=64, **kinds)
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


def make_unigram(splitting, used, decoder):
    """Return a SentencePiece-like tokenizer with BERT's special tokens, trained on the words of the tiny sentences.

    `splitting` is the pre-tokenizer of its training, `used` that of its use.
    """
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer, backend.decoder = splitting, decoder
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=150, special_tokens=list(special.values()), unk_token="[UNK]", initial_alphabet=letters
    )
    trainer.show_progress = False
    backend.train_from_iterator([*sentences(300), RARE], trainer)
    backend.pre_tokenizer = used
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)


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
    made = Path(os.environ["MLM_TEST_CACHE"], "models", str(os.getpid()), f"{model_type}-{seed}-{changes}")
    if not made.exists():  # Each kind is made once and copied from then on.
        made.mkdir(parents=True)
        tokenizer = make_byte_level_tokenizer(made) if model_type == "roberta" else make_tokenizer(made)
        save_model(made, make_config(model_type, tokenizer, **changes), seed)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return str(folder)


def save_model(folder, config, seed):
    """Write a model with random weights, by PyTorch where it is installed."""
    if WITHOUT != "pytorch":
        torch.manual_seed(seed)
        transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
        return
    config.save_pretrained(folder)
    script = importlib.import_module("run_mlm_flax")
    params = script.create_parameters(script.create_model(config, script.TrainingArguments()), {}, seed)
    weights = script.pytorch_weights(params, config)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})


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


def training_flags(model_folder, text_files, output, **changes):
    """Return the command line of a run of 12 steps in two epochs, dropout and accumulation on."""
    settings = {
        "model_name_or_path": model_folder,
        "output_dir": output,
        "do_train": True,
        "do_eval": True,
        "max_seq_length": 16,
        "line_by_line": "false",
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "max_train_samples": 60,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",  # A step too many would show.
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "epoch",
        "dropout_rate": 0.1,
        "dataloader_drop_last": "false",
    }
    return flags(**{**settings, **text_files, **changes})


def finished_run(script):
    """Return the folder "tiny-mlm" of a finished run of a script. Tests share it, so they only read it."""
    folder = Path(os.environ["MLM_TEST_CACHE"], "finished", script.__name__)
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):  # The first test of any process that needs it runs it.
        if not (folder / "tiny-mlm" / "eval_results.json").exists():
            model, files = make_model(folder / "model"), make_text_files(folder)
            script.main(training_flags(model, files, folder / "tiny-mlm", token="hf_secretofmine"))
    return folder / "tiny-mlm"


def free_port():
    """Return the number of a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def read_json(*path):
    """Return the content of a JSON file."""
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def history(output):
    """Return the log history of a run, without times."""
    varying = ("runtime", "per_second", "total_flos")
    entries = read_json(output, "trainer_state.json")["log_history"]
    return [{name: entry[name] for name in entry if not name.endswith(varying)} for entry in entries]


def weights(folder):
    """Return the weights of a model folder as bytes."""
    return {name: array.tobytes() for name, array in load_file(Path(folder) / "model.safetensors").items()}


def error_line(script, arguments, capfd):
    """Run `main`, check that it ends with status 2, and return its one error line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main(arguments)
    assert exit_.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


class NotTrainedError(Exception):
    """Raised in place of the training, with what was about to be trained."""


def set_up(script, arguments):
    """Return the trainer that `main` would use with the arguments."""

    def stop(trainer, *others):
        raise NotTrainedError(trainer)

    owner = script.MaskedLMTrainer if script.__name__ == "run_mlm_flax" else script
    with mock.patch.object(owner, "train", stop), pytest.raises(NotTrainedError) as caught:
        script.main([*arguments, "--do_train"])
    trainer = caught.value.args[0]
    trainer.plan = script.RunPlan(trainer.train_dataset, trainer.args)
    return trainer


def run_script(name, arguments, cwd=None, **environment):
    """Run a script as a program and return the completed process, output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{name}.py"), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
