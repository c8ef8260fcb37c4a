#!/usr/bin/env python
"""Train a masked language model on your own text with PyTorch and the Transformers `Trainer`.

Fine-tune a BERT-like model, or train one from scratch:

    python run_mlm.py --model_name_or_path bert-base-uncased --train_file my.txt --do_train --do_eval --output_dir out
    python run_mlm.py configs/quickstart.json --learning_rate 1e-3

`run_mlm_flax.py` is the same program on JAX: the same flags, masks, batches and result files.

What to change where: the loss or the optimizer in `MaskedLMTrainer`, the masking rule in `mask_tokens`, how text
becomes rows of token ids in `TextEncoder`. Sections 3 to 5 hold no PyTorch and are byte-identical in both scripts.

Shapes: B batch (samples), L length (tokens of a sample), V vocabulary, K masked positions of a batch, H hidden size.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 2. Imports and constants
# ---------------------------------------------------------------------------------------------------------------------
import atexit
import contextlib
import copy
import difflib
import errno
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Optional

if __name__ == "__main__":
    os.environ.setdefault("USE_FLAX", "0")  # As a program: start without importing a JAX that is not used.
    os.environ.setdefault("USE_TF", "0")  # It only reads `.ckpt` files here, but Transformers would want Keras 2 too.

try:
    import fcntl
except ImportError:  # There is none on Windows.
    fcntl = None

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from huggingface_hub import EvalResult, HfApi, ModelCardData, constants, get_token
from huggingface_hub import utils as hub_utils
from safetensors import safe_open
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import check_min_version, is_torch_xla_available
from transformers.utils.versions import require_version

try:
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
except ImportError:
    hparams_pb = None

# The oldest releases that the tests run on.
check_min_version("4.57.6")
require_version("datasets>=5.0.1", "To fix: pip install -r requirements.txt")

logger = logging.getLogger("run_mlm")

MODEL_TYPES = tuple(sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING))
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
LINE_BY_LINE_DEFAULT = False  # The documented default of this script: texts are joined and cut into full rows.
FILE_FORMATS = {"txt": "text", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
# What the loaders need to give exactly the text: no byte-order mark, and "NA" is no missing value.
READING = {"text": {"encoding": "utf-8-sig"}, "csv": {"keep_default_na": False}}
# These count positions from behind the padding id, so the first pad_token_id + 1 of them are never used.
OFFSET_POSITIONS = (
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
MAX_DEFAULT_LENGTH = 1024  # Longer tokenizer limits are usually "no limit", and attention is quadratic.
SPACE_MARKS = ("▁", "Ġ", " ")  # How vocabularies write the space before a word.
IGNORED_LABEL = -100
CHOICES = {
    **{"eval_strategy": IntervalStrategy, "logging_strategy": IntervalStrategy, "save_strategy": SaveStrategy},
    **{"hub_strategy": HubStrategy},
    **{"lr_scheduler_type": SchedulerType, "optim": OptimizerNames},
}
FOREIGN_FILE = "optimizer.msgpack"  # In a checkpoint of the other script.
NULL_ROW = re.compile(rb"(\xef\xbb\xbf)?\s*\[?\s*null")  # At the beginning of a JSON file; PyArrow crashes there.
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
CHECKPOINT_FIX = "resume from another checkpoint"
FOLDER_FIX = "mend the folder, or copy it anew"
HUB_FIX = "a hub name needs a network that reaches the hub; a local folder works without"
WEIGHTS_FIX = "whole weights that belong to the configuration are needed"
RESIZE_FIX = "name the model's own in --tokenizer_name"
DISK_FULL = 2**20  # Bytes: writers report a full disk in many ways, but none leaves this much.
UNFINISHED = ".unfinished"  # Where a checkpoint or a model is written before it is renamed into place.
EVAL_EPOCH = 2**63  # No training epoch: evaluation draws its own masks, the same ones every time.
CACHED_NUMBERS = 2**18  # Attention weights or random numbers made at a time on a CPU: what its cache holds.
MAX_LISTED = 100  # Sample indices in an error message.
ORDER_KEYS = 2**62  # No index of a sample: the order of a block draws other numbers than masks do.
STREAM_STATE = "stream_state.json"  # In a checkpoint: where the stream was.
STREAM_BATCH = 256  # Texts of a stream tokenized together: enough for all cores, few enough for long texts.
STREAMED_VALIDATION = 1000  # Texts taken from a stream without a validation split.
PROBED_SAMPLES = 200_000  # Enough to expect the padding of more.
LENGTH_WINDOW = 50  # Batches sorted by length together: enough for like lengths, few enough to stay random.
# What TensorBoard compares runs by.
HYPERPARAMETERS = (
    *("model_name_or_path", "model_type", "config_name", "max_seq_length", "line_by_line", "whole_word_mask"),
    *("mlm_probability", "dropout_rate", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("max_grad_norm", "label_smoothing_factor", "bf16", "seed"),
)
CARD_RESULTS = {"loss": "eval_loss", "accuracy": "eval_accuracy", "perplexity": "perplexity"}
# Ends a model card, with its checksum.
CARD_MARK = "\n<!-- Written by a training run; a card that was changed since then is left alone: "
LOGIN_FIX = "give --hub_token or set HF_TOKEN, or log in with `hf auth login`"
REPOSITORY_FIX = "name one in --hub_model_id that your token may write to; nothing was trained"
NOT_PUSHED = ("checkpoint-*", ".*", "_*")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Arguments
# ---------------------------------------------------------------------------------------------------------------------
class UserError(ValueError):
    """A mistake in the flags or the input files: reported in one line, exit status 2."""


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer, and where from."""

    model_name_or_path: Optional[str] = HfArg(
        default=None, help="Model to start from: a hub name or a folder. Leave out to train from scratch."
    )
    model_type: Optional[str] = HfArg(
        default=None, help="Architecture to train from scratch: " + ", ".join(MODEL_TYPES) + "."
    )
    config_name: Optional[str] = HfArg(
        default=None, help="Configuration name or folder, if not that of model_name_or_path."
    )
    config_overrides: Optional[str] = HfArg(
        default=None, help="Changes to the configuration of a new model: num_hidden_layers=2,hidden_size=128"
    )
    tokenizer_name: Optional[str] = HfArg(
        default=None, help="Tokenizer name or folder, if not that of model_name_or_path."
    )
    cache_dir: Optional[str] = HfArg(default=None, help="Where downloaded models and prepared data sets are kept.")
    use_fast_tokenizer: bool = HfArg(default=True, help="Use the fast (Rust) tokenizer where there is one.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the hub.")
    token: Optional[str] = HfArg(default=None, repr=False, help="Hub token, for private models and data sets.")
    use_auth_token: bool = HfArg(default=False, help="Use the hub token stored by `hf auth login`.")
    dropout_rate: Optional[float] = HfArg(
        default=None, help="Every dropout probability of the model (default: as its configuration says)."
    )
    dense_head: bool = HfArg(
        default=False, help="Compute the vocabulary logits at every position, not only where masked."
    )

    @property
    def model_flag(self):
        """The flag that says most about the model, and its value."""
        names = ("model_name_or_path", "config_overrides", "config_name", "model_type")
        return next(f"--{name} {getattr(self, name)}" for name in names if getattr(self, name))

    @property
    def hub_options(self):
        """Keyword arguments that every hub download takes."""
        return {"cache_dir": self.cache_dir, "token": self.token or (True if self.use_auth_token else None)}


