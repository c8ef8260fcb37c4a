#!/usr/bin/env python
"""Train a masked language model on your own text with JAX and Flax.

Fine-tune a BERT-like model, or train one from scratch:

    python run_mlm_flax.py --model_name_or_path bert-base-cased --train_file my.txt --do_train --do_eval --output_dir o
    python run_mlm_flax.py configs/quickstart.json --learning_rate 1e-3

`run_mlm.py` is the same program on PyTorch: the same flags, masks, batches and result files. PyTorch is not used.

What to change where: the loss in `cross_entropy`, the optimizer in `create_optimizer`, the masking rule in
`mask_tokens`, how text becomes rows of token ids in `TextEncoder`. Sections 3 to 5 hold no JAX but for the defaults
of `TrainingArguments`, and are byte-identical in both scripts.

Shapes: B batch (samples), L length (tokens of a sample), V vocabulary, K masked positions of a batch, H hidden size,
A accumulated micro-batches, D devices.
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
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import types
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, Optional

if __name__ == "__main__":
    os.environ.setdefault("USE_TORCH", "0")  # As a program: start without importing a PyTorch that is not used.

try:
    import fcntl
except ImportError:  # There is none on Windows.
    fcntl = None

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.compute as pc
from flax import jax_utils, serialization
from flax import linen as nn
from flax.training import train_state
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import EvalResult, HfApi, ModelCardData, constants, get_token
from huggingface_hub import utils as hub_utils
from jax import lax
from jax.experimental import multihost_utils
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    FLAX_MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    FlaxAutoModelForMaskedLM,
    FlaxBertForMaskedLM,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.trainer_utils import speed_metrics
from transformers.utils import check_min_version
from transformers.utils import logging as transformers_logging
from transformers.utils.versions import require_version

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError:
    EventFileWriter = None

# The oldest releases that the tests run on.
check_min_version("4.57.6")
require_version("datasets>=5.0.1", "To fix: pip install -r requirements.txt")

logger = logging.getLogger("run_mlm")

MODEL_TYPES = tuple(sorted(config.model_type for config in FLAX_MODEL_FOR_MASKED_LM_MAPPING))
LIBRARIES = ("jax", "flax", "optax", "transformers", "datasets", "tokenizers", "numpy")
LINE_BY_LINE_DEFAULT = True  # The documented default of this script: each text is a sample.
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")
MAX_SHAPES = 6  # Lengths that line-by-line batches are padded to: each one is a compilation.
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
FOREIGN_FILE = "optimizer.pt"  # In a checkpoint of the other script.
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
MAX_LISTED = 100  # Sample indices in an error message.
ORDER_KEYS = 2**62  # No index of a sample: the order of a block draws other numbers than masks do.
STREAM_STATE = "stream_state.json"  # In a checkpoint: where the stream was.
STREAM_BATCH = 256  # Texts of a stream tokenized together: enough for all cores, few enough for long texts.
STREAMED_VALIDATION = 1000  # Texts taken from a stream without a validation split.
PROBED_SAMPLES = 200_000  # Enough to expect the padding of more.
CONNECT_SECONDS = 300  # How long a process waits for the others at the start,
DISCONNECT_SECONDS = 60  # and for those that do not end with it.
MESSAGE_BYTES = 2000  # Of an error that one process tells the others.
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
class TrainingArguments:
    """Arguments of the training loop, named as in the PyTorch script where it has them."""

    output_dir: Optional[str] = HfArg(default=None, help="Where the model, results and logs are written.")
    overwrite_output_dir: bool = HfArg(default=False, help="Write over what output_dir holds.")
    do_train: bool = HfArg(default=False, help="Train.")
    do_eval: bool = HfArg(default=False, help="Evaluate.")
    train_batch_size: int = HfArg(
        default=8, help="Training batch of one device.", aliases=["--per_device_train_batch_size"]
    )
    eval_batch_size: int = HfArg(
        default=8, help="Evaluation batch of one device.", aliases=["--per_device_eval_batch_size"]
    )
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches whose gradients make one optimizer step.")
    learning_rate: float = HfArg(default=5e-5, help="Base learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Weight decay of AdamW (not of biases and layer norms).")
    adam_beta1: float = HfArg(default=0.9, help="Decay of Adam's first moment.")
    adam_beta2: float = HfArg(default=0.999, help="Decay of Adam's second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="Epsilon of Adam.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip gradients to this norm; 0 does not clip.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the training data.")
    max_steps: int = HfArg(default=-1, help="Optimizer steps, instead of num_train_epochs, if above 0.")
    lr_scheduler_type: str = HfArg(
        default="constant * linear_warmup * rsqrt_decay",
        help=f"Schedule: one of {', '.join(SCHEDULES)}, or factors of create_learning_rate_scheduler joined by *.",
    )
    warmup_steps: int = HfArg(default=0, help="Steps of linear warmup.")
    label_smoothing_factor: float = HfArg(default=0.0, help="Label smoothing of the training loss.")
    group_by_length: bool = HfArg(default=False, help="Make batches of samples of like lengths.")
    dataloader_drop_last: bool = HfArg(default=True, help="Leave out the last step of an epoch if it is not full.")
    eval_strategy: str = HfArg(default="epoch", help="Evaluate while training: no, every epoch, or every eval_steps.")
    eval_steps: int = HfArg(default=500, help="Steps between evaluations if eval_strategy is steps.")
    logging_steps: int = HfArg(default=500, help="Steps between reports of the training loss.")
    save_strategy: str = HfArg(default="steps", help="Checkpoints: no, every epoch, or every save_steps.")
    save_steps: int = HfArg(default=500, help="Steps between checkpoints if save_strategy is steps.")
    save_total_limit: Optional[int] = HfArg(default=None, help="Keep so many checkpoints, the newest.")
    resume_from_checkpoint: Optional[str] = HfArg(
        default=None, help="Checkpoint folder to resume from (default: the newest whole one in output_dir)."
    )
    seed: int = HfArg(default=42, help="Seed of new weights, dropout, order and masks.")
    bf16: bool = HfArg(default=False, help="Compute in bfloat16; the weights stay float32.")
    push_to_hub: bool = HfArg(default=False, help="Upload model, model card and results to the hub after training.")
    hub_model_id: Optional[str] = HfArg(
        default=None, help="Hub repository, name or owner/name (default: named as output_dir)."
    )
    hub_token: Optional[str] = HfArg(
        default=None, repr=False, help="Hub token for the upload (default: HF_TOKEN or the stored one)."
    )
    hub_private_repo: Optional[bool] = HfArg(
        default=None, help="Make a new repository private (default: as its owner's settings say)."
    )
    coordinator_address: Optional[str] = HfArg(
        default=None, help="Of a run in several processes: host:port, where process 0 is the host."
    )
    num_processes: Optional[int] = HfArg(
        default=None, help="How many processes the run has; 1 does not look for a cluster in the environment."
    )
    process_id: Optional[int] = HfArg(default=None, help="Which one this is, from 0.")
    debug: bool = HfArg(default=False, help="Show the traceback of an error.")

    def __post_init__(self):
        check_ranges(self)
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self, name) not in ("no", "steps", "epoch"):
                raise ValueError(f"--{name} {getattr(self, name)} must be no, steps or epoch")
        if self.lr_scheduler_type not in SCHEDULES:
            create_learning_rate_scheduler(self.lr_scheduler_type)  # Raises a ValueError that names the wrong factor.
        self.check_processes()

    def check_processes(self):
        """Raise `ValueError` where the flags of several processes do not go together."""
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"--num_processes {self.num_processes} must be above 0")
        given = self.coordinator_address, self.num_processes, self.process_id
        if given == (None, 1, None) or given == (None, None, None):
            return
        if None in given:
            raise ValueError("--coordinator_address, --num_processes and --process_id go together; give all of them")
        if not re.fullmatch(r"\S+:\d+", self.coordinator_address):
            raise ValueError(f"--coordinator_address {self.coordinator_address} must be host:port")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"--process_id {self.process_id} must be from 0 to {self.num_processes - 1}")

    @property
    def should_log(self):
        """Whether this is the process that writes logs and files."""
        # Asking JAX starts its threads, after which tokenizing in several processes is not safe.
        return not jax.distributed.is_initialized() or jax.process_index() == 0

    @property
    def dtype(self):
        """What computations are made in."""
        return jnp.bfloat16 if self.bf16 else jnp.float32

    @property
    def step_samples(self):
        """Samples of one optimizer step on all devices."""
        return self.train_batch_size * self.gradient_accumulation_steps * jax.device_count()

    @property
    def writes_results(self):
        """Whether this process writes to `output_dir`."""
        return (self.do_train or self.do_eval) and self.should_log


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
    """Return the names of the arguments that `run_mlm.py` alone reads."""
    return """
    accelerator_config adafactor auto_find_batch_size average_tokens_across_devices batch_eval_metrics
    bf16_full_eval data_seed dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_timeout deepspeed disable_tqdm do_predict eval_accumulation_steps eval_delay eval_do_concat_batches
    eval_on_start eval_use_gather_object fp16 fp16_backend fp16_full_eval fp16_opt_level fsdp fsdp_config
    fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap full_determinism gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better half_precision_backend hub_always_push hub_revision hub_strategy
    ignore_data_skip include_for_metrics include_inputs_for_metrics include_num_input_tokens_seen
    include_tokens_per_second jit_mode_eval label_names length_column_name liger_kernel_config
    load_best_model_at_end local_rank log_level log_level_replica log_on_each_node logging_dir logging_first_step
    logging_nan_inf_filter logging_strategy lr_scheduler_kwargs metric_for_best_model mp_parameters
    neftune_noise_alpha no_average_tokens_across_devices no_cuda no_dataloader_pin_memory no_eval_do_concat_batches
    no_log_on_each_node no_logging_nan_inf_filter no_remove_unused_columns no_save_safetensors
    no_skip_memory_metrics optim optim_args optim_target_modules parallelism_config past_index
    per_gpu_eval_batch_size per_gpu_train_batch_size prediction_loss_only project push_to_hub_model_id
    push_to_hub_organization push_to_hub_token ray_scope remove_unused_columns report_to
    restore_callback_states_from_checkpoint run_name save_on_each_node save_only_model save_safetensors
    skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    torchdynamo tpu_metrics_debug tpu_num_cores trackio_space_id use_cpu use_legacy_prediction_loop use_liger_kernel
    use_mps_device warmup_ratio
    """.split()


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
class FlaxDataCollatorForLanguageModeling(MaskingCollator):
    """Pads and masks samples in NumPy; raises `ValueError` for a tokenizer without a mask token.

    With `mlm=False` nothing is masked and the labels are the inputs, padding at -100.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm: bool = True
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    seed: int = 0
    eval_mlm_probability: Optional[float] = None

    def __post_init__(self):
        if self.mlm and self.tokenizer.mask_token is None:
            raise ValueError(
                "the tokenizer has no mask token, which mlm=True needs; pass mlm=False or another tokenizer"
            )

    def __call__(self, examples, pad_to_multiple_of=None, pad_to_length=0):
        """Return {"input_ids", "attention_mask", "labels"} as int32 arrays [B, L]."""
        return self.numpy_batch(examples, pad_to_multiple_of, pad_to_length)

    def mask_tokens(self, inputs, special_tokens_mask=None):
        """Return (inputs, labels), both int32 [B, L], for `inputs: int [B, L]` and its mask of the same shape."""
        if special_tokens_mask is None:
            special_tokens_mask = self.is_special[inputs]
        samples = [{"special_tokens_mask": mask} for mask in special_tokens_mask]
        pair = self.mask_samples(samples, np.array(inputs, np.int32).ravel(), [inputs.shape[1]] * len(inputs))
        return tuple(array.reshape(inputs.shape) for array in pair)


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


def load_model(model_args, config, tokenizer, dtype=jnp.float32, seed=0):
    """Return the masked-LM model, pretrained or with random weights, its vocabulary that of the tokenizer.

    PyTorch weights (safetensors) are converted. New weights draw from `seed`; computations are in `dtype`.
    """
    name = model_args.model_name_or_path
    model_class = FlaxBertForMaskedLM if config.model_type == "bert" else FlaxAutoModelForMaskedLM
    if name and ".ckpt" in name:
        raise UserError(f"--model_name_or_path {name} is a TensorFlow checkpoint, which run_mlm.py can read")
    if name:
        options = {"config": config, "dtype": dtype, "seed": seed, "revision": model_args.model_revision}
        with user_errors(f"--model_name_or_path {name}", WEIGHTS_FIX):
            model = model_class.from_pretrained(name, **options, **model_args.hub_options)
        with user_errors(f"--model_name_or_path {name} cannot take a tokenizer of {len(tokenizer)} tokens", RESIZE_FIX):
            return resize_vocabulary(model, len(tokenizer))
    fit_config(config, tokenizer)
    with user_errors(model_args.model_flag):
        if model_class is FlaxBertForMaskedLM:
            return FlaxBertForMaskedLM(config, dtype=dtype, seed=seed)
        return FlaxAutoModelForMaskedLM.from_config(config, dtype=dtype, seed=seed)


def resize_vocabulary(model, size):
    """Return the model with token embeddings and decoder for `size` tokens; new rows are the mean of the old ones."""
    old_size = model.config.vocab_size
    if size == old_size:
        return model
    logger.info(f"Resizing the token embeddings from {old_size} to {size}.")
    config = copy.deepcopy(model.config)
    config.vocab_size = size
    resized = type(model)(config, dtype=model.dtype)

    def fit(old, new):
        if old.shape == new.shape:
            return old
        axis = next(i for i in range(old.ndim) if old.shape[i] != new.shape[i])
        if new.shape != (*old.shape[:axis], size, *old.shape[axis + 1 :]):
            raise ValueError("its head has a vocabulary of its own")
        kept = lax.slice_in_dim(old, 0, min(size, old_size), axis=axis)
        mean = old.mean(axis, keepdims=True) if old.ndim > 1 else jnp.zeros(1, old.dtype)
        return jnp.concatenate([kept, jnp.repeat(mean, size - kept.shape[axis], axis)], axis)

    resized.params = jax.tree.map(fit, model.params, resized.params)
    return resized


def pytorch_names(params):
    """Return {path of a parameter: its name in the PyTorch model}."""
    leaves = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
    return {path: ".".join([*path[:-1], leaves.get(path[-1], path[-1])]) for path in flatten_dict(params)}


def pytorch_state_dict(params):
    """Return the parameters under the names and in the layout of the PyTorch model: {name: array}."""
    params = jax.device_get(params)
    values = flatten_dict(params)
    return {
        name: np.ascontiguousarray(values[path].T if path[-1] == "kernel" else values[path])
        for path, name in pytorch_names(params).items()
    }


def flax_params(state, template):
    """Return the parameters that `pytorch_state_dict` gave `state`, in the tree of `template`."""
    names = pytorch_names(template)
    leaves = {path: state[name].T if path[-1] == "kernel" else state[name] for path, name in names.items()}
    return unflatten_dict(leaves)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Optimisation and metrics