@dataclass
class DataTrainingArguments:
    """Which text, and how it becomes rows of token ids."""

    dataset_name: Optional[str] = HfArg(default=None, help="Data set: a hub name or a folder.")
    dataset_config_name: Optional[str] = HfArg(default=None, help="Configuration of the data set.")
    train_file: Optional[list[str]] = HfArg(
        default=None,
        help="Training text: files or globs of one of the formats " + ", ".join(FILE_FORMATS) + "; .gz and .zst too.",
    )
    validation_file: Optional[list[str]] = HfArg(default=None, help="Validation text, in the same formats.")
    train_ref_file: Optional[str] = HfArg(
        default=None,
        help="Word references of train_file (Chinese whole-word masking, line by line): line i is a JSON list "
        "of the token positions, [CLS] counted, that continue the word before them.",
    )
    validation_ref_file: Optional[str] = HfArg(
        default=None, help="Word references of validation_file, in the same format."
    )
    text_column_name: Optional[str] = HfArg(
        default=None,
        help="Column that holds the text, data.body for a nested field (default: `text`, or else the first column).",
    )
    overwrite_cache: bool = HfArg(default=False, help="Tokenize again even if a cached result exists.")
    validation_split_percentage: Optional[int] = HfArg(
        default=5, help="Share of the training data used for validation when there is no other, in percent."
    )
    max_seq_length: Optional[int] = HfArg(
        default=None, help="Tokens per sample (default: what tokenizer and model allow, at most 1024)."
    )
    preprocessing_num_workers: Optional[int] = HfArg(
        default=None, help="Processes that tokenize (default: one process, all cores)."
    )
    mlm_probability: float = HfArg(default=0.15, help="Share of the tokens to mask and predict.")
    eval_mlm_probability: Optional[float] = HfArg(
        default=None, help="The same share in evaluation (default: mlm_probability)."
    )
    mask_replace_prob: float = HfArg(default=0.8, help="Share of the chosen tokens that become the mask token.")
    random_replace_prob: float = HfArg(
        default=0.1, help="Share of the chosen tokens that become a random token; the others stay."
    )
    whole_word_mask: bool = HfArg(
        default=False, help="Choose whole words, not single tokens (needs a fast tokenizer, which knows the words)."
    )
    line_by_line: bool = HfArg(
        default=LINE_BY_LINE_DEFAULT,
        help="Each text is a sample of its own (true), or texts are joined and cut into rows (false).",
    )
    pad_to_max_length: bool = HfArg(
        default=False, help="Pad every batch to max_seq_length (default: to its longest sample)."
    )
    streaming: bool = HfArg(
        default=False, help="Tokenize while training reads, for text larger than disk or memory (needs max_steps)."
    )
    shuffle_buffer_size: int = HfArg(default=10_000, help="Samples that are shuffled together when streaming.")
    max_train_samples: Optional[int] = HfArg(default=None, help="Train on the first so many samples only.")
    max_val_samples: Optional[int] = HfArg(
        default=None, help="Evaluate on the first so many samples only.", aliases=["--max_eval_samples"]
    )

    def __post_init__(self):
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), list) and len(getattr(self, name)) == 1:
                setattr(self, name, getattr(self, name)[0])  # One file is a string, as documented.


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Arguments of the `Trainer`, with the short batch-size names of the Flax script."""

    output_dir: Optional[str] = HfArg(default=None, help="Where the model, checkpoints, results and logs are written.")
    per_device_train_batch_size: int = HfArg(
        default=8, help="Training batch of one device.", aliases=["--train_batch_size"]
    )
    per_device_eval_batch_size: int = HfArg(
        default=8, help="Evaluation batch of one device.", aliases=["--eval_batch_size"]
    )
    report_to: Optional[list[str]] = HfArg(default=None, help="Where to log: tensorboard, wandb, none, ...")
    hub_strategy: str = HfArg(default="end", help="When to upload: end, every_save, checkpoint or all_checkpoints.")
    debug: bool = HfArg(default=False, help="Show the traceback of an error.")
    # Transformers 5 has dropped these or made something else of them: documented, shared with the Flax script, or
    # given by `xla_spawn`.
    overwrite_output_dir: bool = HfArg(default=False, help="Write over what output_dir holds.")
    group_by_length: bool = HfArg(default=False, help="Make batches of samples of like lengths.")
    warmup_steps: int = HfArg(default=0, help="Steps of linear warmup.")
    warmup_ratio: float = HfArg(default=0.0, help="Warmup as a share of all steps, where warmup_steps is 0.")
    logging_dir: Optional[str] = HfArg(default=None, help="Where TensorBoard's events go (default: in output_dir).")
    save_safetensors: bool = HfArg(default=True, help="Write safetensors; Transformers 5 writes nothing else.")
    tpu_num_cores: Optional[int] = HfArg(default=None, help="TPU cores; xla_spawn gives it.")

    def __post_init__(self):
        check_ranges(self)
        for name, kind in CHOICES.items():
            with user_errors(f"--{name}"):
                kind(getattr(self, name))
        output_dir = self.output_dir
        self.debug = ""  # The Trainer's argument of this name is another one.
        self.logging_nan_inf_filter = False  # It would hide what ends our runs.
        self.use_cpu |= not (torch.accelerator.is_available() or is_torch_xla_available())  # Allows --bf16 there.
        if self.fp16 and self.use_cpu:
            raise UserError("--fp16 needs a GPU; on a CPU give --bf16")
        if self.fsdp and self.use_cpu:
            raise UserError("--fsdp needs GPUs: Accelerate shards nothing on a CPU; leave it out")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"--warmup_ratio {self.warmup_ratio} must be from 0 to 1")
        if not self.save_safetensors and not hasattr(transformers.TrainingArguments, "save_safetensors"):
            raise UserError("--save_safetensors false: Transformers 5 writes nothing else; leave it out")
        self.report_to = self.report_to or ["all"]  # Transformers 5 would report nowhere.
        super().__post_init__()
        self.output_dir = output_dir  # The Trainer would make one up.
        # Rows carry the keys of their masks beside the token ids: no column here is unused.
        self.remove_unused_columns = False
        self.dataloader_pin_memory &= torch.accelerator.is_available()

    @property
    def step_samples(self):
        """Samples of one optimizer step in all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def writes_results(self):
        """Whether this process writes to `output_dir`."""
        return (self.do_train or self.do_eval) and self.process_index == 0

    @property
    def device(self):
        """The device of this process; a CPU without the process number, with which no checkpoint can be read."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def get_warmup_steps(self, num_training_steps):
        """Return the steps of warmup; Transformers 5 does not read `warmup_ratio`."""
        return super().get_warmup_steps(num_training_steps) or math.ceil(num_training_steps * self.warmup_ratio)

    def __getstate__(self):
        # The Trainer pickles its arguments into `training_args.bin`, beside the model that is shared with others.
        return {**vars(self), "hub_token": None, "push_to_hub_token": None}


class ArgumentParser(HfArgumentParser):
    """An `HfArgumentParser` that raises `UserError` instead of printing its usage."""

    def error(self, message):
        if "--use_auth_token" in message:
            message = "--use_auth_token is true or false; a token goes with --token"  # Never shown.
        raise UserError(message)


def build_parser():
    """Return the parser of the three argument groups; flags cannot be abbreviated."""
    groups = (ModelArguments, DataTrainingArguments, TrainingArguments)
    return ArgumentParser(groups, allow_abbrev=False, description=__doc__.splitlines()[0])


def argument_names():
    """Return the names of all arguments, as a JSON file writes them."""
    items = [
        item
        for group in (ModelArguments, DataTrainingArguments, TrainingArguments)
        for item in fields(group)
        if item.init
    ]
    names = [name for item in items for name in (item.name, *item.metadata.get("aliases", ()))]
    return [name.lstrip("-") for name in names] + [f"no_{item.name}" for item in items if item.default is True]


def foreign_argument_names():
    """Return the names of the arguments that `run_mlm_flax.py` alone reads."""
    return ["coordinator_address", "num_processes", "process_id"]


def read_json_config(path):
    """Return the flags that a JSON object of settings stands for; `null` leaves a setting at its default.

    Raises `UserError` for a file that cannot be read, is not an object, names a key twice or one that there is not.
    """

    def unique(pairs):
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: the key {key!r} occurs twice; keep one")
        return dict(pairs)

    try:
        with open(path, encoding="utf-8-sig") as file:
            settings = json.load(file, object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a JSON file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; mend the JSON") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; it must be an object of settings") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds a JSON {type(settings).__name__}; it must be an object of settings")
    flags = []
    for key, value in settings.items():
        if key.replace("-", "_") not in argument_names():
            raise UserError(f"{path}: {unknown_argument_message(f'--{key}')}")
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value or ["none"] * (key == "report_to"))]
        elif value is not None:
            flags.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def expand_flags(argv=None):
    """Return the command line as a list of strings (default: that of this process), a JSON file at its start read."""
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    return read_json_config(argv[0]) + argv[1:] if argv and argv[0].endswith(".json") else argv


def parse_args(argv=None):
    """Return (ModelArguments, DataTrainingArguments, TrainingArguments) from flags, a JSON file, or a file then flags.

    `argv` is a list of strings (default: the command line). Raises `UserError` for anything not understood.
    """
    argv = expand_flags(argv)
    parser = build_parser()
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except Exception as error:  # The Trainer's arguments raise many kinds.
        raise UserError(f"{error or type(error).__name__}") from error
    if unknown:
        raise UserError(unknown_argument_message(unknown[0]))
    check_args(*groups)
    return tuple(groups)


def unknown_argument_message(argument):
    """Return the error line for an argument that no group has, with the closest name that one has."""
    name = argument.lstrip("-").split("=")[0]
    if name in foreign_argument_names():
        return f"{name} is an argument of run_mlm.py alone; leave it out here"
    closest = difflib.get_close_matches(name, argument_names(), n=1)
    hint = f"did you mean {closest[0]}?" if closest else "--help lists all flags"
    return (
        f"{name} is not an argument of this script; {hint}"
        if argument.startswith("-")
        else (f"{argument!r} was not expected here: every value follows a --flag; {hint}")
    )


def check_args(model_args, data_args, training_args):
    """Raise `UserError` for settings that no run can work with, before anything is loaded."""
    if not training_args.output_dir:
        raise UserError("--output_dir is missing: name the folder for the results")
    if not (model_args.model_name_or_path or model_args.model_type or model_args.config_name):
        raise UserError("no model: give --model_name_or_path, or --model_type or --config_name to train from scratch")
    if not (model_args.model_name_or_path or model_args.tokenizer_name):
        raise UserError("no tokenizer: a new model needs --tokenizer_name")
    if model_args.model_name_or_path and model_args.config_overrides:
        raise UserError("--config_overrides is for new models; leave it out together with --model_name_or_path")
    if model_args.model_type and model_args.model_type not in MODEL_TYPES:
        check_model_type(f"--model_type {model_args.model_type}", model_args.model_type)
    if not (data_args.dataset_name or data_args.train_file or data_args.validation_file):
        raise UserError("no data: give --dataset_name, or --train_file and/or --validation_file")
    if training_args.do_train and not (data_args.dataset_name or data_args.train_file):
        raise UserError("--do_train needs --train_file or --dataset_name")
    check_push(training_args)
    check_ranges(model_args)
    check_ranges(data_args)
    check_masking(data_args)
    check_streaming(data_args, training_args)
    if data_args.validation_split_percentage is None or not 1 <= data_args.validation_split_percentage <= 99:
        raise UserError(f"--validation_split_percentage {data_args.validation_split_percentage} must be from 1 to 99")
    for text, reference in (("train_file", "train_ref_file"), ("validation_file", "validation_ref_file")):
        if getattr(data_args, reference) and not (getattr(data_args, text) and data_args.line_by_line):
            raise UserError(f"--{reference} goes with --{text} and --line_by_line true")
        if getattr(data_args, reference) and data_args.whole_word_mask:
            raise UserError(f"--whole_word_mask and --{reference} both say what a word is; give one of them")


def check_model_type(subject, model_type):
    """Raise `UserError`, with the architectures that there are, for one that has no masked-LM model in this script."""
    if model_type in MODEL_TYPES:
        return
    closest = difflib.get_close_matches(model_type, MODEL_TYPES, n=3)
    if model_type in CONFIG_MAPPING or not closest:
        raise UserError(f"{subject}: no masked-LM model of type {model_type!r} here; known: {', '.join(MODEL_TYPES)}")
    raise UserError(f"{subject}: {model_type!r} is unknown; did you mean {' or '.join(closest)}?")


def check_push(training_args):
    """Raise `UserError` for an upload to the hub that cannot come about."""
    if not training_args.push_to_hub:
        return
    if not training_args.do_train:
        raise UserError("--push_to_hub uploads what --do_train makes; give both")
    if not (training_args.hub_token or get_token()):
        raise UserError(f"--push_to_hub: there is no hub token; {LOGIN_FIX}")


def check_ranges(group):
    """Raise `UserError` for the first number of an argument group that is out of its range."""
    settings = vars(group)
    given = {name: value for name, value in settings.items() if type(value) in (int, float)}
    for name, value in given.items():
        if not math.isfinite(value):
            raise UserError(f"--{name} {value} must be a finite number")
    positive = "train_batch_size eval_batch_size per_device_train_batch_size per_device_eval_batch_size max_seq_length "
    positive += "gradient_accumulation_steps logging_steps eval_steps save_steps save_total_limit adam_epsilon "
    positive += "max_train_samples max_val_samples preprocessing_num_workers shuffle_buffer_size "
    positive += "" if settings.get("max_steps", -1) > 0 else "num_train_epochs"
    for name in positive.split():
        if given.get(name, 1) <= 0:
            raise UserError(f"--{name} {given[name]} must be above 0")
    for name in "learning_rate warmup_steps weight_decay max_grad_norm".split():
        if given.get(name, 0) < 0:
            raise UserError(f"--{name} {given[name]} must not be below 0")
    for name in "adam_beta1 adam_beta2 label_smoothing_factor dropout_rate".split():
        if not 0 <= given.get(name, 0) < 1:
            raise UserError(f"--{name} {given[name]} must be from 0 to below 1")
    if given.get("max_steps", -1) == 0 or given.get("max_steps", -1) < -1:
        raise UserError(f"--max_steps {given['max_steps']} must be above 0, or -1 for --num_train_epochs")
    if not 0 <= given.get("seed", 0) < 2**32:
        raise UserError(f"--seed {given['seed']} must be from 0 to 4294967295")


def check_masking(data_args):
    """Raise `UserError` for shares of tokens that cannot be."""
    for name in ("mlm_probability", "eval_mlm_probability"):
        value = getattr(data_args, name)
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--{name} {value} must be above 0 and at most 1")
    for name in ("mask_replace_prob", "random_replace_prob"):
        if not 0 <= getattr(data_args, name) <= 1:
            raise UserError(f"--{name} {getattr(data_args, name)} must be from 0 to 1")
    mask, random = data_args.mask_replace_prob, data_args.random_replace_prob
    if mask == random == 0:
        raise UserError("--mask_replace_prob 0 and --random_replace_prob 0 hide no token; raise one of them")
    if mask + random > 1:
        raise UserError(f"--mask_replace_prob {mask} and --random_replace_prob {random} must not add up to more than 1")


def check_streaming(data_args, training_args):
    """Raise `UserError` for settings that a stream, whose length is not known, does not go with."""
    if data_args.shuffle_buffer_size <= 0:
        raise UserError(f"--shuffle_buffer_size {data_args.shuffle_buffer_size} must be above 0")
    if not data_args.streaming:
        return
    if training_args.do_train and training_args.max_steps <= 0:
        raise UserError("--streaming needs --max_steps: the length of a stream is not known")
    if not (training_args.do_train or training_args.do_eval):
        raise UserError("--streaming fills no cache: give --do_train or --do_eval, or leave it out to tokenize only")
    for name in ("train_ref_file", "validation_ref_file", "preprocessing_num_workers"):
        if getattr(data_args, name):
            raise UserError(f"--{name} does not work with --streaming; leave out one of them")


def exit_on_user_error(main):
    """Decorate `main` to print a `UserError` as one line on stderr and exit with status 2 (`--debug`: traceback)."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            if wants_traceback(argv):
                raise
            for bar in list(tqdm._instances):
                bar.close()  # The message begins a line.
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped


def wants_traceback(argv):
    """Return whether `--debug` or MLM_DEBUG=1 asks for the traceback of an error."""
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(UserError):
        argv = expand_flags(argv)
    asked = re.search(r"(^|\s)--debug([\s=]true)?(\s--|$)", " ".join(map(str, argv)), re.IGNORECASE)
    return bool(asked) or os.environ.get("MLM_DEBUG") == "1"