# ---------------------------------------------------------------------------------------------------------------------
def create_learning_rate_scheduler(
    factors="constant * linear_warmup * rsqrt_decay",
    base_learning_rate=0.5,
    warmup_steps=1000,
    decay_factor=0.5,
    steps_per_decay=20000,
    steps_per_cycle=100000,
):
    """Return step -> learning rate, the product of factors named in a string and joined by `*`.

    * constant: the base learning rate
    * linear_warmup: rises from 0 to 1 at `warmup_steps`
    * rsqrt_decay: 1 / sqrt(max(step, warmup_steps))
    * rsqrt_normalized_decay: the same, but 1 at `warmup_steps`
    * decay_every: `decay_factor` every `steps_per_decay` steps
    * cosine_decay: after the warmup, from 1 to 0 over `steps_per_cycle` steps, again and again

    No warmup counts as one step of it. Raises `ValueError` for a factor of another name (Flax, examples/lm1b).
    """
    warmup = max(1, warmup_steps)

    def cosine(step):
        progress = jnp.maximum(0.0, (step - warmup) / steps_per_cycle)
        return 0.5 * (1.0 + jnp.cos(jnp.pi * (progress % 1.0)))

    known = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": lambda step: jnp.minimum(1.0, step / warmup),
        "rsqrt_decay": lambda step: 1.0 / jnp.sqrt(jnp.maximum(step, warmup)),
        "rsqrt_normalized_decay": lambda step: jnp.sqrt(warmup / jnp.maximum(step, warmup)),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "cosine_decay": cosine,
    }
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in known:
            raise ValueError(f"the schedule {factors!r} names {name!r}; known factors: {', '.join(known)}")

    def schedule(step):
        return jnp.asarray(math.prod(known[name](step) for name in names), jnp.float32)

    return schedule


def create_schedule(training_args, num_steps):
    """Return step -> learning rate for `lr_scheduler_type`: factors, or the Trainer's schedule of that name."""
    rate, warmup = training_args.learning_rate, training_args.warmup_steps
    timescale = warmup or 10_000
    schedules = {
        "linear": optax.linear_schedule(rate, 0.0, max(1, num_steps - warmup)),
        "cosine": optax.cosine_decay_schedule(rate, max(1, num_steps - warmup)),
        "constant": optax.constant_schedule(rate),
        "constant_with_warmup": optax.constant_schedule(rate),
        "inverse_sqrt": lambda step: rate * jnp.sqrt(timescale / (jnp.maximum(step, 0) + timescale)),
    }
    name = training_args.lr_scheduler_type
    if name not in schedules:
        return create_learning_rate_scheduler(name, rate, warmup)
    if name == "constant" or not warmup:
        return schedules[name]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedules[name]], [warmup])


def create_optimizer(training_args, schedule):
    """Return AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; matrices decay, as in the Trainer."""
    adamw = optax.adamw(
        schedule,
        b1=training_args.adam_beta1,
        b2=training_args.adam_beta2,
        eps=training_args.adam_epsilon,
        weight_decay=training_args.weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )
    if training_args.max_grad_norm > 0:
        return optax.chain(clip_by_global_norm(training_args.max_grad_norm), adamw)
    return adamw


def clip_by_global_norm(max_norm):
    """Return the transformation that scales all gradients to a norm of at most `max_norm`, as PyTorch computes it.

    One factor for all: XLA fuses it into AdamW, and writes the quotients of Optax's to memory (twice the time of both).
    """

    def update(gradients, params):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients)

    return optax.stateless(update)


def epoch_permutation(seed, epoch, num_samples):
    """Return the order of an epoch's samples: int64 [N]."""
    return np.asarray(
        jax.random.permutation(jax.random.fold_in(jax.random.PRNGKey(seed), epoch), num_samples), np.int64
    )


def epoch_order(dataset, args, seed, epoch):
    """Return an epoch's samples in the order of its steps: int64 [N], or less where a last step that is not full goes.

    Both choices are made by whole steps, so that they do not depend on how a step is split.
    """
    order = epoch_permutation(seed, epoch, len(dataset))
    if args.group_by_length:
        order = group_by_length(order, dataset.lengths, args.step_samples)
    return order[: len(order) - len(order) % args.step_samples] if args.dataloader_drop_last else order


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


def compute_metrics(logits, labels, weights, label_smoothing=0.0):
    """Return the sums {"loss", "accuracy", "normalizer"} over all positions: `logits: [..., V]`, the others `[...]`."""
    loss, normalizer = cross_entropy(logits, labels, weights, label_smoothing)
    return {"loss": loss, "accuracy": accuracy(logits, labels, weights), "normalizer": normalizer}


def accuracy(logits, targets, weights=None):
    """Return the weighted number of positions whose highest logit is the target's."""
    hits = jnp.argmax(logits, -1) == targets
    return jnp.sum(hits if weights is None else hits * weights)


def cross_entropy(logits, targets, weights=None, label_smoothing=0.0):
    """Return (sum of the weighted losses, sum of the weights) for `logits: [..., V]`, `targets: int [...]`.

    The target has probability 1 - label_smoothing, the other tokens share the rest; what no model can undercut is
    subtracted, so that the best loss is 0 (Flax, examples/lm1b). Computed without a one-hot or log-probability array.
    """
    logits = logits.astype(jnp.float32)
    loss = negative_log_likelihood(logits, targets)
    if label_smoothing > 0:
        confidence, low = 1.0 - label_smoothing, label_smoothing / (logits.shape[-1] - 1)
        floor = -(confidence * math.log(confidence) + label_smoothing * math.log(low))
        others = -jax.nn.log_softmax(logits).sum(-1) - loss
        loss = confidence * loss + low * others - floor
    if weights is None:
        return loss.sum(), np.prod(targets.shape)
    return (loss * weights).sum(), weights.sum()


def negative_log_likelihood(logits, targets):
    """Return -log softmax(logits)[targets]: [...] for `logits: [..., V]`; its gradient is one pass over the logits."""

    @jax.custom_vjp
    def likelihood(logits):
        return forward(logits)[0]

    def forward(logits):
        log_total = jax.nn.logsumexp(logits, -1)
        return log_total - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], (logits, log_total)

    def backward(residuals, gradient):
        logits, log_total = residuals
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        return ((jnp.exp(logits - log_total[..., None]) - is_target) * gradient[..., None],)

    likelihood.defvjp(forward, backward)
    return likelihood(logits)


def mean_metrics(loss, hits, count):
    """Return {"loss", "accuracy", "perplexity"} for sums over `count` masked tokens; perplexity `inf` on overflow."""
    mean = float(loss) / max(int(count), 1)
    try:
        perplexity = math.exp(mean)
    except OverflowError:
        perplexity = math.inf
    return {"loss": mean, "accuracy": float(hits) / max(int(count), 1), "perplexity": perplexity}


class SummaryWriter:
    """Writes TensorBoard events with the `tensorboard` package alone, where it is installed and there is a folder."""

    def __init__(self, log_dir, settings, texts):
        self.log_dir = log_dir
        self.settings = settings
        self.texts = texts
        self.writer = None

    def add(self, summary, step):
        """Write a summary; the first one makes the file, which begins with the hyperparameters."""
        if not self.writer:
            self.writer = EventFileWriter(self.log_dir)
            self.add(hparams_pb(self.settings), 0)
            for tag, text in self.texts.items():
                self.text(tag, text, 0)
        self.writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def scalar(self, tag, value, step):
        """Write one value of a chart."""
        if EventFileWriter and self.log_dir:
            self.add(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)

    def text(self, tag, text, step):
        """Write a text in Markdown, under the name that PyTorch's writer gives it."""
        if EventFileWriter and self.log_dir:
            metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
            tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape={"dim": [{"size": 1}]})
            self.add(Summary(value=[Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)]), step)

    def close(self):
        """Write out what is still in memory."""
        if self.writer:
            self.writer.close()


# ---------------------------------------------------------------------------------------------------------------------
# 8. Steps
# ---------------------------------------------------------------------------------------------------------------------
class Optimizer(train_state.TrainState):
    """Parameters, AdamW state and step, and the gradient norm of the last step: what `training_step` updates."""

    grad_norm: jax.Array


def dropout_layer(module, inputs):
    """What the `nn.Dropout` does while training, its probability exact to 2**-32; see `random_words`."""
    keep = 1.0 - module.rate
    shape = [1 if i in module.broadcast_dims else size for i, size in enumerate(inputs.shape)]
    bits = random_words(module.make_rng(module.rng_collection), shape)
    return jnp.where(bits < np.uint32(min(round(keep * 2**32), 2**32 - 1)), inputs / keep, 0)