@contextlib.contextmanager
def user_errors(subject, fix=""):
    """Within, whatever the libraries raise for a wrong name or a broken file is a `UserError` about `subject`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        raise UserError(f"{subject}: {cause}{fix and '; '}{fix}") from error


def check_inputs(model_args, data_args):
    """Raise `UserError` for files and folders that cannot be what their flag says, before anything is loaded."""
    for split in ("train", "validation"):
        files = getattr(data_args, f"{split}_file")
        if files and not data_args.dataset_name:
            check_data_files(split, files)
        references = getattr(data_args, f"{split}_ref_file")
        if references and not os.path.isfile(references):
            raise UserError(f"--{split}_ref_file {references}: no such file")
    names = {flag: getattr(model_args, flag) for flag in ("model_name_or_path", "config_name", "tokenizer_name")}
    for flag, name in names.items():
        if name and os.path.isdir(name):
            check_model_folder(flag, name, names)
        elif name and not os.path.exists(name) and name.startswith((".", "/", "~")) and ".ckpt" not in name:
            raise UserError(f"--{flag} {name}: no such folder")
    names = [name for name in (*names.values(), data_args.dataset_name) if name and ".ckpt" not in name]
    check_hub([name for name in names if not os.path.exists(name)])


def check_data_files(split, names):
    """Raise `UserError` where a data file is missing, a folder, empty, or of no known format."""
    for name in listed(names):
        if os.path.isdir(name):
            raise UserError(f"--{split}_file {name} is a folder; name its files, as in '{os.path.join(name, '*.txt')}'")
    files = find_files(split, names)
    file_format(split, files)
    for file in files:
        if os.path.getsize(file) == 0:
            raise UserError(f"--{split}_file {file} is empty; give a file with text")
        with user_errors(f"--{split}_file {file}"), open(file, "rb") as content:
            if file.lower().endswith((".json", ".jsonl")) and NULL_ROW.match(content.read(4096)):
                raise UserError(f"--{split}_file {file}: its first row is null; leave it out")


def check_model_folder(flag, folder, names):
    """Raise `UserError` where a model folder lacks its configuration or weights, or holds broken ones."""
    subject, found = f"--{flag} {folder}", sorted(os.listdir(folder))
    if flag == "config_name" or (flag == "model_name_or_path" and not names["config_name"]):
        path = os.path.join(folder, "config.json")
        try:
            with open(path, encoding="utf-8") as file:
                settings = json.load(file)
        except OSError:
            raise UserError(f"{subject} holds no config.json; name a folder that save_pretrained wrote") from None
        except ValueError as error:
            raise UserError(f"{subject}: config.json is corrupt ({error}); copy it anew") from None
        if not isinstance(settings, dict):
            raise UserError(f"{subject}: config.json holds no JSON object; copy it anew")
        if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
            raise UserError(f"{subject} needs code of its own (auto_map), which is never run; name another model")
    if flag != "model_name_or_path":
        return
    weights = re.compile(r"(model|pytorch_model|flax_model)\S*\.(safetensors|bin|msgpack)|model\.ckpt\S*")
    if not any(weights.fullmatch(name) for name in found):
        raise UserError(f"{subject} holds no weights (model.safetensors); for new ones give --config_name {folder}")
    for name in found:
        if name.endswith(".safetensors"):
            with user_errors(f"{subject}: {name} is corrupt", "copy it anew"), safe_open(f"{folder}/{name}", "numpy"):
                pass


def check_hub(names):
    """Where the hub cannot be reached, make the libraries look for these names in their caches, and nowhere else.

    They would ask for each file of each name six times, for minutes.
    """
    if not names or constants.HF_HUB_OFFLINE:
        return
    for attempt in range(2):
        try:
            hub_utils.get_session().head(constants.ENDPOINT, timeout=10)
            return
        except Exception as error:  # The hub's releases use different HTTP libraries.
            logger.info(f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}).")
            time.sleep(1 - attempt)
    constants.HF_HUB_OFFLINE = True
    if hasattr(hub_utils, "reset_sessions"):  # From Transformers 5 on, the hub's library looks at each request.
        hub_utils.reset_sessions()


def prepare_output_dir(training_args):
    """Return the checkpoint folder to resume from, or None to start anew.

    Raises `UserError` when training would write over results that are not a checkpoint's, unless told to.
    """
    folder = training_args.output_dir
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not training_args.do_train:
        return None
    named = training_args.resume_from_checkpoint
    if named and named.lower() != "true":
        damage = checkpoint_damage(named)
        if damage:
            raise UserError(f"--resume_from_checkpoint {named}: {damage}; name another")
        others = [os.path.realpath(path) for _, path in list_checkpoints(folder)] if os.path.isdir(folder) else []
        if os.path.realpath(named) in others[:-1]:
            raise UserError(f"--resume_from_checkpoint {named}: {others[-1]} is newer; name another --output_dir")
        return named
    content = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if training_args.overwrite_output_dir or content <= {UNFINISHED, "logs", "runs"}:
        return None
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise UserError(
            f"--output_dir {folder} is not empty and holds no checkpoint; name another folder, "
            "or write over it with --overwrite_output_dir"
        )
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# 4. Data
# ---------------------------------------------------------------------------------------------------------------------
def load_raw_datasets(model_args, data_args):
    """Return {"train": Dataset, "validation": Dataset} of raw text, or the one of them that there is.

    With `streaming` they are `IterableDataset`s. Where there is no validation data, it is the first
    `validation_split_percentage` percent of the training data; of a stream, the first `max_val_samples` texts.
    Raises `UserError` for files that do not exist or have no known format.
    """
    options = {"streaming": data_args.streaming, **model_args.hub_options}
    if data_args.dataset_name:
        with user_errors(f"--dataset_name {data_args.dataset_name}", HUB_FIX):
            raw = datasets.load_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    else:
        named = {"train": data_args.train_file, "validation": data_args.validation_file}
        files = {split: find_files(split, names) for split, names in named.items() if names}
        formats = {split: file_format(split, found) for split, found in files.items()}
        raw = {}
        for split, found in files.items():
            with data_errors(split, data_args), user_errors(f"--{split}_file {' '.join(listed(named[split]))}"):
                reading = options | READING.get(formats[split], {})
                raw[split] = datasets.load_dataset(formats[split], data_files={split: found}, split=split, **reading)
    raw = {split: raw[split] for split in ("train", "validation") if split in raw}
    if not raw:
        raise UserError(f"--dataset_name {data_args.dataset_name} has neither a train nor a validation split")
    check_texts(raw, data_args)
    for split, references in (("train", data_args.train_ref_file), ("validation", data_args.validation_ref_file)):
        if references:
            raw[split] = add_word_references(raw[split], references)
    if "validation" in raw:
        return raw
    return split_off_validation(raw["train"], data_args)


def split_off_validation(raw, data_args):
    """Return {"train", "validation"}, the beginning of the training data for validation; not one that is empty."""
    if data_args.streaming:
        first = data_args.max_val_samples or STREAMED_VALIDATION
        return {"train": raw.skip(first), "validation": raw.take(first)}
    first = round(len(raw) * data_args.validation_split_percentage / 100)
    rows = {"train": range(first, len(raw)), "validation": range(first)}
    return {split: raw.select(kept) for split, kept in rows.items() if kept}


def needed_splits(raw_datasets, training_args):
    """Return the splits that training and evaluation read; all of them when there is nothing to do but tokenize."""
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval}
    return {split: raw for split, raw in raw_datasets.items() if wanted[split] or not any(wanted.values())}


def listed(names):
    """Return the file names of a flag, one or several, as a list."""
    return [names] if isinstance(names, str) else names


def find_files(split, names):
    """Return the files that a name or a list of them stands for, globs included; raises `UserError` where none is."""
    found = []
    for name in listed(names):
        files = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))
        if not files:
            raise UserError(f"--{split}_file {name}: no such file")
        found += files
    return found


def file_format(split, files):
    """Return the `datasets` loader for the files of a split; raises `UserError` where there is none."""
    extensions = set()
    for file in files:
        stem, compression = os.path.splitext(file.lower())
        packed = compression in (".gz", ".zst")
        extension = os.path.splitext(stem if packed else file.lower())[1].lstrip(".")
        if extension not in FILE_FORMATS:
            raise UserError(f"--{split}_file {file}: .{extension} is not one of {', '.join(FILE_FORMATS)}")
        if packed and extension == "parquet":
            raise UserError(f"--{split}_file {file}: parquet compresses its columns itself; unpack the file")
        if compression == ".zst" and not datasets.config.ZSTANDARD_AVAILABLE:
            raise UserError(f"--{split}_file {file}: reading .zst needs pip install zstandard")
        extensions.add(extension)
    if len({FILE_FORMATS[extension] for extension in extensions}) > 1:
        raise UserError(f"--{split}_file: files of several formats ({', '.join(sorted(extensions))}); name one format")
    return FILE_FORMATS[extensions.pop()]


def add_word_references(dataset, path):
    """Return the data set with the columns `continues_word` and `reference_line`, for line-by-line reading.

    Line i of the file is a JSON list for line i of the text, blank lines included: the token positions that continue
    the word before them. Raises `UserError` for another number of lines and for the first line that is no such list.
    """
    with user_errors(path), open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    if len(lines) != len(dataset):
        raise UserError(f"{path} has {len(lines)} lines, its text {len(dataset)}; write one reference line a text line")
    references = []
    for number, line in enumerate(lines, 1):
        try:
            positions = json.loads(line) if line else None
            if line and not all(type(position) is int and 0 <= position < 2**63 for position in positions):
                raise ValueError
            references.append(positions)
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number}: {line[:40]!r} is not a JSON list of positions") from None
    dataset = dataset.add_column("continues_word", pa.array(references, pa.list_(pa.int64())))
    return dataset.add_column("reference_line", pa.array(range(1, len(lines) + 1), pa.int64()))


def choose_max_seq_length(data_args, tokenizer, config):
    """Return the number of tokens per sample: what was asked for, as far as tokenizer and model go."""
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if config.model_type in OFFSET_POSITIONS:
        positions -= (config.pad_token_id or tokenizer.pad_token_id or 0) + 1
    limit = min(tokenizer.model_max_length, positions)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if data_args.max_seq_length is not None and data_args.max_seq_length < shortest:
        raise UserError(
            f"--max_seq_length {data_args.max_seq_length} leaves no room for text beside the special tokens; "
            f"give {shortest} or more"
        )
    if data_args.max_seq_length is None:
        if limit > MAX_DEFAULT_LENGTH:
            logger.warning(f"max_seq_length is {MAX_DEFAULT_LENGTH}; the model takes more: see --max_seq_length.")
        return min(limit, MAX_DEFAULT_LENGTH)
    if data_args.max_seq_length > limit:
        logger.warning(
            f"--max_seq_length {data_args.max_seq_length} is clipped to the model's limit of {limit} tokens."
        )
    return min(data_args.max_seq_length, limit)


def group_texts(token_ids, max_seq_length):
    """Cut a stream of tokens into full rows: (int32 [N, max_seq_length], the rest: int32 [< max_seq_length])."""
    full = len(token_ids) - len(token_ids) % max_seq_length
    return token_ids[:full].reshape(-1, max_seq_length), token_ids[full:]


class TextEncoder:
    """Turn tables of texts into tables of token rows, as the function of an Arrow-formatted `datasets.map`.

    Line by line, a text is a row, truncated, blank texts left out: `input_ids: list<id_type>`, and `full_length:
    int32`, its tokens before that. Otherwise all texts are joined into rows of `max_seq_length` (`input_ids:
    fixed_size_list<id_type>`); what a table leaves over begins the next one, so a pass drops less than one row.
    With whole words, or word references from the file `references`, `continues_word: list<uint8>` beside `input_ids`
    is 1 where a token continues the word of the token before it. Raises `UserError` for a reference to no token.
    """

    def __init__(self, tokenizer, text_column, line_by_line, max_seq_length, whole_words=False, references=None):
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.line_by_line = line_by_line
        self.max_seq_length = max_seq_length
        self.whole_words = whole_words
        self.references = references
        self.left_over = {}
        vocabulary = tokenizer.get_vocab()
        # Half the disk for a vocabulary of usual size.
        self.id_type = np.uint16 if max(vocabulary.values()) < 2**16 else np.int32
        if whole_words:
            self.begins_word = np.zeros(max(vocabulary.values()) + 1, bool)  # [V]: whether a token begins with a space.
            self.begins_word[[i for token, i in vocabulary.items() if token.startswith(SPACE_MARKS)]] = True

    def __call__(self, table):
        """Return the table of rows for a table of texts."""
        with user_errors("a text is not UTF-8"):  # Not all readers of `datasets` look.
            texts = [text or "" for text in text_array(table, self.text_column).to_pylist()]
        if not self.line_by_line:
            return self.join(self.encode(texts))
        kept = [i for i, text in enumerate(texts) if text and not text.isspace()]
        columns = self.encode([texts[i] for i in kept])
        if self.references:
            columns["continues_word"] = self.reference_flags(table.take(pa.array(kept, pa.int64())), columns)
        return pa.table(columns)

    def join(self, columns):
        """Return the table of full rows of what was left over and the columns of all texts, joined."""
        rows = {}
        for name, column in columns.items():
            values = column.flatten().to_numpy()
            stream = np.concatenate([self.left_over.get(name, values[:0]), values])
            full, self.left_over[name] = group_texts(stream, self.max_seq_length)
            rows[name] = pa.FixedSizeListArray.from_arrays(full.ravel(), self.max_seq_length)
        return pa.table(rows)

    def encode(self, texts):
        """Return {column: Arrow array} of the texts, special tokens included."""
        columns, specials = {}, self.tokenizer.num_special_tokens_to_add()
        if self.tokenizer.is_fast:
            backend = self.tokenizer.backend_tokenizer
            backend.no_padding()
            if self.line_by_line:
                backend.enable_truncation(self.max_seq_length)
            else:
                backend.no_truncation()
            # The faster one knows no words.
            encodings = (backend.encode_batch if self.whole_words else backend.encode_batch_fast)(texts)
            token_ids = [encoding.ids for encoding in encodings]
            if self.line_by_line:
                rests = [[len(rest.ids) - specials for rest in encoding.overflowing] for encoding in encodings]
                full_lengths = [len(ids) + sum(rest) for ids, rest in zip(token_ids, rests)]
        else:
            whole = [self.tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts]
            limits = {"truncation": self.line_by_line, "max_length": self.max_seq_length if self.line_by_line else None}
            token_ids = [self.tokenizer.prepare_for_model(ids, **limits, verbose=False)["input_ids"] for ids in whole]
            full_lengths = [len(ids) + specials for ids in whole]
        values = np.fromiter(itertools.chain.from_iterable(token_ids), self.id_type)  # Half the time of pa.array.
        offsets = pa.array(np.cumsum([0, *map(len, token_ids)]), pa.int32())
        columns["input_ids"] = pa.ListArray.from_arrays(offsets, pa.array(values))
        if self.line_by_line:
            columns["full_length"] = pa.array(full_lengths, pa.int32())
        if self.whole_words:
            columns["continues_word"] = self.word_flags(columns["input_ids"], encodings)
        return columns

    def word_flags(self, token_ids, encodings):
        """Return, beside list<id_type>, list<uint8>: 1 where a token continues a word.

        A word ends with its word id, and before a space: tokenizers that split nothing beforehand give one id to all.
        """
        ids, offsets = token_ids.flatten().to_numpy(), token_ids.offsets
        words = pa.array([encoding.word_ids for encoding in encodings], pa.list_(pa.int32()))
        words = words.flatten().fill_null(-1).to_numpy()
        flags = np.zeros(len(ids) + 1, np.uint8)
        flags[1:-1] = (words[1:] == words[:-1]) & (words[1:] >= 0) & ~self.begins_word[ids[1:]]
        flags[offsets.to_numpy()] = 0  # Each text begins a word.
        return pa.ListArray.from_arrays(offsets, pa.array(flags[:-1]))

    def reference_flags(self, table, columns):
        """Return, beside the rows of `columns`, list<uint8> of the reference positions as far as truncation goes."""
        special = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        first = special.index(0) if 0 in special else 0
        last = self.tokenizer.num_special_tokens_to_add() - first  # Special tokens at the end of a line.
        lengths = zip(columns["input_ids"].value_lengths().to_pylist(), columns["full_length"].to_pylist())
        lines = zip(table["reference_line"].to_pylist(), table["continues_word"].to_pylist())
        flags = []
        for (line, positions), (length, full_length) in zip(lines, lengths):
            if positions is None:
                raise UserError(f"{self.references}, line {line} is empty, but its text is not; write a JSON list")
            for position in positions:
                if not first <= position < full_length - last:
                    raise UserError(
                        f"{self.references}, line {line}: position {position} is no token of the text, whose tokens "
                        f"are at {first} to {full_length - last - 1}"
                    )
            row = np.zeros(length, np.uint8)
            row[[position for position in positions if position < length - last]] = 1
            flags.append(row)
        return pa.array(flags, pa.list_(pa.uint8()))


def text_array(table, column):
    """Return a column of an Arrow table: by its name, or by the path of a nested field (`data.body`)."""
    if column in table.column_names:
        return table[column]
    name, *path = column.split(".")
    return pc.struct_field(table[name], path)


def column_kinds(features, prefix=""):
    """Return {name: feature} of the columns of a data set, the fields of nested ones by their paths."""
    kinds = {}
    for name, kind in features.items():
        kinds |= column_kinds(kind, f"{prefix}{name}.") if isinstance(kind, dict) else {f"{prefix}{name}": kind}
    return kinds


@contextlib.contextmanager
def data_errors(split, data_args):
    """Within, a `UserError` about the texts of a split says in which data file, and where in it, the fault is."""
    try:
        yield
    except UserError as error:
        names = getattr(data_args, f"{split}_file") or data_args.train_file
        for file in [] if data_args.dataset_name else find_files(split, names):
            fault = find_fault(file)
            if fault:
                raise UserError(f"--{split}_file {file}{fault}") from error
        raise


def find_fault(path):
    """Return what is wrong with a text file, "" where that is not found: bytes not UTF-8, no text, bad JSON."""
    extension, filled, offset = os.path.splitext(path)[1].lower(), 0, 0
    if extension not in (".txt", ".csv", ".json", ".jsonl"):
        return ""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                filled += bool(line.decode("utf-8-sig").strip())
            except UnicodeDecodeError as error:
                return f", line {number}: byte {offset + error.start} is not UTF-8; save the file as UTF-8"
            offset += len(line)
    if filled <= (extension == ".csv"):
        return f" holds only {'a header' if filled else 'blank lines'}; give a file with text"
    return find_json_fault(path) if extension in (".json", ".jsonl") else ""


def find_json_fault(path):
    """Return the first place where a file is neither JSON lines nor one JSON document, "" where there is none."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            value, error = parse_json(line.strip() or "{}")
            if number == 1 and error:
                file.seek(0)
                _, error = parse_json(file.read())
            if number == 1 and (isinstance(value, list) or value is error is None):
                return ""  # One document.
            if error:
                place = f"line {number + getattr(error, 'lineno', 1) - 1}, column {getattr(error, 'colno', 1)}"
                return f", {place}: {getattr(error, 'msg', error)}; mend the JSON"
            if not isinstance(value, dict):
                return f', line {number}: {line.strip()[:40]} is no object such as {{"text": "..."}}'
    return ""


def parse_json(text):
    """Return (value, None), or (None, error) for text that is not JSON."""
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, error


def data_source(split, data_args):
    """Return the flag that names the data of a split, and its value."""
    if data_args.dataset_name:
        return f"--dataset_name {data_args.dataset_name}"
    own = getattr(data_args, f"{split}_file")
    return f"--{split if own else 'train'}_file {' '.join(listed(own or data_args.train_file))}"


def check_texts(raw_datasets, data_args):
    """Raise `UserError` for the first row that holds nothing, a number or an object where a text should be."""
    for split, dataset in raw_datasets.items():
        source = data_source(split, data_args)
        try:
            column = find_text_column(dataset, data_args.text_column_name) if dataset.column_names else "text"
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        if isinstance(dataset, datasets.Dataset):
            row = pc.index(pc.is_null(text_array(dataset.data.table, column)), True).as_py() + 1
            if row:
                raise UserError(
                    f"{source}: row {row} holds nothing (null) in the column {column}; fill it in, or leave the row out"
                )


def find_text_column(dataset, wanted):
    """Return the name or path of the text column; raises `UserError` when it is not there or holds no text."""
    kinds = column_kinds(dataset.features)
    names = [name for name in kinds if name not in ("continues_word", "reference_line")]
    column = wanted or ("text" if "text" in names else next(iter(names), "text"))
    if column not in names:
        raise UserError(f"--text_column_name {column} is not a column of the data; there are: {', '.join(names)}")
    kind = getattr(kinds[column], "dtype", kinds[column])
    if kind not in ("string", "large_string"):
        rows = enumerate(dataset[column], 1) if column in dataset.column_names else ()
        found = next((f"{value!r:.40} in row {row}" for row, value in rows if not isinstance(value, str)), kind)
        raise UserError(f"the column {column} holds {found}, not text; see --text_column_name")
    return column


def tokenizer_identity(tokenizer):
    """Return what decides which ids a tokenizer gives, whatever it was last used for."""
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.init_kwargs)]
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer.backend_tokenizer.to_str()