def scramble(words):
    """Return a hash of each uint32, one to one ("lowbias32", https://nullprogram.com/blog/2018/07/31)."""
    words = (words ^ (words >> 16)) * np.uint32(0x7FEB352D)
    words = (words ^ (words >> 15)) * np.uint32(0x846CA68B)
    return words ^ (words >> 16)


def random_words(key, shape):
    """Return random uint32 of a shape: each element's place, hashed with one word that `key` draws and another.

    XLA fuses this into what uses it; `jax.random.bits` writes and shuffles arrays, for a tenth of a step on a CPU.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    places = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return scramble(scramble(places + first) ^ second)


def labelled_logits(params, batch, dropout_rng=None, *, model, selection="encoder"):
    """Return logits for `batch`: [K, V] at its `positions` (flat in [B * L]) where it names them, else [B, L, V].

    In the first case the model goes on with K hidden states only, from its last attention ("layer") or from the end
    of the encoder ("encoder") on, and its own head runs on those. Dropout is on with a `dropout_rng`.
    """
    sparse = "positions" in batch
    if selection == "layer":
        last_attention = (str(model.config.num_hidden_layers - 1), "attention", "output")

    def keep_labelled(hidden):
        return hidden.reshape(-1, hidden.shape[-1])[batch["positions"]][None]

    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if dropout_rng is not None and type(module) is nn.Dropout and 0 < module.rate < 1:
            return dropout_layer(module, *args[:1])
        if sparse and selection == "layer" and module.path[-3:] == last_attention:
            return call(*map(keep_labelled, args), **kwargs)
        output = call(*args, **kwargs)
        if not (sparse and selection == "encoder" and module.name == model.base_model_prefix):
            return output
        hidden = keep_labelled(output[0])
        return (hidden, *output[1:]) if isinstance(output, tuple) else output.replace(last_hidden_state=hidden)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "token_type_ids" in inspect.signature(type(model).__call__).parameters:
        inputs["token_type_ids"] = jnp.zeros_like(batch["input_ids"])  # The default of FlaxElectra is ones.
    params, bias = detach_bias(params, model.config.vocab_size)
    with nn.intercept_methods(intercept):
        logits = model(**inputs, params=params, dropout_rng=dropout_rng, train=dropout_rng is not None)[0]
    return attach_bias(logits[0] if sparse else logits, bias)


def is_logits_bias(path, leaf, vocab_size):
    """Return whether a parameter is the bias [V] that is added to the logits."""
    return jax.tree_util.keystr(path, simple=True, separator="/").endswith("/bias") and leaf.shape == (vocab_size,)


def detach_bias(params, vocab_size):
    """Return (`params`, the bias of the logits among them left out of the gradient, that bias: [V], or None)."""
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(params) if is_logits_bias(path, leaf, vocab_size)]
    if len(biases) != 1:
        return params, None
    return jax.tree.map_with_path(
        lambda path, leaf: lax.stop_gradient(leaf) if is_logits_bias(path, leaf, vocab_size) else leaf, params
    ), biases[0]


def attach_bias(logits, bias):
    """Return `logits: [..., V]` with the gradient of a `bias: [V]` that they hold already.

    As a matrix product with ones: on a CPU, XLA adds up that many columns fifty times slower.
    """
    if bias is None:
        return logits
    ones = jnp.ones((*logits.shape[:-1], 1), logits.dtype)
    return logits + ones @ (bias - lax.stop_gradient(bias)).astype(logits.dtype)[None]


def training_step(optimizer, batch, dropout_rng, *, label_smoothing=0.0):
    """Return (loss, optimizer, new_dropout_rng) after one update; runs under `jax.pmap` over the axis "batch".

    `batch`: `input_ids`, `attention_mask`, `labels`: int32 [B, L], or [A, B, L] to accumulate over A; optionally
    `positions` of the labels, and then `labels` alike: [K] or [A, K]. Labels below 0 do not count. The loss is the
    mean over the labels of all devices and micro-batches.
    """
    dropout_rng, new_dropout_rng = jax.random.split(dropout_rng)
    micro_batches = batch if batch["input_ids"].ndim == 3 else jax.tree.map(lambda array: array[None], batch)
    # A device's sum over the mean count: then the mean of the devices' gradients is that of the global mean.
    count = lax.pmean((batch["labels"] >= 0).sum().astype(jnp.float32), "batch")
    scale = 1.0 / jnp.where(count > 0, count, 1.0)

    def micro_loss(params, micro_batch, rng):
        logits = optimizer.apply_fn(params, micro_batch, rng)
        labels = micro_batch["labels"]
        return scale * cross_entropy(logits, jnp.maximum(labels, 0), labels >= 0, label_smoothing)[0]

    def accumulate(total, inputs):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(micro_loss)(optimizer.params, *inputs)), None

    steps = micro_batches["input_ids"].shape[0]
    if steps == 1:
        inputs = jax.tree.map(lambda array: array[0], micro_batches), dropout_rng
        loss, gradients = jax.value_and_grad(micro_loss)(optimizer.params, *inputs)
    else:
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, optimizer.params)
        inputs = micro_batches, jax.random.split(dropout_rng, steps)
        (loss, gradients), _ = lax.scan(accumulate, zero, inputs)
    if lax.axis_size("batch") > 1:  # XLA would copy all gradients of a single device.
        loss, gradients = lax.pmean((loss, gradients), "batch")
    optimizer = optimizer.apply_gradients(grads=gradients, grad_norm=optax.tree.norm(gradients))
    return loss, optimizer, new_dropout_rng


def eval_step(params, batch, *, apply_fn):
    """Return the sums {"loss", "accuracy", "normalizer"} over the labels of all devices, under `jax.pmap` ("batch")."""
    labels = batch["labels"]
    metrics = compute_metrics(apply_fn(params, batch), jnp.maximum(labels, 0), labels >= 0)
    return lax.psum(metrics, "batch")


def generate_batch_splits(samples_idx, batch_size, drop_last=True):
    """Return the list of batches of an order of samples; one that is not full at the end is dropped, or kept."""
    full = len(samples_idx) // batch_size * batch_size
    batches = np.split(samples_idx[:full], full // batch_size) if full else []
    return batches if drop_last or full == len(samples_idx) else [*batches, samples_idx[full:]]


def label_slots(labels, probability):
    """Return a K that the label counts of `labels: [..., B, L]` fit in, the same for almost every batch of a shape.

    Five standard deviations above the expectation, a multiple of 8; beyond that twice, three times as much.
    """
    tokens = labels.shape[-1] * labels.shape[-2]
    expected = tokens * probability
    slots = 8 * math.ceil((expected + 5 * math.sqrt(expected * (1 - probability))) / 8)
    most = int((labels >= 0).sum((-2, -1)).max())
    return min(tokens, slots * max(1, math.ceil(most / slots)))


def select_labels(labels, slots):
    """Return {"positions", "labels"}: int32 [..., K], the places in B * L that have a label in `labels: [..., B, L]`.

    Padded to K = `slots` with position 0 and label -100.
    """
    flat = labels.reshape(-1, labels.shape[-2] * labels.shape[-1])
    positions = np.zeros((len(flat), slots), np.int32)
    kept = np.full((len(flat), slots), IGNORED_LABEL, np.int32)
    for i, row in enumerate(flat):
        found = np.flatnonzero(row >= 0)
        positions[i, : len(found)], kept[i, : len(found)] = found, row[found]
    shape = (*labels.shape[:-2], slots)
    return {"positions": positions.reshape(shape), "labels": kept.reshape(shape)}


@dataclass
class Run:
    """What a training run is made of, and where it is."""

    args: TrainingArguments
    model: Any
    tokenizer: PreTrainedTokenizerBase
    collator: FlaxDataCollatorForLanguageModeling
    tokenized: dict
    max_seq_length: int
    pad_to_max_length: bool
    selection: Optional[str]
    writer: SummaryWriter
    step: int = 0
    first_step: int = 0  # Not 0 after a resume.
    log_history: list = field(default_factory=list)
    seen_shapes: set = field(default_factory=set)
    clock: tuple = (0, 0.0)  # Step and time from which `tokens_per_second` is measured.

    @property
    def steps_per_epoch(self):
        """Optimizer steps of one pass over the training data."""
        steps = len(self.tokenized["train"]) / self.args.step_samples
        return math.floor(steps) if self.args.dataloader_drop_last else math.ceil(steps)

    @property
    def num_steps(self):
        """Optimizer steps of the whole run."""
        return (
            self.args.max_steps
            if self.args.max_steps > 0
            else math.ceil(self.args.num_train_epochs * self.steps_per_epoch)
        )

    @functools.cached_property
    def schedule(self):
        """The learning rate at each step."""
        return create_schedule(self.args, self.num_steps)

    @functools.cached_property
    def apply_fn(self) -> Callable:
        """The model's forward pass, as the steps call it."""
        return functools.partial(labelled_logits, model=self.model, selection=self.selection)

    @functools.cached_property
    def forward(self):
        """The compiled forward pass of one device, for all logits."""
        return jax.jit(self.apply_fn)

    @functools.cached_property
    def eval_step(self):
        """The compiled evaluation step; the last one stays compiled from one evaluation to the next."""
        return jax.pmap(functools.partial(eval_step, apply_fn=self.apply_fn), "batch")

    def start_clock(self):
        """Measure `tokens_per_second` from here."""
        self.clock = self.step, time.perf_counter()

    def log(self, logs):
        """Record values in the history and on the charts, under the Trainer's names."""
        if self.args.do_train:
            logs = {**logs, "epoch": self.step / self.steps_per_epoch}
        self.log_history.append({**logs, "step": self.step})
        if self.args.should_log:
            for name, value in logs.items():
                tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                self.writer.scalar(tag, value, self.step)
            tqdm.write(str(logs))

    def device_batch(self, dataset, keys, rows, accumulation=1):
        """Return this process's part of the batch of samples `keys` as arrays [D, (A,) B, L], D its own devices.

        A missing sample is the first one without labels. The lengths of all samples decide L, in each process alike.
        """
        places = np.arange(rows * accumulation * jax.device_count())
        own = places.reshape(accumulation, jax.process_count(), -1)[:, jax.process_index()].ravel()
        samples = [dataset[keys[i] if i < len(keys) else keys[0]] for i in own.tolist()]
        if isinstance(dataset, StreamedDataset):
            longest = max(len(key["input_ids"]) for key in keys)
        else:
            longest = int(dataset.lengths[np.asarray(keys) % len(dataset)].max())
        batch = self.collator(samples, pad_to_length=self.padded_length(longest))
        batch["labels"][own >= len(keys)] = IGNORED_LABEL
        batch = {name: array.reshape(accumulation, -1, rows, array.shape[-1]) for name, array in batch.items()}
        batch = {name: array.swapaxes(0, 1) if accumulation > 1 else array[0] for name, array in batch.items()}
        if self.selection:
            probability = self.collator.probability(samples[0]["epoch"])
            batch |= select_labels(batch["labels"], label_slots(batch["labels"], probability))
        kind = "an evaluation step" if dataset is self.tokenized.get("validation") else "a step"
        compiled = kind, *(array.shape for array in batch.values())
        if compiled not in self.seen_shapes:
            self.seen_shapes.add(compiled)
            logger.info(f"Compiling {kind} for batches of shape {batch['input_ids'].shape}.")
        return batch

    def padded_length(self, longest):
        """Return the length that a batch is padded to: one of a few, as every shape is compiled."""
        if self.pad_to_max_length:
            return self.max_seq_length
        multiple = length_multiple(self.max_seq_length)
        return min(self.max_seq_length, multiple * math.ceil(longest / multiple))