def tokenize_datasets(raw_datasets, tokenizer, data_args, max_seq_length, training_args=None):
    """Return {split: TokenizedDataset}; each split is encoded once and read from the `datasets` cache after that.

    The cache key is made of the text, the tokenizer, the mode and the code here, so that both scripts share it.
    A stream to train on becomes a `StreamedDataset`, which needs the training arguments.
    """
    if data_args.whole_word_mask and not tokenizer.is_fast:
        raise UserError("--whole_word_mask needs a fast tokenizer, which knows the words; see --use_fast_tokenizer")
    tokenized = {}
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_val_samples}
    # Once for all splits: it parses all of this file.
    code = [inspect.getsource(part) for part in (TextEncoder, group_texts, text_array)]
    for split, raw in raw_datasets.items():
        if isinstance(raw, datasets.IterableDataset):
            raw = with_features(raw) if split == "train" else read_stream(raw, limits[split])
        column, words = find_text_column(raw, data_args.text_column_name), data_args.whole_word_mask
        references = getattr(data_args, f"{split}_ref_file") or data_args.train_ref_file
        references = references if "reference_line" in raw.column_names else None
        encoder = TextEncoder(tokenizer, column, data_args.line_by_line, max_seq_length, words, references)
        if isinstance(raw, datasets.IterableDataset):
            tokenized[split] = StreamedDataset(raw, encoder, data_args, training_args)
            continue
        recipe = [tokenizer_identity(tokenizer), column, data_args.line_by_line, max_seq_length, words]
        recipe += [] if data_args.line_by_line else [data_args.preprocessing_num_workers]  # Each drops a rest.
        with data_errors(split, data_args):
            dataset = raw.with_format("arrow").map(
                encoder,
                batched=True,
                remove_columns=raw.column_names,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=not data_args.overwrite_cache,
                new_fingerprint=datasets.fingerprint.Hasher.hash([raw._fingerprint, recipe, code]),
                writer_batch_size=10_000,
                desc=f"Tokenizing the {split} texts",
            )
        tokenizer_identity(tokenizer)  # Leaves no truncation behind to be saved with the tokenizer.
        if limits[split] is not None:
            dataset = dataset.select(range(min(limits[split], len(dataset))))
        num_texts = len(dataset) if data_args.line_by_line else len(raw)
        tokenized[split] = TokenizedDataset(dataset, split == "validation", num_texts)
    return tokenized


def with_features(stream):
    """Return a stream of known columns: where they are not, as they are in its first row."""
    if stream.features is not None:
        return stream
    first = next(stream.with_format("arrow").iter(1), pa.table({"text": pa.array([], pa.string())}))
    return stream.cast(datasets.Features.from_arrow_schema(first.schema))


def read_stream(stream, limit):
    """Return the texts of a stream, the first `limit` if it is not None, as a data set in memory."""
    stream = with_features(stream if limit is None else stream.take(limit))
    with user_errors("the streamed validation data"):
        tables = list(stream.with_format("arrow").iter(STREAM_BATCH))
    schema = stream.features.arrow_schema
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables([schema.empty_table(), *tables])))


class TokenizedDataset:
    """Rows of token ids read straight from a memory-mapped Arrow table, each with the key of its masks.

    A sample is asked for by `epoch * len(self) + index`, so that whoever collates it, in whichever process, knows
    the epoch. With `frozen_masks` the epoch is a constant: evaluation sees the same masks every time.
    """

    def __init__(self, dataset, frozen_masks=False, num_texts=0):
        self.dataset = dataset
        self.frozen_masks = frozen_masks
        self.num_texts = num_texts
        names = [name for name in dataset.column_names if name != "full_length"]
        self.columns = {name: row_views(dataset.data.column(name)) for name in names}
        chunk_lengths = [len(chunk) for chunk in dataset.data.column("input_ids").chunks]
        self.chunk_starts = np.cumsum([0, *chunk_lengths])[:-1]

    def __reduce__(self):
        # Workers map the file themselves instead of receiving a copy of it.
        return TokenizedDataset, (self.dataset, self.frozen_masks, self.num_texts)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        """Return {"input_ids": id_type [L], "epoch", "index"}, and "continues_word": bool [L] where there is one."""
        epoch, index = divmod(int(key), len(self))
        chunk = int(np.searchsorted(self.chunk_starts, index, side="right")) - 1
        row = index - int(self.chunk_starts[chunk])
        sample = {"epoch": EVAL_EPOCH if self.frozen_masks else epoch, "index": index}
        for name, views in self.columns.items():
            values, offsets = views[chunk]
            sample[name] = values[offsets[row] : offsets[row + 1]]
        return sample

    @functools.cached_property
    def lengths(self):
        """Tokens of each sample: int32 [N]."""
        lengths = [np.diff(offsets).astype(np.int32) for _, offsets in self.columns["input_ids"]]
        return np.concatenate([np.empty(0, np.int32), *lengths])

    @property
    def num_tokens(self):
        """Tokens of all samples together."""
        return int(sum(offsets[-1] - offsets[0] for _, offsets in self.columns["input_ids"]))

    @property
    def num_truncated(self):
        """Texts that were longer than their samples are."""
        if "full_length" not in self.dataset.column_names:
            return 0
        return int(np.count_nonzero(self.dataset.data.column("full_length").to_numpy() > self.lengths))

    def count(self, token_id):
        """Return how often a token occurs; reads the whole table, chunk by chunk."""
        views = self.columns["input_ids"]
        return sum(np.count_nonzero(values[offsets[0] : offsets[-1]] == token_id) for values, offsets in views)


class StreamedDataset:
    """Rows of token ids made while training reads them, pass after pass, shuffled in blocks of rows.

    Stands where a `TokenizedDataset` does: `len` is the number of samples of the whole run, a sample is its own key,
    and a number stands for a row of the first block, all that is known beforehand. Nothing but (seed, pass, block)
    decides the order. Raises `UserError` when a pass over the text gives no row.
    """

    def __init__(self, raw, encoder, data_args, training_args):
        self.raw = raw.with_format("arrow")
        self.encoder = copy.deepcopy(encoder)  # Its truncation is not to be saved with the tokenizer.
        self.args = training_args
        self.block_size = data_args.shuffle_buffer_size
        self.pass_rows = data_args.max_train_samples
        self.first = 0  # The sample that the run begins with: not 0 after a resume.
        self.states = [self.beginning(0, 0)]

    def __len__(self):
        return self.args.max_steps * self.args.step_samples

    def __getitem__(self, key):
        return self.first_block[key % len(self.first_block)] if isinstance(key, int) else key

    def beginning(self, first, epoch):
        """Return the state at the beginning of a pass: all that is needed to read on from a block on.

        `first` is the number of its first sample in the run, `epoch` the pass, `block` and `row` those of the pass.
        `raw` and `left_over` are the states of the text and the encoder before the texts that give its first row,
        which is row `used` of theirs.
        """
        return {"first": first, "epoch": epoch, "block": 0, "row": 0, "raw": None, "left_over": {}, "used": 0}

    def tables(self, state):
        """Yield (the states `raw` and `left_over` before, texts, encoded table) from a state to the end of the pass."""
        raw, encoder = copy.deepcopy(self.raw), copy.copy(self.encoder)
        raw.load_state_dict(state["raw"])
        kinds = {"input_ids": encoder.id_type, "continues_word": np.uint8}
        encoder.left_over = {name: np.array(values, kinds[name]) for name, values in state["left_over"].items()}
        before = {"raw": state["raw"], "left_over": state["left_over"]}
        with user_errors("the streamed training data"):
            for texts in raw.iter(STREAM_BATCH):
                yield before, len(texts), encoder(texts)
                before = {"raw": raw.state_dict(), "left_over": dict(encoder.left_over)}

    def rows(self, state):
        """Yield (what of the state changes before the row, {column: array}) of the rows to the end of the pass."""
        used = state["used"]
        for before, _, table in self.tables(state):
            names = [name for name in table.column_names if name != "full_length"]
            columns = {name: row_views(table.column(name))[0] for name in names}
            for i in range(used, len(table)):
                row = {name: values[offsets[i] : offsets[i + 1]] for name, (values, offsets) in columns.items()}
                yield {**before, "used": i}, row
            used = 0

    def blocks(self, state):
        """Yield (state, rows) of the blocks from a state on, pass after pass without end."""
        while True:
            rows = self.rows(state)
            if self.pass_rows is not None:
                rows = itertools.islice(rows, self.pass_rows - state["row"])
            while block := list(itertools.islice(rows, self.block_size)):
                state = {**state, **block[0][0]}
                yield state, [row for _, row in block]
                done = {name: state[name] + len(block) for name in ("first", "row")}
                state = {**state, **done, "block": state["block"] + 1}
            if not state["row"]:
                raise UserError("the train split holds no sample: give more text, or lower --max_seq_length")
            state = self.beginning(state["first"], state["epoch"] + 1)

    def samples(self, seed):
        """Yield the samples of the run, the first of them number `self.first`, in their order."""
        begin = self.state_at(self.first)
        self.states = []
        for state, rows in self.blocks(begin):
            self.states.append(state)
            order = sample_generator(seed, state["epoch"], ORDER_KEYS + state["block"]).permutation(len(rows))
            if self.args.group_by_length:
                lengths = np.array([len(row["input_ids"]) for row in rows])
                order = group_by_length(order, lengths, self.args.step_samples)
            for i in order[max(0, self.first - state["first"]) :].tolist():
                yield {"epoch": state["epoch"], "index": state["row"] + i, **rows[i]}

    def state_at(self, first):
        """Return the state at the beginning of the block that holds sample number `first` of the run, or before."""
        while len(self.states) > 1 and self.states[1]["first"] <= first:
            self.states.pop(0)
        return self.states[0] if self.states and self.states[0]["first"] <= first else self.beginning(0, 0)

    def save_state(self, folder, step):
        """Write into a checkpoint folder what a resume after `step` steps needs, to read little more than one block."""
        state = self.state_at(step * self.args.step_samples)
        left_over = {name: np.asarray(values).tolist() for name, values in state["left_over"].items()}
        with open(os.path.join(folder, STREAM_STATE), "w", encoding="utf-8") as file:
            json.dump({**state, "left_over": left_over}, file)

    @functools.cached_property
    def first_block(self):
        """The rows of the first block before they are shuffled, as a `TokenizedDataset`."""
        tables, num_texts = [], 0
        for _, texts, table in self.tables(self.beginning(0, 0)):
            tables.append(table)
            num_texts += texts
            if sum(map(len, tables)) >= self.block_size:
                break
        if not sum(map(len, tables)):
            next(self.blocks(self.beginning(0, 0)))  # Raises the error.
        table = pa.concat_tables(tables).slice(0, self.block_size)
        num_texts = len(table) if self.encoder.line_by_line else num_texts
        return TokenizedDataset(datasets.Dataset(datasets.table.InMemoryTable(table)), num_texts=num_texts)

    @property
    def num_tokens(self):
        """Tokens of all samples of the run, as far as the first block tells."""
        return round(self.first_block.num_tokens / len(self.first_block) * len(self))


def resume_stream(dataset, checkpoint):
    """Make a stream begin where a checkpoint left it.

    Raises `UserError` when only one of the two runs streams: their samples are not the same.
    """
    streamed, path = isinstance(dataset, StreamedDataset), os.path.join(checkpoint, STREAM_STATE)
    if streamed != os.path.exists(path):
        raise UserError(f"{checkpoint} was written {'without' if streamed else 'with'} --streaming; resume it likewise")
    if streamed:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            dataset.first = json.load(file)["global_step"] * dataset.args.step_samples
        with open(path, encoding="utf-8") as file:
            dataset.states = [json.load(file)]


def row_views(column):
    """Return per chunk of an Arrow list column (values: [tokens], offsets: [rows + 1]), without copying the values."""
    views = []
    for chunk in column.chunks:
        if pa.types.is_fixed_size_list(chunk.type):
            offsets = np.arange(len(chunk) + 1) * chunk.type.list_size
            values = chunk.flatten()
        else:
            offsets = chunk.offsets.to_numpy()
            values = chunk.values
        values = values.to_numpy()
        views.append((values.view(bool) if values.dtype == np.uint8 else values, offsets))
    return views


def group_by_length(order, lengths, batch_size):
    """Sort an epoch's order by length within windows of some batches, so that a batch holds samples of like lengths."""
    window = LENGTH_WINDOW * batch_size
    return np.concatenate(
        [part[np.argsort(-lengths[part], kind="stable")] for part in np.split(order, range(window, len(order), window))]
    )


# ---------------------------------------------------------------------------------------------------------------------
# 5. Masking
# ---------------------------------------------------------------------------------------------------------------------
class SampleKey(np.random.bit_generator.ISeedSequence):
    """A key of `np.random.Philox`, which asks the system for entropy first, three times as slow, if given as `key`."""

    def __init__(self, seed, index):
        self.words = np.array([seed, index], np.uint64)

    def generate_state(self, n_words, dtype=np.uint32):
        """Return the key: uint64 [2]."""
        return self.words


def sample_generator(seed, epoch, index):
    """Return the random generator that belongs to one sample in one epoch, wherever and whenever it is asked for."""
    return np.random.Generator(np.random.Philox(SampleKey(seed, index), counter=[0, 0, 0, epoch]))


def mask_tokens(
    input_ids,
    special_tokens_mask,
    draws,
    mask_token_id,
    vocab_size,
    mlm_probability=0.15,
    mask_replace_prob=0.8,
    random_replace_prob=0.1,
    continues_word=None,
):
    """Choose the tokens to predict and hide most of them (BERT, Devlin et al. 2019, section 3.1).

    Of samples laid end to end, `input_ids: integers [T]` and `special_tokens_mask: bool [T]` (never chosen), returns
    (inputs: int32 [T], labels: int32 [T], -100 where not chosen). A chosen token becomes the mask token, a random one,
    or stays. With `continues_word: bool [T]`, words are chosen as a whole. `mlm_probability` is a number or float [T].
    `draws` are the samples' (random generator, length): what becomes of a sample is drawn from its own generator only.
    """
    inputs, labels = input_ids.astype(np.int32), np.full(len(input_ids), IGNORED_LABEL, np.int32)
    lengths = [length for _, length in draws]
    ends, uniform = np.cumsum(lengths), np.empty(len(input_ids))
    for (generator, length), end in zip(draws, ends.tolist()):
        generator.random(out=uniform[end - length : end])
    chosen = uniform < mlm_probability
    if continues_word is not None:
        starts = np.where(continues_word, np.repeat(ends - lengths, lengths), np.arange(len(inputs)))
        chosen = chosen[np.maximum.accumulate(starts)]
    places = np.flatnonzero(chosen & ~special_tokens_mask)
    labels[places] = inputs[places]
    counts = np.diff(np.searchsorted(places, ends), prepend=0).tolist()
    drawn = [generator.random((2, count)) for (generator, _), count in zip(draws, counts)]
    draw, random_ids = np.concatenate(drawn, axis=1)
    visible = np.where(draw < mask_replace_prob + random_replace_prob, random_ids * vocab_size, inputs[places])
    inputs[places] = np.where(draw < mask_replace_prob, mask_token_id, visible)
    return inputs, labels


def laid_end_to_end(samples, name, default, lengths):
    """Return the `default: [T]` with a column of samples written over it, where a sample has it."""
    if any(name in sample for sample in samples):
        for sample, part in zip(samples, np.split(default, np.cumsum(lengths)[:-1])):
            part[:] = sample.get(name, part)
    return default


def spread(values, places, padding):
    """Return int32 [B, L]: the `values: int32 [T]` at the T `places: bool [B, L]`, elsewhere the padding."""
    if len(values) == places.size:
        return values.reshape(places.shape)
    array = np.full(places.shape, padding, np.int32)
    array[places] = values
    return array


class MaskingCollator:
    """Pad samples into one batch and mask it, in NumPy; the dataclasses below it bring the settings.

    Each sample's masks depend on (seed, epoch, index) only: not on the batch, the worker, the device or a restart.
    Samples without these keys are numbered in the order in which they come.
    """

    _samples_seen = 0

    def numpy_batch(self, examples, pad_to_multiple_of=None, pad_to_length=0):
        """Return {"input_ids", "attention_mask", "labels"}, each int32 [B, L], for samples or token lists."""
        # A dict is known at once, another Mapping after a search.
        samples = [example if isinstance(example, (dict, Mapping)) else {"input_ids": example} for example in examples]
        rows = [sample["input_ids"] for sample in samples]
        rows = [row if isinstance(row, np.ndarray) else np.asarray(row, np.int32) for row in rows]
        lengths = [len(row) for row in rows]
        longest = max(pad_to_length, *lengths)
        longest += -longest % (pad_to_multiple_of or 1)
        if min(lengths) < longest and self.tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no padding token, which samples of different lengths need")
        places = np.arange(longest) < np.array(lengths)[:, None]
        places = places[:, ::-1] if self.tokenizer.padding_side == "left" else places
        input_ids = np.concatenate(rows, dtype=np.int32)
        attended = laid_end_to_end(samples, "attention_mask", np.ones_like(input_ids), lengths)
        inputs, labels = self.mask_samples(samples, input_ids, lengths)
        return {
            "input_ids": spread(inputs, places, self.tokenizer.pad_token_id),
            "attention_mask": spread(attended, places, 0),
            "labels": spread(labels, places, IGNORED_LABEL),
        }

    def mask_samples(self, samples, input_ids, lengths):
        """Return (inputs, labels), both int32 [T], of samples whose `input_ids: int32 [T]` are laid end to end."""
        if not self.mlm:
            return input_ids, np.where(input_ids == self.tokenizer.pad_token_id, IGNORED_LABEL, input_ids)
        keys = [self.key(sample) for sample in samples]
        words = laid_end_to_end(samples, "continues_word", np.zeros(len(input_ids), bool), lengths)
        return mask_tokens(
            input_ids,
            laid_end_to_end(samples, "special_tokens_mask", self.is_special.take(input_ids), lengths),
            [(sample_generator(self.seed or 0, *key), length) for key, length in zip(keys, lengths)],
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            mlm_probability=np.repeat([self.probability(epoch) for epoch, _ in keys], lengths),
            mask_replace_prob=self.mask_replace_prob,
            random_replace_prob=self.random_replace_prob,
            continues_word=words if words.any() else None,
        )

    def key(self, sample):
        """Return (epoch, index) of a sample."""
        if "index" in sample:
            return sample["epoch"], sample["index"]
        self._samples_seen += 1
        return 0, self._samples_seen - 1

    def probability(self, epoch):
        """Return the share of tokens to choose in an epoch."""
        frozen = epoch == EVAL_EPOCH and self.eval_mlm_probability is not None
        return self.eval_mlm_probability if frozen else self.mlm_probability

    @functools.cached_property
    def vocab_size(self):
        """The size of the vocabulary, which a tokenizer counts anew each time it is asked."""
        return len(self.tokenizer)

    @functools.cached_property
    def mask_token_id(self):
        """The mask token, which a tokenizer looks up anew each time it is asked."""
        return self.tokenizer.mask_token_id

    @functools.cached_property
    def is_special(self):
        """Whether a token id is a special token's: bool [V]."""
        lookup = np.zeros(max(self.tokenizer.get_vocab().values()) + 1, bool)
        lookup[self.tokenizer.all_special_ids] = True
        return lookup


@dataclass
class MaskedLMCollator(MaskingCollator, DataCollatorForLanguageModeling):
    """The stock collator with reproducible masks: takes what it takes, returns int64 tensors under the same keys."""

    pad_to_length: int = 0
    eval_mlm_probability: Optional[float] = None

    def numpy_call(self, examples):
        """Return {"input_ids", "attention_mask", "labels"} as int32 arrays [B, L]."""
        return self.numpy_batch(examples, self.pad_to_multiple_of, self.pad_to_length)

    def torch_call(self, examples):
        """Return {"input_ids", "attention_mask", "labels"} as int64 tensors [B, L]."""
        return {name: torch.from_numpy(array).long() for name, array in self.numpy_call(examples).items()}


# ---------------------------------------------------------------------------------------------------------------------
# 6. Model
# ---------------------------------------------------------------------------------------------------------------------
def load_config(model_args):
    """Return the model configuration: by name, or of a new model, with the overrides and the dropout asked for."""
    name = model_args.config_name or model_args.model_name_or_path
    if name:
        subject = f"--{'config_name' if model_args.config_name else 'model_name_or_path'} {name}"
        options = {"revision": model_args.model_revision, "trust_remote_code": False}
        with user_errors(subject, FOLDER_FIX if os.path.isdir(name) else HUB_FIX):
            config = AutoConfig.from_pretrained(name, **options, **model_args.hub_options)
        check_model_type(subject, config.model_type)
        if model_args.model_type not in (None, config.model_type):
            raise UserError(
                f"--model_type {model_args.model_type}: {subject} is {config.model_type}; leave one of them out"
            )
    else:
        config = CONFIG_MAPPING[model_args.model_type]()
    if model_args.config_overrides:
        with user_errors(f"--config_overrides {model_args.config_overrides}", "write name=value,name=value"):
            config.update_from_string(model_args.config_overrides)
    if model_args.dropout_rate is not None:
        for key, value in config.to_dict().items():
            if "dropout" in key and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(config, key, model_args.dropout_rate)
    return config


def load_tokenizer(model_args):
    """Return the tokenizer; raises `UserError` when it has no mask token."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    subject = f"--{'tokenizer_name' if model_args.tokenizer_name else 'model_name_or_path'} {name}"
    options = {"use_fast": model_args.use_fast_tokenizer, "revision": model_args.model_revision}
    with user_errors(f"{subject} (tokenizer)", FOLDER_FIX if os.path.isdir(name) else HUB_FIX):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options, **model_args.hub_options)
    if tokenizer.mask_token is None:
        raise UserError(f"{subject}: its tokenizer has no mask token; name one that has in --tokenizer_name")
    return tokenizer


def fit_config(config, tokenizer):
    """Give a new model's configuration the vocabulary and the special ids of its tokenizer."""
    config = config.get_text_config()  # The part for text, of a model that sees images too.
    config.vocab_size = len(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(config, name, getattr(tokenizer, name))


def load_model(model_args, config, tokenizer):
    """Return the masked-LM model, pretrained or with random weights, its vocabulary that of the tokenizer.

    New weights draw from PyTorch's global generator. Raises `UserError` for a TensorFlow checkpoint without TensorFlow.
    """
    name = model_args.model_name_or_path
    if "input_ids" not in forward_parameters(config):
        raise UserError(f"{model_args.model_flag}: {config.model_type} reads no text; name another architecture")
    if not name:
        fit_config(config, tokenizer)
        with user_errors(model_args.model_flag):
            return AutoModelForMaskedLM.from_config(config)
    with user_errors(f"--model_name_or_path {name}", WEIGHTS_FIX):
        if ".ckpt" in name:
            model = load_tensorflow_model(name, config)
        else:
            options = {"config": config, "revision": model_args.model_revision, "trust_remote_code": False}
            model = AutoModelForMaskedLM.from_pretrained(name, **options, **model_args.hub_options)
    with user_errors(f"--model_name_or_path {name} cannot take a tokenizer of {len(tokenizer)} tokens", RESIZE_FIX):
        resize_vocabulary(model, len(tokenizer))
    return model


def forward_parameters(config):
    """Return the parameters of the forward pass of an architecture."""
    return inspect.signature(MODEL_FOR_MASKED_LM_MAPPING[type(config)].forward).parameters


def load_tensorflow_model(name, config):
    """Return the masked-LM model of an original TensorFlow checkpoint, named with or without `.index`.

    Not `from_pretrained(from_tf=True)`, which in Transformers 4.57 fails: its model has no storage to write to (device
    "meta"), and a masked-LM model no place for the pooler and the second head that the original files hold.
    """
    path = name.removesuffix(".index")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"--model_name_or_path {name} is a TensorFlow checkpoint: reading it needs pip install tensorflow"
        )
    if not os.path.isfile(f"{path}.index"):
        raise FileNotFoundError(f"there is no file {path}.index")
    if config.model_type not in ("albert", "bert"):
        raise ValueError(f"TensorFlow checkpoints of {config.model_type} models cannot be read here")
    source, model = AutoModelForPreTraining.from_config(config), AutoModelForMaskedLM.from_config(config)
    if not hasattr(source, "load_tf_weights"):
        raise UserError(f"--model_name_or_path {name}: Transformers 5 reads no TensorFlow checkpoint; 4.57 does")
    new = {key: value.data_ptr() for key, value in source.named_parameters()}
    type(source).load_tf_weights(source, config, path)
    read = {key: value for key, value in source.named_parameters() if value.data_ptr() != new[key]}
    model.load_state_dict(read, strict=False)
    missing = [key for key, _ in model.named_parameters() if key not in read]
    if missing:
        logger.warning(f"Not in {name}, so new: {', '.join(missing)}")
    return model


def resize_vocabulary(model, size):
    """Make token embeddings and decoder fit `size` tokens; new rows start as the mean of the old ones."""
    old_size = model.config.get_text_config().vocab_size
    if size == old_size:
        return
    logger.info(f"Resizing the token embeddings from {old_size} to {size}.")
    model.resize_token_embeddings(size, mean_resizing=False)
    layers = {
        id(layer.weight): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer
    }
    if any(len(layer.weight) != size for layer in layers.values()) or model.get_output_embeddings() is None:
        raise ValueError("its head has a vocabulary of its own")
    with torch.no_grad():
        for layer in layers.values():
            layer.weight[old_size:] = layer.weight[:old_size].mean(dim=0)
    decoder = model.get_output_embeddings()
    if isinstance(model._tied_weights_keys, dict) and not model.config.tie_word_embeddings and decoder.bias is not None:
        # Transformers 5 has just shared this bias, would save it under the other name alone, and then not find it.
        decoder.bias = torch.nn.Parameter(decoder.bias.detach().clone())


# ---------------------------------------------------------------------------------------------------------------------
# 7. Optimisation and metrics
# ---------------------------------------------------------------------------------------------------------------------
def threefry(key, high, low):
    """The Threefry-2x32 hash with 20 rounds of uint32 counters (Salmon et al. 2011), as JAX draws random numbers."""
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    high, low = high + keys[0], low + keys[1]
    for block in range(5):
        for rotation in rotations[block % 2]:
            high = high + low
            low = high ^ (low << np.uint32(rotation) | low >> np.uint32(32 - rotation))
        high = high + keys[(block + 1) % 3]
        low = low + keys[(block + 2) % 3] + np.uint32(block + 1)
    return high, low


def epoch_permutation(seed, epoch, num_samples):
    """Return the order of an epoch's samples: int64 [N], equal to that of `run_mlm_flax.py` (`jax.random.permutation`).

    JAX sorts by random keys, anew until ties no longer matter; here its generator runs in NumPy.
    """
    zeros, counters = np.zeros(num_samples, np.uint32), np.arange(num_samples, dtype=np.uint32)
    pair = np.zeros(2, np.uint32), np.arange(2, dtype=np.uint32)
    seed_key = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    key = np.stack(threefry(seed_key, np.zeros(1, np.uint32), np.array([epoch], np.uint32)))[:, 0]
    order = np.arange(num_samples)
    for _ in range(math.ceil(3 * math.log(max(1, num_samples)) / math.log(2**32 - 1))):
        key, subkey = np.stack(threefry(key, *pair), axis=1)
        high, low = threefry(subkey, zeros, counters)
        order = order[np.argsort(high ^ low, kind="stable")]
    return order


def epoch_order(dataset, args, seed, epoch):
    """Return an epoch's samples in the order of its steps: int64 [N], or less where a last step that is not full goes.

    Both choices are made by whole steps, so that they do not depend on how a step is split.
    """
    order = epoch_permutation(seed, epoch, len(dataset))
    if args.group_by_length:
        order = group_by_length(order, dataset.lengths, args.step_samples)
    return order[: len(order) - len(order) % args.step_samples] if args.dataloader_drop_last else order


class EpochSampler(torch.utils.data.Sampler):
    """Shuffles anew in every epoch; yields `epoch * N + index`, the keys of a `TokenizedDataset`."""

    def __init__(self, dataset, args):
        self.dataset = dataset
        self.args = args
        self.epoch = 0

    def set_epoch(self, epoch):
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self):
        return len(self.dataset) - (len(self.dataset) % self.args.step_samples if self.args.dataloader_drop_last else 0)

    def __iter__(self):
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(self.dataset, StreamedDataset):
            # Of a stream, the samples themselves; on a resume, the Trainer skips what stands for the first ones.
            yield from itertools.repeat(None, self.dataset.first)
            yield from itertools.islice(self.dataset.samples(seed), len(self.dataset) - self.dataset.first)
            return
        order = epoch_order(self.dataset, self.args, seed, self.epoch)
        yield from (self.epoch * len(self.dataset) + order).tolist()


def last_attention_output(model):
    """Return the part of a BERT-like encoder behind which every position goes its own way, or None."""
    name = f".{getattr(model.config, 'num_hidden_layers', 0) - 1}.attention.output"
    return next((module for path, module in model.named_modules() if path.endswith(name)), None)


def model_inputs(model, batch):
    """Return what a model takes of a batch: not all take a mask, and labels are for the inputs of decoders only."""
    inputs = {name: batch[name] for name in forward_parameters(model.config) if name in batch}
    labels = inputs.pop("labels", None)
    if model.config.is_encoder_decoder and labels is not None:
        # Where a row has none, MBart would fail: it gets the tokens, as no logit of the row counts.
        inputs["labels"] = labels.where((labels != IGNORED_LABEL).any(1, keepdim=True), batch["input_ids"])
    return inputs


@contextlib.contextmanager
def labelled_positions_only(model, positions, selection):
    """Within, `model` goes on with its hidden states at the labelled `positions: (rows [K], columns [K])`: [1, K, H].

    From the last attention ("layer") or from the end of the encoder ("encoder") on: the model's own head computes
    K rows of logits instead of B * L.
    """

    def select_inputs(module, inputs):
        return tuple(hidden[positions][None] for hidden in inputs)

    def select_outputs(module, inputs, output):
        hidden = output[0][positions][None]
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output["last_hidden_state"] = hidden
        return output

    if selection == "layer":
        handle = last_attention_output(model).register_forward_pre_hook(select_inputs)
    else:
        handle = model.base_model.register_forward_hook(select_outputs)
    try:
        yield
    finally:
        handle.remove()