def length_multiple(max_seq_length):
    """Return what the lengths of batches are multiples of, so that there are few of them."""
    return 8 * math.ceil(max_seq_length / MAX_SHAPES / 8)


def find_selection(model, dataset, collator):
    """Return where hidden states can be left out, "layer" or "encoder", or None if the head needs all positions.

    Tried on two samples: the logits must stay the same. Raises what the model does with all positions.
    """
    batch = collator([dataset[i % len(dataset)] for i in range(2)])
    # More positions than a row has: some models cut to its length what they go on with.
    positions = np.flatnonzero(np.arange(batch["input_ids"].size) % 3 > 0)
    found = None
    dense = jax.jit(functools.partial(labelled_logits, model=model))(model.params, batch)
    dense = dense.reshape(-1, dense.shape[-1])[positions]
    for selection in ("encoder", "layer"):
        forward = jax.jit(functools.partial(labelled_logits, model=model, selection=selection))
        with contextlib.suppress(Exception):  # Architectures fail in many ways.
            sparse = forward(model.params, {**batch, "positions": positions})
            if dense.shape == sparse.shape and jnp.abs(sparse - dense).max() <= 1e-3 * jnp.abs(dense).max():
                found = selection
    if found is None:
        logger.warning(f"{type(model).__name__} needs all positions in its head: training with the dense head.")
    return found


def check_devices():
    """Raise `UserError` where the devices that JAX is told to use are not there."""
    with user_errors(f"JAX_PLATFORMS {os.environ.get('JAX_PLATFORMS', '')}"):
        jax.devices()
    if jax.device_count() != jax.process_count() * jax.local_device_count():
        raise UserError(
            f"this process has {jax.local_device_count()} of {jax.device_count()} devices in {jax.process_count()} "
            "processes: all need as many; see CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS"
        )


def connect_processes(data_args, training_args):
    """Join the other processes of the run, where there are any: as the flags say, or as JAX finds in the environment.

    Raises `UserError` where they are not there in time. To be called before JAX starts a device.
    """
    args, found = training_args, {}
    flags = {name: getattr(args, name) for name in ("coordinator_address", "num_processes", "process_id")}
    if args.coordinator_address:
        found = {**flags, "cluster_detection_method": "deactivate"}
    # In a pod that is no part of an indexed job, JAX would ask Kubernetes for what is not there.
    pod = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ
    if jax.distributed.is_initialized() or (not found and (args.num_processes == 1 or pod)):
        return
    jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM from `StopSignals`.
    if args.process_id:
        await_coordinator(args.coordinator_address)
    timeouts = {"initialization_timeout": CONNECT_SECONDS, "shutdown_timeout_seconds": DISCONNECT_SECONDS}
    try:
        jax.distributed.initialize(**found, **timeouts)
    except (ValueError, RuntimeError) as error:
        # No cluster; or no first run in this interpreter.
        alone = "coordinator_address should" in str(error) or "must be called before" in str(error)
        if found or not alone:
            place = f"--coordinator_address {args.coordinator_address}" if found else "the cluster JAX found"
            raise UserError(
                f"{place}: {error}; start all processes within {CONNECT_SECONDS} s, or give --num_processes 1 to one"
            ) from error
    if jax.distributed.is_initialized() and data_args.preprocessing_num_workers:
        raise UserError("--preprocessing_num_workers does not work in several processes; tokenize in a run before")


def await_coordinator(address):
    """Wait until process 0 listens, or raise `UserError`: JAX itself would crash."""
    host, port = address.rsplit(":", 1)
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except (OSError, OverflowError, UnicodeError) as error:
            if time.monotonic() > end:
                raise UserError(
                    f"--coordinator_address {address} cannot be reached for {CONNECT_SECONDS} s ({error}); start "
                    "process 0 there, and let its port through"
                ) from error
            time.sleep(1)


class SharedError(UserError):
    """A mistake that all processes know of."""


def fail_together(message=""):
    """Wait for all processes; where one of them brings a message, raise it as a `SharedError` in all."""
    if not jax.distributed.is_initialized():
        return
    text = np.zeros(MESSAGE_BYTES, np.uint8)
    content = message.encode()[:MESSAGE_BYTES]
    text[: len(content)] = list(content)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(text)]
    if any(texts):
        raise SharedError(next(filter(None, texts)))


@contextlib.contextmanager
def failing_together():
    """Within, a `UserError` in one process is raised in all at their next `fail_together`; they end it together.

    After any other error this process ends without waiting for the others, which then end too.
    """
    try:
        yield
    except (SharedError, SystemExit):
        raise
    except UserError as error:
        fail_together(str(error))
        raise
    except BaseException:
        if jax.distributed.is_initialized():
            atexit.register(leave)
        raise
    fail_together()


def leave():
    """End this process at once, with status 1; what it printed is not lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def from_first_process(function, *args):
    """Return what `function` returns in process 0, a JSON value; the others wait and do not call it.

    A `UserError` of it is raised in all.
    """
    if not jax.distributed.is_initialized():
        return function(*args)
    value = None
    with failing_together():
        if jax.process_index() == 0:
            value = function(*args)
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    return json.loads(multihost_utils.broadcast_one_to_all(np.resize(content, size)).tobytes())


@contextlib.contextmanager
def in_turn():
    """Within is process 0 first, then the first process of each other machine, then the others: they find its cache."""
    turn = 0
    if jax.distributed.is_initialized():
        own = jax.process_index()
        machines = multihost_utils.process_allgather(np.uint32(zlib.crc32(socket.gethostname().encode()))).tolist()
        turn = 0 if own == 0 else 1 if machines.index(machines[own]) == own else 2
    for _ in range(turn):
        fail_together()
    yield
    for _ in range(2 - turn):
        fail_together()


def in_step(batches, signals=None):
    """Yield (batch, signals): in all processes the same K, and in `signals.received` what any of them received.

    Several processes agree on that one step ahead, so that no device waits for it.
    """
    if jax.process_count() == 1:
        yield from ((batch, signals) for batch in batches)
        return
    largest = jax.pmap(lambda values: lax.pmax(values, "batch"), "batch")
    agreements = deque()
    for batch in batches:
        own = [batch["labels"].shape[-1], (signals and signals.received) or 0]
        agreements.append((batch, largest(np.tile(np.int32(own), (jax.local_device_count(), 1)))))
        if len(agreements) > 1:
            yield as_agreed(*agreements.popleft())
    while agreements:
        yield as_agreed(*agreements.popleft())


def as_agreed(batch, largest):
    """Return (batch, signals) with the largest K and signal of all processes: int32 [D, 2]."""
    slots, received = jax.device_get(largest)[0].tolist()
    return widen(batch, slots), types.SimpleNamespace(received=received)


def widen(batch, slots):
    """Return a batch of K labels as one of K = `slots`."""
    missing = slots - batch["labels"].shape[-1]
    if not missing:
        return batch
    padding = {"positions": 0, "labels": IGNORED_LABEL}
    wider = {
        name: np.pad(batch[name], [(0, 0)] * (batch[name].ndim - 1) + [(0, missing)], constant_values=value)
        for name, value in padding.items()
    }
    return {**batch, **wider}


def batch_padding(data_args, training_args, max_seq_length):
    """Return {split: the arguments of `padding_share`} for the batches of a `Run`: all devices are padded alike."""
    check_devices()
    shortest = max_seq_length if data_args.pad_to_max_length else 1
    rule = {"shortest": shortest, "multiple": length_multiple(max_seq_length), "longest": max_seq_length}
    window = training_args.step_samples if training_args.group_by_length else 1
    return {
        "train": {"rows": training_args.step_samples, "window": window, **rule},
        "validation": {"rows": training_args.eval_batch_size * jax.device_count(), "window": 0, **rule},
    }


def build_run(model_args, data_args, training_args, model, tokenizer, tokenized, max_seq_length):
    """Return the `Run`."""
    collator = FlaxDataCollatorForLanguageModeling(
        tokenizer,
        mlm_probability=data_args.mlm_probability,
        eval_mlm_probability=data_args.eval_mlm_probability,
        mask_replace_prob=data_args.mask_replace_prob,
        random_replace_prob=data_args.random_replace_prob,
        seed=training_args.seed,
    )
    sample = next(dataset for dataset in tokenized.values() if len(dataset))
    with user_errors(f"{model_args.model_flag} fails at the first samples"):
        selection = None if model_args.dense_head else from_first_process(find_selection, model, sample, collator)
    groups = model_args, data_args, training_args
    arguments = {name: value for group in groups for name, value in vars(group).items() if not name.endswith("token")}
    texts = {"args": json.dumps(arguments, indent=2), "model_config": model.config.to_json_string()}
    log_dir = os.path.join(training_args.output_dir, "logs") if training_args.should_log else None
    if training_args.push_to_hub:
        from_first_process(create_repository, training_args, REPOSITORY_FIX)
    return Run(
        args=training_args,
        model=model,
        tokenizer=tokenizer,
        collator=collator,
        tokenized=tokenized,
        max_seq_length=max_seq_length,
        pad_to_max_length=data_args.pad_to_max_length,
        selection=selection,
        writer=SummaryWriter(log_dir, hyperparameters(*groups), texts),
    )


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
    """Send this script's messages to stdout, from the main process only."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[logging.StreamHandler(sys.stdout)]
    )
    logger.setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    datasets.logging.set_verbosity(logging.CRITICAL)  # What goes wrong there is raised too.
    if not training_args.should_log:
        datasets.disable_progress_bars()
        transformers_logging.set_verbosity_error()


def keep_compiled_code(model_args):
    """Let the next run of the same shapes find what this one compiles, unless JAX was told where to keep it."""
    if not jax.config.jax_compilation_cache_dir:
        folder = model_args.cache_dir or datasets.config.HF_CACHE_HOME
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def start_process(model_args, data_args, training_args):
    """Join the other processes of the run, then set up what is this process's own."""
    connect_processes(data_args, training_args)
    setup_logging(training_args)
    keep_compiled_code(model_args)


def claim_output_dir(training_args, stack):
    """Lock the output folder until `stack` is closed; return the checkpoint to resume from, or None to start anew."""
    stack.enter_context(locked(training_args))
    return prepare_output_dir(training_args)


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


def training_order(run):
    """Yield the sample keys of the optimizer steps to come, epoch after epoch without end."""
    dataset = run.tokenized["train"]
    if isinstance(dataset, StreamedDataset):
        samples = dataset.samples(run.args.seed)
        yield from iter(lambda: list(itertools.islice(samples, run.args.step_samples)), [])
    first_epoch, steps_done = divmod(run.step, run.steps_per_epoch)
    for epoch in itertools.count(first_epoch):
        order = epoch_order(dataset, run.args, run.args.seed, epoch)
        batches = generate_batch_splits(order, run.args.step_samples, drop_last=False)
        for batch in batches[steps_done if epoch == first_epoch else 0 :]:
            yield epoch * len(dataset) + batch


def prefetch(function, items):
    """Yield `function(item)` of each item; a thread makes the next one while this one is used."""
    with ThreadPoolExecutor(1) as executor:
        futures = deque()
        for item in items:
            futures.append(executor.submit(function, item))
            if len(futures) > 1:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def take_params(model):
    """Return the parameters of a model that keeps their shapes only: from here on they live on the devices."""
    params = model.params
    model.params = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), params)
    return params