def keep_mask(shape, probability):
    """Return uint8 of a shape, 1 with a probability (to 2**-16), else 0; NumPy draws, PyTorch gives the seed."""
    generator = np.random.SFC64(torch.randint(2**63 - 1, ()).item())
    keep, limit = np.empty(math.prod(shape), bool), min(round(probability * 2**16), 2**16 - 1)
    for part in np.split(keep, range(CACHED_NUMBERS, len(keep), CACHED_NUMBERS)):
        words = generator.random_raw(-(-len(part) // 4))
        np.less(words.view(np.uint16)[: len(part)], limit, out=part)
    return torch.from_numpy(keep.view(np.uint8)).view(shape)


def quick_dropout(input, p=0.5, training=True, inplace=False):
    """`torch.nn.functional.dropout`, on `keep_mask`."""
    return (
        input * keep_mask(input.shape, 1 - p) * (1 / (1 - p)) if training and 0 < p < 1 else dropout(input, p, training)
    )


def quick_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """`scaled_dot_product_attention`; with dropout it is `DropoutAttention`."""
    # A row that attends to nothing, a mask that is learned, keys or values for several samples or heads.
    special = not query.shape[:2] == key.shape[:2] == value.shape[:2]
    if attn_mask is not None:
        blocked = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -math.inf
        special |= bool(attn_mask.requires_grad or blocked.all(-1).any())
    if is_causal or special or options.get("enable_gqa") or query.ndim != 4 or not 0 < dropout_p < 1:
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return DropoutAttention.apply(query, key, value, attn_mask, 1 - dropout_p, scale).transpose(1, 2)


class DropoutAttention(torch.autograd.Function):
    """(softmax(scale Q K^T + mask) * keep / probability) V for Q, K, V: [B, heads, L, H / heads].

    The result is [B, L, heads, H / heads]. A few samples are computed at a time, so that their weights stay in the
    processor's cache where one sample's fit, and the backward pass computes the weights again instead of keeping them.
    """

    @staticmethod
    def parts(*arrays):
        """Return the arrays in parts of some samples, None where an array is."""
        heads, length = arrays[0].shape[1:3]
        samples = max(1, CACHED_NUMBERS // (heads * length * length))
        count = -(-len(arrays[0]) // samples)
        return zip(*([None] * count if array is None else array.split(samples) for array in arrays))

    @staticmethod
    def product(left, right, factor=1.0):
        """Return `factor * left @ right` of each sample and head."""
        result = left.new_empty(math.prod(left.shape[:2]), left.shape[2], right.shape[3])
        result.baddbmm_(left.flatten(0, 1), right.flatten(0, 1), beta=0, alpha=factor)
        return result.unflatten(0, left.shape[:2])

    @staticmethod
    def weights(query, key, mask, scale):
        """Return softmax(scale Q K^T + mask) in float32."""
        scores = DropoutAttention.product(query, key.transpose(2, 3), scale).float()
        return (scores if mask is None else scores.add_(mask)).softmax(-1)

    @staticmethod
    def forward(ctx, query, key, value, mask, probability, scale):
        """Draw what to keep and return the attention's output."""
        mask = None if mask is None else mask.expand(len(query), *mask.shape[1:])
        keep = keep_mask((*query.shape[:3], key.shape[2]), probability)
        ctx.save_for_backward(query, key, value, mask, keep)
        ctx.factors = scale, 1 / probability
        batch, heads, length = query.shape[:3]
        output = value.new_empty(batch, length, heads, value.shape[3])  # No view, which could not be changed in place.
        with torch.autocast("cpu", enabled=False):
            for q, k, v, m, d, out in DropoutAttention.parts(query, key, value, mask, keep, output.transpose(1, 2)):
                kept = DropoutAttention.weights(q, k, m, scale).mul_(d.float()).to(v.dtype)
                out.copy_(DropoutAttention.product(kept, v, 1 / probability))
        return output

    @staticmethod
    def backward(ctx, gradient):
        """Return the gradients of Q, K and V."""
        product, (scale, factor) = DropoutAttention.product, ctx.factors
        gradients = [torch.empty_like(array) for array in ctx.saved_tensors[:3]]
        gradient = gradient.transpose(1, 2)
        for q, k, v, m, d, g, *parts in DropoutAttention.parts(*ctx.saved_tensors, gradient, *gradients):
            weights, d = DropoutAttention.weights(q, k, m, scale), d.float()
            back = product(g, v.transpose(2, 3), factor).float().mul_(d)
            back = torch.ops.aten._softmax_backward_data(back, weights, -1, torch.float32).to(q.dtype)
            kept = weights.mul_(d).to(v.dtype)
            parts[0].copy_(product(back, k, scale))
            parts[1].copy_(product(back.transpose(2, 3), q, scale))
            parts[2].copy_(product(kept.transpose(2, 3), g, factor))
        return *gradients, None, None, None


class LossSum(torch.autograd.Function):
    """Cross entropy of `logits: float32 [K, V]` and `labels: int64 [K]`, summed; nobody else may use the logits.

    Their gradient takes their memory. It is made with the loss, some rows at a time that fit in the processor's cache.
    """

    @staticmethod
    def forward(ctx, logits, labels, smoothing):
        """Return the sum."""
        assert logits.shape[:-1] == labels.shape
        rows, total = max(1, CACHED_NUMBERS // logits.shape[1]), logits.new_zeros(())
        for part, label in zip(logits.split(rows), labels.split(rows)):
            log_p = part.log_softmax(-1)
            total -= (1 - smoothing) * log_p.gather(1, label[:, None]).sum()
            torch.exp(log_p, out=part)
            if smoothing:
                total -= smoothing * log_p.mean(-1).sum()
                part -= smoothing / logits.shape[1]
            part.scatter_add_(1, label[:, None], part.new_full((len(part), 1), smoothing - 1))
        ctx.save_for_backward(logits)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        """Return the gradient of the logits."""
        return ctx.saved_tensors[0].mul_(gradient), None, None


class QuickDropout(TorchFunctionMode):
    """Within, dropout, attention's too, takes a CPU a fraction of the time that PyTorch's functions take."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        quick = {dropout: quick_dropout, scaled_dot_product_attention: quick_attention}
        return quick.get(func, func)(*args, **(kwargs or {}))


class MaskedLMTrainer(Trainer):
    """A `Trainer` whose loss is one mean over the masked tokens of the whole step, however the step is split."""

    def __init__(self, *args, selection=None, **kwargs):
        super().__init__(*args, compute_metrics=masked_lm_metrics, **kwargs)
        self.model_accepts_loss_kwargs = True  # `compute_loss` gets the number of masked tokens of the step.
        if selection == "layer" and (self.args.gradient_checkpointing or self.args.torch_compile or self.args.fsdp):
            selection = "encoder"  # The layers may run again in the backward pass, without the hook; FSDP wraps them.
        self.selection = None if self.args.n_gpu > 1 else selection  # DataParallel splits the batch behind our back.
        self.first_step = self.reported_step = 0
        self.reported_loss = 0.0
        self.clock = 0, 0.0
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                # Transformers 5 does not read the argument, and without a training it would write to the work folder.
                default = os.path.join(self.args.output_dir, "runs", time.strftime("%b%d_%H-%M-%S"))
                callback.logging_dir = self.args.logging_dir or default

    def start_clock(self):
        """Measure `tokens_per_second` from here."""
        self.clock = self.state.global_step, time.perf_counter()

    def init_hf_repo(self, token=None):
        """Make the repository on the hub, as `run_mlm_flax.py` does."""
        if self.is_world_process_zero():
            self.hub_model_id, self.push_in_progress = create_repository(self.args, REPOSITORY_FIX), None

    def log(self, logs, *args, **kwargs):
        """Report as the Trainer does, but the loss unrounded, and the speed of the steps that this process made."""
        if "loss" in logs:
            total, step = self._total_loss_scalar, self.state.global_step
            logs["loss"] = (total - self.reported_loss) / (step - self.reported_step)
            self.reported_loss, self.reported_step = total, step
            tokens = self.train_dataset.num_tokens / len(self.train_dataset) * self.args.step_samples
            logs["tokens_per_second"] = round(tokens * (step - self.clock[0]) / (time.perf_counter() - self.clock[1]))
            self.start_clock()
        if "train_loss" in logs and self.first_step:
            history, total, step = self.state.log_history, self._total_loss_scalar, self.state.global_step
            if step > self.reported_step:
                rest = (total - self.reported_loss) / (step - self.reported_step)
                history = [*history, {"step": step, "loss": rest}]
            logs["train_loss"] = mean_logged_loss(history)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs[name] = round(logs[name] * (1 - self.first_step / self.state.max_steps), 3)
        super().log(logs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Return the loss of a micro-batch; raises `UserError` before the step is made where it is not finite."""
        # Not where activations are computed again in the backward pass, which runs outside of it.
        other = self.args.torch_compile or self.args.gradient_checkpointing
        quick = self.args.device.type == "cpu" and not other
        with QuickDropout() if quick else contextlib.nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        # Waits for the device, as the Trainer's own look at the loss does by default; like that, not on a TPU.
        if not (is_torch_xla_available() or torch.isfinite(loss)):
            self.stop_training(f"the loss is {loss.item()}", self.state.global_step)
        return loss

    def stop_training(self, reason, step):
        """Raise a `UserError` for numbers that are not finite; `step` counts from 0."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        samples = samples_of_step(self.train_dataset, self.args, seed, step)
        raise UserError(not_finite_message(reason, step + 1, self._get_learning_rate(), samples))

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the model; raises `UserError` where a weight is not finite."""
        step, finite = self.state.global_step, [weight.isfinite().all() for weight in self.model.parameters()]
        if step and not torch.stack(finite).all():
            self.stop_training("a weight is not finite", step - 1)
        super().save_model(output_dir, _internal_call)

    def create_optimizer(self, *args, **kwargs):
        """Return the optimizer; raises `UserError` for one that is not installed here."""
        with user_errors(f"--optim {self.args.optim.value}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """Return the schedule; raises `UserError` for one that lacks an argument."""
        with user_errors(f"--lr_scheduler_type {self.args.lr_scheduler_type.value}"):
            return super().create_scheduler(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with user_errors(f"the model in {resume_from_checkpoint}", CHECKPOINT_FIX):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with user_errors(f"the optimizer state in {checkpoint}", CHECKPOINT_FIX):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with user_errors(f"the random state in {checkpoint}", CHECKPOINT_FIX):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model, trial):
        # Written beside and renamed: a folder named checkpoint-N is whole at any moment.
        folder = self.args.output_dir
        with staging(folder) if self.args.should_save else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            self._get_output_dir = lambda trial: os.path.join(folder, UNFINISHED)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                del self._get_output_dir
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged = os.path.join(folder, UNFINISHED, f"checkpoint-{self.state.global_step}")
                if self.state.best_model_checkpoint == staged:
                    self.state.best_model_checkpoint = os.path.join(folder, os.path.basename(staged))
                    write_json(os.path.join(staged, "trainer_state.json"), asdict(self.state))
                if isinstance(self.train_dataset, StreamedDataset):
                    self.train_dataset.save_state(staged, self.state.global_step)
                publish_checkpoint(staged, folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            if self.args.hub_always_push:
                self._finish_current_push()  # It reads the files that the next one writes over.
            super()._push_from_checkpoint(os.path.join(folder, f"checkpoint-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder):
        pass  # Too early: the Trainer calls it before the checkpoint is whole.

    def _get_train_sampler(self, train_dataset=None):
        return EpochSampler(self.train_dataset, self.args)

    def _inner_training_loop(self, batch_size=None, **kwargs):
        # The Trainer would go on with the checkpoint's batch size, whatever the arguments say.
        return super()._inner_training_loop(
            batch_size if self.args.auto_find_batch_size else self.args.train_batch_size, **kwargs
        )

    def get_batch_samples(self, *args, **kwargs):
        # The Trainer would make one step more of a run that is resumed at its end.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.args.n_gpu > 1:  # The Trainer divides it among the devices, but here one loss is made of all logits.
            count = sum((batch["labels"] != IGNORED_LABEL).sum() for batch in batches)
        return batches, count

    def get_eval_dataloader(self, eval_dataset=None):
        # The Trainer would leave out evaluation's last batch as well.
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset)

    def labelled_logits(self, model, inputs):
        """Return (logits [K, V], labels [K]) at the positions that have a label."""
        labels = inputs["labels"]
        positions = (labels != IGNORED_LABEL).nonzero(as_tuple=True)
        unwrapped = self.accelerator.unwrap_model(model)
        inputs = model_inputs(unwrapped, inputs)
        if self.selection is None:
            return model(**inputs).logits[positions], labels[positions]
        if self.args.torch_compile:
            for index in positions:
                torch._dynamo.maybe_mark_dynamic(index, 0)  # Or the second K compiles the model anew.
        with labelled_positions_only(unwrapped, positions, self.selection):
            return model(**inputs).logits.flatten(0, 1), labels[positions]  # The gradient of `[0]` would be a copy.

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the sum of the losses divided by the number of masked tokens in the step; 0 where there are none."""
        logits, labels = self.labelled_logits(model, inputs)
        smoothing = self.args.label_smoothing_factor
        if logits.device.type == "cpu" and logits.requires_grad and not return_outputs:
            loss = LossSum.apply(logits.float(), labels, smoothing)
        else:
            loss = cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        if num_items_in_batch is None:
            num_items_in_batch = torch.tensor(len(labels))
        loss = loss / num_items_in_batch.clamp(min=1).to(loss.device)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # Gradients are averaged over the processes.
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return (None, [loss, hits] per sample: [B, 2], masked tokens per sample: [B]); no logits are kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits, labels = self.labelled_logits(model, inputs)
        labelled = inputs["labels"] != IGNORED_LABEL
        losses = cross_entropy(logits.float(), labels, reduction="none")
        scores = torch.stack([losses, (logits.argmax(-1) == labels).float()], dim=1)
        sums = scores.new_zeros(len(labelled), 2).index_add_(0, labelled.nonzero()[:, 0], scores)
        return None, sums, labelled.sum(1)


class Charts(TrainerCallback):
    """Adds to TensorBoard what the Trainer does not: hyperparameters, and the model's guesses at each evaluation."""

    def __init__(self, trainer, settings):
        self.trainer = trainer
        self.settings = settings

    @property
    def writer(self):
        """The Trainer's writer, where there is one now, in the main process."""
        callbacks = self.trainer.callback_handler.callbacks
        return next((item.tb_writer for item in callbacks if getattr(item, "tb_writer", None)), None)

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the hyperparameters."""
        self.trainer.start_clock()
        if self.writer and hparams_pb:
            self.writer.file_writer.add_summary(hparams_pb(self.settings))

    def on_evaluate(self, args, state, control, **kwargs):
        """Write the guesses."""
        if self.writer and not self.trainer.is_fsdp_enabled:
            self.writer.add_text("eval/guesses", guesses_table(guess(self.trainer)), state.global_step)
            self.writer.flush()
        self.trainer.start_clock()

    def on_save(self, args, state, control, **kwargs):
        """Go on with the time of the steps alone."""
        self.trainer.start_clock()


class StepBoundary(TrainerCallback):
    """Notes where a run begins, and ends it at the next step boundary, checkpoint saved, after a signal to stop."""

    def __init__(self, trainer, signals):
        self.trainer = trainer
        self.signals = signals

    def on_train_begin(self, args, state, control, **kwargs):
        """Note the first step, which is not 0 after a resume."""
        self.trainer.first_step = self.trainer.reported_step = state.global_step
        self.trainer.reported_loss = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop if a signal came, to any of the processes."""
        if args.world_size > 1:
            received = torch.tensor(self.signals.received or 0, device=args.device)
            self.signals.received = int(self.trainer.accelerator.gather(received).max())
        if self.signals.received:
            control.should_save = control.should_training_stop = True
        # The last steps are reported too, as in the Flax script.
        control.should_log |= args.logging_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps
        return control


def masked_lm_metrics(prediction):
    """Return {"loss", "accuracy", "perplexity"}: means over all masked tokens, for the sums of `prediction_step`."""
    loss, hits = prediction.predictions.sum(axis=0, dtype=np.float64)
    return mean_metrics(loss, hits, prediction.label_ids.sum())


def samples_of_step(dataset, args, seed, step):
    """Return the indices of the samples of an optimizer step, which counts from 0: int64 [S]."""
    size = args.step_samples
    if isinstance(dataset, StreamedDataset):
        return np.arange(step * size, (step + 1) * size)  # Places in the stream.
    steps_per_epoch = len(dataset) // size if args.dataloader_drop_last else math.ceil(len(dataset) / size)
    epoch, position = divmod(step, steps_per_epoch)
    return epoch_order(dataset, args, seed, epoch)[position * size : (position + 1) * size]


def not_finite_message(reason, step, learning_rate, samples):
    """Return the error line for a step whose numbers are not finite."""
    listed = ", ".join(map(str, samples[:MAX_LISTED])) + (", ..." if len(samples) > MAX_LISTED else "")
    return (
        f"{reason} at step {step} (learning rate {learning_rate:.3g}, training samples {listed}): lower "
        "--learning_rate, or look at these samples; the checkpoints are of earlier steps"
    )


def mean_metrics(loss, hits, count):
    """Return {"loss", "accuracy", "perplexity"} for sums over `count` masked tokens; perplexity `inf` on overflow."""
    mean = float(loss) / max(int(count), 1)
    try:
        perplexity = math.exp(mean)
    except OverflowError:
        perplexity = math.inf
    return {"loss": mean, "accuracy": float(hits) / max(int(count), 1), "perplexity": perplexity}


# ---------------------------------------------------------------------------------------------------------------------
# 8. Steps
# ---------------------------------------------------------------------------------------------------------------------
def find_selection(model, dataset, collator):
    """Return where hidden states can be left out, "layer" or "encoder", or None if the head needs all positions.

    Tried on two samples: the logits must stay the same. Raises what the model does with all positions.
    """
    batch = collator([dataset[i % len(dataset)] for i in range(2)])
    length = batch["input_ids"].shape[1]
    # More labels than a row has tokens: some models cut to its length what they go on with.
    batch["labels"] = batch["input_ids"].where(torch.arange(length) % 3 > 0, IGNORED_LABEL)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    was_training = model.training
    model.eval()
    found = None
    with torch.no_grad():
        model(**model_inputs(model, batch))
    # Some fill up rows to whole blocks of attention, which an odd length needs.
    for selection, cut in {"encoder": length, "layer": length - 1 + length % 2}.items():
        cut_batch = {name: value[:, :cut] for name, value in batch.items()}
        positions = (cut_batch["labels"] != IGNORED_LABEL).nonzero(as_tuple=True)
        inputs = model_inputs(model, cut_batch)
        with contextlib.suppress(Exception), torch.no_grad():  # Architectures fail in many ways.
            dense = model(**inputs).logits[positions]
            with labelled_positions_only(model, positions, selection):
                sparse = model(**inputs).logits[0]
            if (sparse - dense).abs().max() <= 1e-3 * dense.abs().max():
                found = selection
    model.train(was_training)
    if found is None:
        logger.warning(f"{type(model).__name__} needs all positions in its head: training with the dense head.")
    return found


def batch_padding(data_args, training_args, max_seq_length):
    """Return {split: the arguments of `padding_share`} for the batches that the `Trainer` collates."""
    shortest = max_seq_length if data_args.pad_to_max_length else 1
    rule = {"shortest": shortest, "multiple": 8 if training_args.fp16 else 1, "longest": sys.maxsize}
    window = training_args.step_samples if training_args.group_by_length else 1
    return {
        "train": {"rows": training_args.train_batch_size, "window": window, **rule},
        "validation": {"rows": training_args.eval_batch_size, "window": 0, **rule},
    }


def build_trainer(model_args, data_args, training_args, model, tokenizer, tokenized, max_seq_length):
    """Return the `Trainer` of a run."""
    collator = MaskedLMCollator(
        tokenizer,
        mlm_probability=data_args.mlm_probability,
        eval_mlm_probability=data_args.eval_mlm_probability,
        mask_replace_prob=data_args.mask_replace_prob,
        random_replace_prob=data_args.random_replace_prob,
        pad_to_multiple_of=8 if training_args.fp16 else None,
        pad_to_length=max_seq_length if data_args.pad_to_max_length else 0,
        seed=training_args.seed,
    )
    sample = next(dataset for dataset in tokenized.values() if len(dataset))
    with user_errors(f"{model_args.model_flag} fails at the first samples"):
        selection = None if model_args.dense_head else find_selection(model, sample, collator)
    trainer = MaskedLMTrainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=tokenized.get("train"),
        eval_dataset=tokenized.get("validation"),
        processing_class=tokenizer,
        selection=selection,
    )
    trainer.add_callback(Charts(trainer, hyperparameters(model_args, data_args, training_args)))
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# 9. Run
# ---------------------------------------------------------------------------------------------------------------------
def write_json(path, content):
    """Write a JSON file that is either there as a whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
    os.replace(f"{path}.tmp", path)


def write_results(folder, split, metrics):
    """Write `{split}_results.json` and add the metrics to `all_results.json`."""
    write_json(os.path.join(folder, f"{split}_results.json"), metrics)
    write_json(os.path.join(folder, "all_results.json"), previous_results(folder, "all") | metrics)


def mean_logged_loss(log_history):
    """Return the mean training loss of the steps that a log history reports on."""
    logged = [(0, 0.0)] + [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    steps = np.diff([step for step, _ in logged])
    return float(np.average([loss for _, loss in logged[1:]], weights=steps)) if len(steps) else 0.0


def check_steps(checkpoint, num_steps):
    """Raise `UserError` when a checkpoint is beyond the steps asked for."""
    if checkpoint:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            step = json.load(file)["global_step"]
        if step > num_steps:
            raise UserError(
                f"{checkpoint} is beyond the {num_steps} steps asked for: raise --max_steps or --num_train_epochs, "
                "or name another --output_dir"
            )


def previous_results(folder, split):
    """Return the results that a split has already, {} where there are none."""
    path = os.path.join(folder, f"{split}_results.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def list_checkpoints(folder):
    """Return the (step, path) pairs of the checkpoint folders, oldest first."""
    names = [CHECKPOINT.fullmatch(name) for name in os.listdir(folder)]
    return sorted((int(name[1]), os.path.join(folder, name[0])) for name in names if name)


def checksums(folder):
    """Return {file name: SHA-256} of the files of a folder."""
    sums = {}
    for name in sorted(os.listdir(folder)):
        if name != "checksums.json" and os.path.isfile(os.path.join(folder, name)):
            with open(os.path.join(folder, name), "rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def checkpoint_damage(folder):
    """Return what is wrong with a checkpoint folder, or None; without checksums only that its state can be read."""
    try:
        with open(os.path.join(folder, "trainer_state.json"), encoding="utf-8") as file:
            json.load(file)
        if os.path.exists(os.path.join(folder, FOREIGN_FILE)):
            return "written by the other script, which alone can resume it"
        path = os.path.join(folder, "checksums.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                expected = json.load(file)
            found = checksums(folder)
            wrong = [name for name in expected if found.get(name) != expected[name]]
            return f"{', '.join(wrong)} damaged or missing" if wrong else None
    except (OSError, ValueError) as error:
        return f"not a whole checkpoint ({error})"
    return None


def find_checkpoint(folder):
    """Return the newest whole checkpoint of a folder, or None where there is no checkpoint at all.

    Warns of damaged ones on the way; raises `UserError` when all are.
    """
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        logger.warning(f"{os.path.join(folder, UNFINISHED)}: a checkpoint that was never finished is ignored.")
    checkpoints = list_checkpoints(folder)
    for _, path in reversed(checkpoints):
        damage = checkpoint_damage(path)
        if damage is None:
            return path
        logger.warning(f"{path} is skipped: {damage}.")
    if checkpoints:
        raise UserError(f"--output_dir {folder}: every checkpoint is damaged; start anew with --overwrite_output_dir")
    return None


def publish_checkpoint(staged, folder, limit=None, protected=None):
    """Move a finished checkpoint folder into `folder`, then delete the oldest ones beyond `limit`."""
    write_json(os.path.join(staged, "checksums.json"), checksums(staged))
    target = os.path.join(folder, os.path.basename(staged))
    shutil.rmtree(target, ignore_errors=True)  # A damaged one that was skipped.
    os.replace(staged, target)
    newest = int(CHECKPOINT.fullmatch(os.path.basename(target))[1])
    older = [path for step, path in list_checkpoints(folder) if step < newest and path != protected]
    logger.info(f"Saved {target}.")
    for path in older[: max(0, len(older) + 1 - limit)] if limit else []:
        shutil.rmtree(path, ignore_errors=True)


def publish_files(staged, folder):
    """Move the files of a finished folder into `folder`, one by one."""
    for name in os.listdir(staged):
        os.replace(os.path.join(staged, name), os.path.join(folder, name))
    os.rmdir(staged)
    logger.info(f"Saved the model in {folder}.")


@contextlib.contextmanager
def staging(folder):
    """Within, an empty folder to write in beside the results; it is gone after that, whatever happens.

    Raises `UserError` when the disk is full: what was there before is still there.
    """
    path = os.path.join(folder, UNFINISHED)
    shutil.rmtree(path, ignore_errors=True)
    try:
        os.makedirs(path)
        yield path
    except Exception as error:
        full = os.path.isdir(folder) and shutil.disk_usage(folder).free < DISK_FULL
        if full or getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(
                f"--output_dir {folder}: no space left on the disk; earlier checkpoints are whole: free some space "
                "and run again to resume"
            ) from error
        raise
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(training_args):
    """Within, no other run writes to the output folder; one that is made here and stays empty goes again.

    The lock is the system's and on the folder itself: nothing is written for it, and it ends with the process, however
    that ends. Raises `UserError` when another run holds it, or the folder cannot be made or written to.
    """
    if not training_args.writes_results:
        yield
        return
    folder, path, made = training_args.output_dir, os.path.abspath(training_args.output_dir), []
    while not os.path.lexists(path):
        made.append(path)
        path = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output_dir {folder} cannot be made ({reason}); name another folder") from error
    try:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--output_dir {folder} is not writable; name another folder")
        lock_folder(folder, descriptor)
        yield
    finally:
        os.close(descriptor)
        for path in made:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # Fails where there is something in it.


def lock_folder(folder, descriptor):
    """Lock an open folder until it is closed, or raise `UserError`; warns where its file system has no locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output_dir {folder}: another run is writing there; wait for it, or name another") from None
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error.strerror}): start no second run that writes there.")


class StopSignals:
    """Within, SIGTERM and SIGINT are noted in `received` instead of ending the process; a second one ends it."""

    def __enter__(self):
        self.received = None
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        """Handle a signal."""
        self.received = number
        signal.signal(number, self.previous[number])

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def log_start(training_args, checkpoint):
    """Log whether training starts anew or goes on, and from where."""
    if checkpoint is None:
        logger.info(f"Starting anew in {training_args.output_dir}.")
    else:
        logger.info(f"Resuming from {checkpoint}; --overwrite_output_dir or another --output_dir starts anew.")


def setup_logging(training_args):
    """Send this script's and the Trainer's messages to stdout, from the main process only."""
    level = logging.INFO if training_args.should_log else logging.ERROR
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[logging.StreamHandler(sys.stdout)]
    )
    logger.setLevel(level)
    transformers.utils.logging.get_logger("transformers.trainer").setLevel(level)
    if not training_args.should_log:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # What goes wrong there is raised too.


def check_samples(raw_datasets, tokenized, tokenizer, data_args, training_args):
    """Raise `UserError` when a split that is asked for holds nothing to learn from, or not enough for one step."""
    for split, flag in (("train", "do_train"), ("validation", "do_eval")):
        if not getattr(training_args, flag):
            continue
        if split not in tokenized:
            source = f"--dataset_name {data_args.dataset_name}" if data_args.dataset_name else "--train_file"
            raise UserError(
                f"--{flag}: no {split} data: {source} has none, or --validation_split_percentage "
                f"{data_args.validation_split_percentage} leaves none; change it, or give --{split}_file"
            )
        dataset = tokenized[split]
        if isinstance(dataset, StreamedDataset):
            dataset = dataset.first_block
        if len(dataset) == 0:
            raise UserError(no_samples_message(split, raw_datasets[split], tokenizer, data_args))
        if all(np.isin(values, tokenizer.all_special_ids).all() for values, _ in dataset.columns["input_ids"]):
            raise UserError(
                f"{data_source(split, data_args)}: no token of the {split} data can be masked, for the tokenizer knows "
                f"none of its words ({tokenizer.unk_token}); name one for this text in --tokenizer_name"
            )
    samples, step_samples = len(tokenized.get("train", ())), training_args.step_samples
    if training_args.do_train and training_args.dataloader_drop_last and samples < step_samples:
        raise UserError(
            f"the train split holds {samples} samples, fewer than the {step_samples} of one step: lower "
            "--train_batch_size, or give --dataloader_drop_last false"
        )


def no_samples_message(split, raw, tokenizer, data_args):
    """Return the error line for a split without a sample: why that is, and what to do about it."""
    source = data_source(split, data_args)
    tables, column = raw.with_format("arrow").iter(1000), find_text_column(raw, data_args.text_column_name)
    texts = [text for table in tables for text in text_array(table, column).to_pylist() if text and not text.isspace()]
    if texts:
        tokens = sum(map(len, tokenizer(texts, verbose=False)["input_ids"]))
        return (
            f"{source}: the {split} data is too short: {len(texts)} texts with {tokens} tokens make no row of "
            f"--max_seq_length {data_args.max_seq_length or '(its default)'}; lower it, or give more text or "
            "--line_by_line true"
        )
    return f"{source}: the {split} data holds no text, only blank lines; give more"


def data_summary(tokenized, tokenizer, padding):
    """Return the lines that describe the tokenized splits; `padding` is {split: `batch_padding` of its batches}."""
    lines = {}
    for split, dataset in tokenized.items():
        known, of_all = dataset, ""
        if isinstance(dataset, StreamedDataset):
            known, of_all = dataset.first_block, " (the first block of the stream)"
        samples, tokens, texts = len(known), known.num_tokens, max(1, known.num_texts)
        unknown = known.count(tokenizer.unk_token_id) / max(1, tokens)
        lines |= {
            f"{split} data": f"{known.num_texts:,} texts, {samples:,} samples, {tokens:,} tokens{of_all}",
            f"{split} texts truncated": f"{known.num_truncated / texts:.2%}",
            f"{split} padding": f"{padding_share(known.lengths, **padding[split]):.2%} of the batches",
            f"{split} unknown tokens": f"{unknown:.2%}",
        }
    return lines


def padding_share(lengths, rows, window, shortest, multiple, longest):
    """Return the share of positions that are padding, for samples of `lengths: int [N]` in batches of `rows`.

    A batch is padded to its longest sample, to at least `shortest`, a multiple of `multiple`, at most `longest`. With
    a `window`, the order is drawn at random, 1 sorting nothing, more sorting by length as `group_by_length` does for
    steps of so many samples; without one, the samples keep their order. Many samples are probed at random.
    """
    if not len(lengths):
        return 0.0
    if window:
        generator = np.random.default_rng(0)
        many = len(lengths) > PROBED_SAMPLES
        order = generator.integers(len(lengths), size=PROBED_SAMPLES) if many else generator.permutation(len(lengths))
        lengths = lengths[order if window == 1 else group_by_length(order, lengths, window)]
    starts = np.arange(0, len(lengths), rows)
    padded = np.maximum(np.maximum.reduceat(lengths, starts), shortest).astype(np.int64)
    padded = np.minimum(-(-padded // multiple) * multiple, longest)
    return 1 - int(lengths.sum(dtype=np.int64)) / int((padded * np.diff([*starts, len(lengths)])).sum())


def run_summary(num_parameters, dataset, collator, batch, num_steps, peak_learning_rate):
    """Return the lines that describe the training ahead; `batch` is (samples, accumulation steps, devices)."""
    samples, accumulation, devices = batch
    step_samples = samples * accumulation * devices
    probed = [dataset[i]["input_ids"] for i in range(0, len(dataset), 1 + len(dataset) // 1000)]
    maskable = np.mean([np.count_nonzero(~collator.is_special[row]) for row in probed])
    return {
        "parameters": f"{num_parameters:,}",
        "optimizer steps": f"{num_steps:,}",
        "batch": f"{step_samples:,} samples a step: {samples} x {accumulation} accumulated x {devices} devices",
        "tokens a step": f"{dataset.num_tokens / len(dataset) * step_samples:,.0f}",
        "masked tokens a step": f"{maskable * collator.mlm_probability * step_samples:,.0f} expected",
        "peak learning rate": f"{peak_learning_rate:.3g}",
    }


def log_summary(title, lines):
    """Log a titled block of `name: value` lines and return them."""
    logger.info(f"***** {title} *****")
    for name, value in lines.items():
        logger.info(f"  {name:<26} {value}")
    return lines


def masked_sentences(dataset, tokenizer, collator, count=5, length=32):
    """Return {"input_ids", "attention_mask": int32 [S, length], "positions", "token_ids": int [S]}.

    Samples from all over the data set, cut to `length`, one token of each masked: drawn as for evaluation.
    """
    count = min(count, len(dataset))
    rows = [np.array(dataset[i * len(dataset) // count]["input_ids"][:length]) for i in range(count)]
    length = max(map(len, rows))
    sentences = {name: np.zeros((count, length), np.int32) for name in ("input_ids", "attention_mask")}
    sentences |= {name: np.zeros(count, np.int64) for name in ("positions", "token_ids")}
    for i, row in enumerate(rows):
        candidates = np.flatnonzero(~collator.is_special[row])
        if len(candidates) == 0:
            candidates = np.arange(len(row))
        position = sample_generator(collator.seed, EVAL_EPOCH, i).choice(candidates)
        sentences["positions"][i], sentences["token_ids"][i] = position, row[position]
        row[position] = tokenizer.mask_token_id
        sentences["input_ids"][i, : len(row)], sentences["attention_mask"][i, : len(row)] = row, 1
    return sentences


def best_guesses(tokenizer, sentences, logits):
    """Return (masked sentence, three best guesses, token of the text) of each, for `logits: [S, V]` at the masks."""
    rows = []
    for row, mask, position, token_id, scores in zip(*sentences.values(), logits):
        before, after = (
            tokenizer.decode(part, skip_special_tokens=True)
            for part in (row[:position], row[position + 1 : mask.sum()])
        )
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        guesses = ", ".join(f"{tokenizer.decode([i])} {probabilities[i]:.0%}" for i in np.argsort(-scores)[:3])
        rows.append((f"{before} {tokenizer.mask_token} {after}", guesses, tokenizer.decode([token_id])))
    return rows


def log_guesses(rows):
    """Log `best_guesses`."""
    logger.info("***** Masked sentences and the model's best guesses *****")
    for sentence, guesses, token in rows:
        logger.info(f"  {sentence}")
        logger.info(f"      {guesses} (the text: {token})")


def guesses_table(rows):
    """Return `best_guesses` in Markdown."""
    return markdown_table(["masked sentence", "best guesses", "the text"], rows)


def markdown_table(head, rows):
    """Return a table in Markdown of a row of names and rows of texts, each text in one line."""
    rows = [head, ["---"] * len(head), *([" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def hyperparameters(*groups):
    """Return {name: value} of the settings that TensorBoard compares runs by, from the argument groups."""
    found = {"framework": LIBRARIES[0]}
    for name in HYPERPARAMETERS:
        value = next(getattr(group, name) for group in groups if hasattr(group, name))
        found[name] = value if isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))
    return found


def without_folder(value):
    """Return a setting as others may see it: of an absolute path the last part."""
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and os.path.isabs(value) else value


def given_settings(argv):
    """Return {name: value} of the arguments that are not at their defaults, without tokens, folders and addresses."""
    parser = build_parser()
    given, defaults = (vars(parser.parse_args(flags)) for flags in (expand_flags(argv), []))
    left_out = ("token", "coordinator_address", "num_processes", "process_id")
    settings = {name: value for name, value in given.items() if value != defaults[name] and not name.endswith(left_out)}
    return {
        name: [without_folder(item) for item in value] if isinstance(value, list) else without_folder(value)
        for name, value in settings.items()
    }


def card_metadata(name, model_args, data_args, metrics):
    """Return the `ModelCardData` of a model: what the hub shows and searches."""
    hub = {
        flag: getattr(group, flag) for flag, group in (("model_name_or_path", model_args), ("dataset_name", data_args))
    }
    hub = {flag: value if value and not os.path.exists(value) else None for flag, value in hub.items()}
    source = data_args.dataset_name or listed(data_args.validation_file or data_args.train_file)[0]
    results = [
        EvalResult("fill-mask", "text", without_folder(source), kind, metrics[key], dataset_split="validation")
        for kind, key in CARD_RESULTS.items()
        if math.isfinite(metrics.get(key, math.inf))  # The hub refuses others.
    ]
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["masked-language-modeling"],
        base_model=hub["model_name_or_path"],
        datasets=hub["dataset_name"] and [hub["dataset_name"]],
        eval_results=results or None,
    )


def model_card(settings, model_args, data_args, training_args, facts, metrics):
    """Return a model card: YAML metadata, then in Markdown the model, its data, results, arguments and versions."""
    name = repository_name(training_args).split("/")[-1]
    base = model_args.model_name_or_path
    start = f"fine-tuned from `{without_folder(base)}`" if base else "trained from scratch"
    results = {
        **{key: metrics[key] for key in CARD_RESULTS.values() if key in metrics},
        "train_loss": metrics["train_loss"],
    }
    rows = [(key, f"{value:.4g}") for key, value in results.items()]
    versions = [("python", sys.version.split()[0])] + [(name, importlib.metadata.version(name)) for name in LIBRARIES]
    sources = {"data set": data_args.dataset_name}
    for split in ("train", "validation"):
        files = None if data_args.dataset_name else getattr(data_args, f"{split}_file")
        sources[f"{split} file"] = ", ".join(map(without_folder, listed(files or [])))
    data = [(fact, value) for fact, value in {**sources, **facts}.items() if value]
    parts = [
        f"---\n{card_metadata(name, model_args, data_args, metrics).to_yaml()}\n---",
        f"# {name}",
        f"A masked language model, {start}: it fills in masked words.",
        "## Data",
        markdown_table(["", ""], data),
        "## Results",
        markdown_table(["metric", "value"], rows),
        "Loss, accuracy and perplexity are those of the masked tokens of the validation data.",
        "## Arguments",
        f"Those that were given; `{os.path.basename(__file__)}` takes them again as a JSON file.",
        f"```json\n{json.dumps(settings, indent=2)}\n```",
        "## Versions",
        markdown_table(["library", "version"], versions),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(folder, card):
    """Write `README.md`, unless there is one that is not as a run wrote it: that is kept, with a warning."""
    path = os.path.join(folder, "README.md")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            text, _, checksum = file.read().partition(CARD_MARK)
        if checksum != card_checksum(text):
            logger.warning(f"{path} is kept as it is: no run wrote it, or it was changed since.")
            return
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(card + CARD_MARK + card_checksum(card))
    os.replace(f"{path}.tmp", path)


def card_checksum(text):
    """Return what ends a card of a run: the text's checksum."""
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def repository_name(training_args):
    """Return the name of the hub repository, with or without its owner."""
    return training_args.hub_model_id or os.path.basename(os.path.abspath(training_args.output_dir))


def create_repository(training_args, fix):
    """Make the hub repository if there is none and return its full name; raises `UserError` if that fails."""
    name, api = repository_name(training_args), HfApi(token=training_args.hub_token)
    with user_errors(f"--push_to_hub: {name}", fix):
        return api.create_repo(name, private=training_args.hub_private_repo, exist_ok=True).repo_id


def publish_model(argv, model_args, data_args, training_args, facts, metrics):
    """Write the model card after a training and, with `--push_to_hub`, upload all that the run wrote but checkpoints.

    Raises `UserError` if the upload fails: all is saved in `output_dir` by then.
    """
    if not (training_args.do_train and training_args.writes_results):
        return
    folder, name = training_args.output_dir, repository_name(training_args)
    write_card(folder, model_card(given_settings(argv), model_args, data_args, training_args, facts, metrics))
    if training_args.push_to_hub:
        fix = f"the model is saved in {folder}: `hf upload {name} {folder} --exclude 'checkpoint-*'` uploads it later"
        name = create_repository(training_args, fix)
        with user_errors(f"--push_to_hub: {name}", fix):
            HfApi(token=training_args.hub_token).upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message="Masked language model, trained",
                ignore_patterns=list(NOT_PUSHED),
            )
        logger.info(f"Uploaded to {constants.ENDPOINT}/{name}.")


def train(trainer, checkpoint):
    """Train, save the model and the tokenizer, and return the training metrics.

    Exits with status 128 + signal, checkpoint saved, when SIGTERM or SIGINT stops the training.
    """
    args, dataset = trainer.args, trainer.train_dataset
    check_steps(checkpoint, num_training_steps(trainer))
    if checkpoint and not args.ignore_data_skip:
        resume_stream(dataset, checkpoint)
    if checkpoint is None and args.should_save and os.path.isdir(args.output_dir):
        for _, path in list_checkpoints(args.output_dir):
            shutil.rmtree(path)  # --overwrite_output_dir: what is left of another run must not be resumed later.
    with StopSignals() as signals:
        trainer.add_callback(StepBoundary(trainer, signals))
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if signals.received:
        # A signal in an evaluation after the last step came too late for the callback.
        if args.world_size == 1 and not os.path.isdir(f"{args.output_dir}/checkpoint-{trainer.state.global_step}"):
            trainer._save_checkpoint(trainer.model, trial=None)
        logger.info(
            f"Stopped by signal {signals.received}; the checkpoint of step {trainer.state.global_step} is saved."
        )
        raise SystemExit(128 + signals.received)
    save_model(trainer)
    metrics["total_flos"] = trainer.state.total_flos  # Without a progress bar, printing the metrics removes it.
    metrics["train_samples"] = len(dataset)
    metrics["train_tokens_per_second"] = round(metrics["train_samples_per_second"] * dataset.num_tokens / len(dataset))
    if trainer.first_step == trainer.state.global_step:
        metrics |= previous_results(args.output_dir, "train")  # There was nothing left to do.
    return metrics


def evaluate(trainer):
    """Evaluate on all validation samples and return the metrics."""
    metrics = trainer.evaluate()
    metrics.pop("eval_model_preparation_time", None)  # Only there without training before.
    if not trainer.args.do_train:
        metrics.pop("epoch", None)  # Transformers 5 calls it 0.
    dataset = trainer.eval_dataset
    metrics["perplexity"] = metrics.pop("eval_perplexity")
    metrics["eval_samples"] = len(dataset)
    metrics["eval_tokens_per_second"] = round(metrics["eval_samples_per_second"] * dataset.num_tokens / len(dataset))
    if trainer.is_world_process_zero() and not trainer.is_fsdp_enabled:
        log_guesses(guess(trainer))
    return metrics


def save_model(trainer):
    """Write model and tokenizer to the output folder, each file renamed into place when it is whole."""
    folder = trainer.args.output_dir
    with staging(folder) if trainer.args.should_save else contextlib.nullcontext():
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(os.path.join(folder, UNFINISHED, "model"), _internal_call=True)  # Nothing is uploaded yet.
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            publish_files(os.path.join(folder, UNFINISHED, "model"), folder)
    trainer.accelerator.wait_for_everyone()


def save_results(trainer, split, metrics):
    """Log the metrics of a split and write `{split}_results.json`, `all_results.json` and `trainer_state.json`."""
    if not trainer.is_world_process_zero():
        return
    trainer.log_metrics(split, metrics)
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    write_results(trainer.args.output_dir, split, metrics)
    write_json(os.path.join(trainer.args.output_dir, "trainer_state.json"), asdict(trainer.state))


def guess(trainer):
    """Return the model's `best_guesses` for a few validation sentences with one mask each."""
    sentences = masked_sentences(trainer.eval_dataset, trainer.processing_class, trainer.data_collator)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    inputs = {name: torch.from_numpy(sentences[name]).long() for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        inputs = model_inputs(model, {name: value.to(model.device) for name, value in inputs.items()})
        logits = model(**inputs).logits
    picked = logits[torch.arange(len(logits)), torch.from_numpy(sentences["positions"])]
    return best_guesses(trainer.processing_class, sentences, picked.float().cpu().numpy())


def leave_process_group():
    """End the connections to the other processes of a run; left to the end of the process, they may make it fail."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def num_training_steps(trainer):
    """Return the optimizer steps of the whole run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def summarize(trainer):
    """Return the lines that describe the training ahead."""
    args = trainer.args
    batch = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
    num_steps = num_training_steps(trainer)
    parameters = trainer.model.num_parameters()
    return run_summary(parameters, trainer.train_dataset, trainer.data_collator, batch, num_steps, args.learning_rate)


# ---------------------------------------------------------------------------------------------------------------------
# 10. Main
# ---------------------------------------------------------------------------------------------------------------------
@exit_on_user_error
def main(argv=None):
    """Run what the arguments ask for and return all metrics."""
    model_args, data_args, training_args = parse_args(argv)
    setup_logging(training_args)
    check_inputs(model_args, data_args)
    with locked(training_args):
        checkpoint = prepare_output_dir(training_args)
        config = load_config(model_args)
        tokenizer = load_tokenizer(model_args)
        max_seq_length = choose_max_seq_length(data_args, tokenizer, config)
        with training_args.main_process_first(desc="tokenizing"):
            raw_datasets = needed_splits(load_raw_datasets(model_args, data_args), training_args)
            tokenized = tokenize_datasets(raw_datasets, tokenizer, data_args, max_seq_length, training_args)
        padding = batch_padding(data_args, training_args, max_seq_length)
        facts = log_summary("Data", data_summary(tokenized, tokenizer, padding))
        check_samples(raw_datasets, tokenized, tokenizer, data_args, training_args)
        if not (training_args.do_train or training_args.do_eval):
            logger.info("Tokenized and cached. Nothing was trained or evaluated: see --do_train and --do_eval.")
            return {}

        set_seed(training_args.seed)
        model = load_model(model_args, config, tokenizer)
        trainer = build_trainer(model_args, data_args, training_args, model, tokenizer, tokenized, max_seq_length)
        metrics = {}
        if training_args.do_train:
            log_start(training_args, checkpoint)
            log_summary("Training", summarize(trainer))
            train_metrics = train(trainer, checkpoint)
            save_results(trainer, "train", train_metrics)
            metrics |= train_metrics
        if training_args.do_eval:
            eval_metrics = evaluate(trainer)
            save_results(trainer, "eval", eval_metrics)
            metrics |= eval_metrics
        publish_model(argv, model_args, data_args, training_args, facts, metrics)
        atexit.register(leave_process_group)
        return metrics


def _mp_fn(index):
    """Entry point of TPU launchers such as `xla_spawn`: one call per process, arguments from `sys.argv`."""
    return main()


if __name__ == "__main__":
    main()