def create_training_state(run, checkpoint):
    """Return (optimizer, dropout_rngs) of the first step, or as the checkpoint has them, on every device.

    All processes begin with what process 0 has.
    """
    params, tx = take_params(run.model), create_optimizer(run.args, run.schedule)
    # Of the kind that XLA draws fastest.
    keys = jax.random.key_data(jax.random.split(jax.random.key(run.args.seed, impl="rbg"), jax.device_count()))
    state = params, tx.init(params), keys
    if checkpoint:
        entries = from_first_process(read_trainer_state, checkpoint)
        run.step = run.first_step = entries["global_step"]
        run.log_history = entries["log_history"]
        states = [state]
        from_first_process(lambda: states.append(read_checkpoint(checkpoint, state)))
        state = states[-1]
    if jax.process_count() > 1:
        state = multihost_utils.broadcast_one_to_all(state)
    optimizer = Optimizer(
        step=run.step, apply_fn=run.apply_fn, params=state[0], tx=tx, opt_state=state[1], grad_norm=jnp.zeros(())
    )
    optimizer = jax_utils.replicate(optimizer, axis_name="batch")
    first = jax.process_index() * jax.local_device_count()
    dropout_rngs = jax.random.wrap_key_data(state[2][first : first + jax.local_device_count()], impl="rbg")
    # Laid out as the step returns them, or its second call would compile anew.
    return optimizer, jax.device_put(dropout_rngs, optimizer.step.sharding)


def read_trainer_state(checkpoint):
    """Return the trainer's state in a checkpoint."""
    with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
        return json.load(file)


def read_checkpoint(checkpoint, template):
    """Return (parameters, optimizer state, dropout keys of all devices) of a checkpoint, in the trees of `template`."""
    with user_errors(f"the model in {checkpoint}", CHECKPOINT_FIX):
        params = flax_params(load_file(os.path.join(checkpoint, "model.safetensors")), template[0])
    path = os.path.join(checkpoint, "optimizer.msgpack")
    with user_errors(f"the optimizer state in {checkpoint}", CHECKPOINT_FIX), open(path, "rb") as file:
        opt_state, keys = serialization.from_bytes(template[1:], file.read())
    if len(keys) != len(template[2]):
        raise UserError(
            f"{checkpoint} is of {len(keys)} devices, and here are {len(template[2])}: resume it on as many"
        )
    return params, opt_state, keys


def resumed_place(dataset, checkpoint):
    """Make a stream begin where a checkpoint left it and return that place, None for another data set."""
    resume_stream(dataset, checkpoint)
    return [dataset.first, dataset.states] if isinstance(dataset, StreamedDataset) else None


def resume_stream_everywhere(dataset, checkpoint):
    """Make a stream begin, in all processes, where a checkpoint that process 0 reads left it."""
    place = from_first_process(resumed_place, dataset, checkpoint)
    if place:
        dataset.first, dataset.states = place


def is_due(run, strategy, interval):
    """Return whether this step is one to evaluate or save at."""
    interval = {"no": 0, "steps": interval, "epoch": run.steps_per_epoch}[strategy]
    return interval and (run.step % interval == 0 or run.step == run.num_steps)


def train(run, checkpoint):
    """Train, save the model and the tokenizer, and return (parameters on every device, the training metrics).

    Exits with status 128 + signal, checkpoint saved, when SIGTERM or SIGINT stops the training.
    """
    args, dataset, start = run.args, run.tokenized["train"], time.time()
    if checkpoint is None and args.should_log and os.path.isdir(args.output_dir):
        for _, path in list_checkpoints(args.output_dir):
            shutil.rmtree(path)  # --overwrite_output_dir: what is left of another run must not be resumed later.
    from_first_process(check_steps, checkpoint, run.num_steps)
    if checkpoint:
        resume_stream_everywhere(dataset, checkpoint)
    step_fn = jax.pmap(
        functools.partial(training_step, label_smoothing=args.label_smoothing_factor), "batch", donate_argnums=(0, 2)
    )
    optimizer, dropout_rngs = create_training_state(run, checkpoint)
    losses, total_loss, tokens = [], 0.0, 0
    steps = itertools.islice(training_order(run), run.num_steps - run.step)
    batches = prefetch(
        lambda keys: run.device_batch(dataset, keys, args.train_batch_size, args.gradient_accumulation_steps), steps
    )
    run.start_clock()
    with StopSignals() as signals:
        batches = tqdm(batches, "Training", run.num_steps, initial=run.step, disable=not args.should_log)
        for batch, told in in_step(batches, signals):
            loss, optimizer, dropout_rngs = step_fn(optimizer, batch, dropout_rngs)
            check_losses(run, losses[-1:], run.step)  # The step before: the device is busy with this one.
            run.step += 1
            tokens += batch["input_ids"].size * jax.process_count()
            losses.append(loss)
            if run.step % args.logging_steps == 0 or run.step == run.num_steps:
                total_loss += log_training(run, losses, optimizer)
                losses.clear()
            if args.do_eval and is_due(run, args.eval_strategy, args.eval_steps) and run.step < run.num_steps:
                evaluate(run, optimizer.params)
            if told.received or is_due(run, args.save_strategy, args.save_steps):
                check_losses(run, losses[-1:], run.step)
                save_checkpoint(run, optimizer, dropout_rngs)
                run.start_clock()
            if told.received:
                logger.info(f"Stopped by signal {told.received}; the checkpoint of step {run.step} is saved.")
                raise SystemExit(128 + told.received)
    save_model(run, optimizer.params)
    return optimizer.params, training_metrics(run, total_loss, tokens, start)


def training_metrics(run, total_loss, tokens, start):
    """Return the metrics of the steps made since `start` (seconds since the epoch), named as the Trainer's."""
    dataset, steps = run.tokenized["train"], run.step - run.first_step
    num_samples = run.num_steps * run.args.step_samples
    if run.args.max_steps <= 0:
        num_samples = len(dataset) * run.args.num_train_epochs
    metrics = {"epoch": run.step / run.steps_per_epoch}
    metrics["total_flos"] = 6.0 * tokens * num_matrix_parameters(run.model.params)
    metrics["train_loss"] = mean_logged_loss(run.log_history) if run.first_step else total_loss / run.num_steps
    metrics |= speed_metrics("train", start, num_samples=num_samples * steps / run.num_steps, num_steps=steps)
    run.log(metrics)
    metrics["train_samples"] = len(dataset)
    metrics["train_tokens_per_second"] = round(metrics["train_samples_per_second"] * dataset.num_tokens / len(dataset))
    if run.first_step == run.step:
        metrics |= previous_results(run.args.output_dir, "train")  # There was nothing left to do.
    return metrics


def check_losses(run, losses, step):
    """Raise `UserError` for a loss that is not finite, of the losses of the steps up to `step`; waits for them."""
    losses = [float(loss[0]) for loss in jax.device_get(losses)]
    for i, loss in enumerate(losses):
        if not math.isfinite(loss):
            stop_training(run, f"the loss is {loss}", step - len(losses) + i)


def stop_training(run, reason, step):
    """Raise a `UserError` for numbers that are not finite; `step` counts from 0."""
    samples = samples_of_step(run.tokenized["train"], run.args, run.args.seed, step)
    raise UserError(not_finite_message(reason, step + 1, float(run.schedule(step)), samples))


def log_training(run, losses, optimizer):
    """Log the mean of the losses since the last report and return their sum."""
    check_losses(run, losses, run.step)
    values = [float(loss[0]) for loss in jax.device_get(losses)]
    logs = {"loss": sum(values) / len(values), "grad_norm": float(optimizer.grad_norm[0])}
    logs["learning_rate"] = float(run.schedule(run.step - 1))
    dataset, (step, start) = run.tokenized["train"], run.clock
    tokens = dataset.num_tokens / len(dataset) * run.args.step_samples
    run.log({**logs, "tokens_per_second": round(tokens * (run.step - step) / (time.perf_counter() - start))})
    run.start_clock()
    return sum(values)


def num_matrix_parameters(params):
    """Return the number of parameters that are not embeddings, as the Trainer counts them for `total_flos`."""
    return sum(value.size for path, value in flatten_dict(params).items() if path[-1] != "embedding")


def evaluate(run, params):
    """Evaluate on all validation samples, with the parameters on every device; log and return the metrics."""
    dataset, rows, start = run.tokenized["validation"], run.args.eval_batch_size, time.time()
    batches = generate_batch_splits(np.arange(len(dataset)), rows * jax.device_count(), drop_last=False)
    sums = []
    arrays = prefetch(lambda keys: run.device_batch(dataset, keys, rows), batches)
    arrays = tqdm(arrays, "Evaluating", len(batches), leave=False, disable=not run.args.should_log)
    for batch, _ in in_step(arrays):
        sums.append(run.eval_step(params, batch))
    sums = {name: sum(float(part[name][0]) for part in jax.device_get(sums)) for name in sums[0]}
    metrics = mean_metrics(sums["loss"], sums["accuracy"], sums["normalizer"])
    metrics = {f"eval_{name}": value for name, value in metrics.items()}
    metrics |= speed_metrics("eval", start, num_samples=len(dataset), num_steps=len(batches))
    run.log(metrics)
    metrics["perplexity"] = metrics.pop("eval_perplexity")
    if run.args.do_train:
        metrics["epoch"] = run.step / run.steps_per_epoch
    metrics["eval_samples"] = len(dataset)
    metrics["eval_tokens_per_second"] = round(metrics["eval_samples_per_second"] * dataset.num_tokens / len(dataset))
    if run.args.should_log:
        guesses = guess(run, params)
        run.writer.text("eval/guesses", guesses_table(guesses), run.step)
        if not run.args.do_train or run.step == run.num_steps:
            log_guesses(guesses)
    run.start_clock()
    return metrics


def write_model(run, params, folder):
    """Write model and tokenizer as a Transformers folder that PyTorch and Flax load."""
    config = copy.deepcopy(run.model.config)
    config.architectures = [type(run.model).__name__.removeprefix("Flax")]
    config.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    weights = pytorch_state_dict(jax_utils.unreplicate(params))
    if run.step and not all(np.isfinite(weight).all() for weight in weights.values()):
        stop_training(run, "a weight is not finite", run.step - 1)
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def save_model(run, params):
    """Have process 0 write model and tokenizer to the output folder."""
    from_first_process(write_final_model, run, params)


def write_final_model(run, params):
    """Write model and tokenizer to the output folder, each file renamed into place when it is whole."""
    with staging(run.args.output_dir) as folder:
        write_model(run, params, os.path.join(folder, "model"))
        publish_files(os.path.join(folder, "model"), run.args.output_dir)


def save_checkpoint(run, optimizer, dropout_rngs):
    """Have process 0 write `checkpoint-N`, the dropout keys of all processes in it."""
    keys = multihost_utils.process_allgather(jax.device_get(jax.random.key_data(dropout_rngs)), tiled=True)
    from_first_process(write_checkpoint, run, optimizer, keys)


def write_checkpoint(run, optimizer, keys):
    """Write `checkpoint-N`: the model as an ordinary folder, the optimizer, the dropout keys, the trainer's state."""
    with staging(run.args.output_dir) as folder:
        staged = os.path.join(folder, f"checkpoint-{run.step}")
        write_model(run, optimizer.params, staged)
        state = jax.device_get((jax_utils.unreplicate(optimizer.opt_state), keys))
        with open(os.path.join(staged, "optimizer.msgpack"), "wb") as file:
            file.write(serialization.to_bytes(state))
        write_json(os.path.join(staged, "trainer_state.json"), trainer_state(run))
        if isinstance(run.tokenized["train"], StreamedDataset):
            run.tokenized["train"].save_state(staged, run.step)
        publish_checkpoint(staged, run.args.output_dir, run.args.save_total_limit)


def save_results(run, split, metrics):
    """Log the metrics of a split and write `{split}_results.json`, `all_results.json` and `trainer_state.json`."""
    if not run.args.should_log:
        return
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in sorted(metrics.items())}
    log_summary(f"{split} metrics", shown)
    os.makedirs(run.args.output_dir, exist_ok=True)
    write_results(run.args.output_dir, split, metrics)
    write_json(os.path.join(run.args.output_dir, "trainer_state.json"), trainer_state(run))


def trainer_state(run):
    """Return what the Trainer writes to `trainer_state.json`, as far as this loop has it."""
    return {
        "epoch": run.step / run.steps_per_epoch if run.args.do_train else None,
        "global_step": run.step,
        "max_steps": run.num_steps if run.args.do_train else 0,
        "num_train_epochs": run.args.num_train_epochs,
        "train_batch_size": run.args.train_batch_size,
        "logging_steps": run.args.logging_steps,
        "eval_steps": run.args.eval_steps,
        "save_steps": run.args.save_steps,
        "is_world_process_zero": run.args.should_log,
        "log_history": run.log_history,
    }


def guess(run, params):
    """Return the model's `best_guesses` for a few validation sentences with one mask each."""
    sentences = masked_sentences(run.tokenized["validation"], run.tokenizer, run.collator)
    batch = {name: sentences[name] for name in ("input_ids", "attention_mask")}
    logits = run.forward(jax_utils.unreplicate(params), batch)
    picked = logits[np.arange(len(logits)), sentences["positions"]]
    return best_guesses(run.tokenizer, sentences, np.asarray(picked, np.float32))


def summarize(run):
    """Return the lines that describe the training ahead; warns of a schedule that stays far below its base rate."""
    steps = np.unique(np.linspace(0, run.num_steps, 1000, dtype=int))
    peak = float(np.max(jax.vmap(run.schedule)(steps)))
    if peak < 0.1 * run.args.learning_rate:
        logger.warning(
            f"The learning rate peaks at {peak:.3g}, far below --learning_rate {run.args.learning_rate}: rsqrt_decay "
            "divides by sqrt(warmup_steps). rsqrt_normalized_decay in --lr_scheduler_type does not."
        )
    args = run.args
    parameters = sum(value.size for value in jax.tree.leaves(run.model.params))
    batch = args.train_batch_size, args.gradient_accumulation_steps, jax.device_count()
    return run_summary(parameters, run.tokenized["train"], run.collator, batch, run.num_steps, peak)


# ---------------------------------------------------------------------------------------------------------------------
# 10. Main
# ---------------------------------------------------------------------------------------------------------------------
@exit_on_user_error
def main(argv=None):
    """Run what the arguments ask for and return all metrics."""
    model_args, data_args, training_args = parse_args(argv)
    start_process(model_args, data_args, training_args)
    with failing_together(), contextlib.ExitStack() as stack:
        check_inputs(model_args, data_args)
        if not data_args.preprocessing_num_workers:
            check_devices()  # It starts threads, which worker processes must not come after.
        checkpoint = from_first_process(claim_output_dir, training_args, stack)
        config = load_config(model_args)
        tokenizer = load_tokenizer(model_args)
        max_seq_length = choose_max_seq_length(data_args, tokenizer, config)
        with in_turn():
            raw_datasets = needed_splits(load_raw_datasets(model_args, data_args), training_args)
            tokenized = tokenize_datasets(raw_datasets, tokenizer, data_args, max_seq_length, training_args)
        padding = batch_padding(data_args, training_args, max_seq_length)
        facts = log_summary("Data", data_summary(tokenized, tokenizer, padding))
        check_samples(raw_datasets, tokenized, tokenizer, data_args, training_args)
        if not (training_args.do_train or training_args.do_eval):
            logger.info("Tokenized and cached. Nothing was trained or evaluated: see --do_train and --do_eval.")
            return {}

        model = load_model(model_args, config, tokenizer, training_args.dtype, training_args.seed)
        run = build_run(model_args, data_args, training_args, model, tokenizer, tokenized, max_seq_length)
        metrics = {}
        if training_args.do_train:
            log_start(training_args, checkpoint)
            log_summary("Training", summarize(run))
            params, train_metrics = train(run, checkpoint)
            save_results(run, "train", train_metrics)
            metrics |= train_metrics
        else:
            params = jax_utils.replicate(take_params(model), axis_name="batch")
        if training_args.do_eval:
            eval_metrics = evaluate(run, params)
            save_results(run, "eval", eval_metrics)
            metrics |= eval_metrics
        run.writer.close()
        publish_model(argv, model_args, data_args, training_args, facts, metrics)
        return metrics


if __name__ == "__main__":
    main()
