#!/usr/bin/env python
"""Train a masked language model on your own text with PyTorch and the Transformers `Trainer`.

Fine-tune a BERT-like model, or train one from scratch:

    python run_mlm.py --model_name_or_path bert-base-uncased --train_file my.txt --do_train --do_eval --output_dir out
    python run_mlm.py configs/quickstart.json --learning_rate 1e-3

`run_mlm_flax.py` is the same program on JAX: the same flags, masks, batches and result files. Definitions
with the same name have the same source in both scripts, unless they depend on the framework.

Where to change what: the masking rule in `mask_tokens`, which sees token ids, not text (its shares are flags); which
ids are never masked in `MaskingCollator`; how text becomes rows of ids in `encode_texts`; the order of the samples in
`epoch_order`; the training loss in `MaskedLMTrainer.compute_loss`, its divisor in `get_batch_samples`; loss and metrics
of an evaluation in `prediction_step`, `metrics_of_sums` and `mean_metrics`; the optimizer with `--optim` or in
`create_optimizer`; file formats in `FILE_FORMATS`. A new flag is a field of an argument class, with its limits in
`INTERVALS` or `check_args`; `tests/flags_table.py --write` lists flags and defaults.

Shapes: B batch (samples), L length (tokens of a sample), V vocabulary, K masked positions of a batch, H hidden size.
"""

import atexit
import contextlib
import copy
import csv
import datetime
import difflib
import errno
import functools
import gc
import glob
import importlib
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Optional

if __name__ == "__main__":  # As a program, do not import frameworks that are installed but not used.
    os.environ.setdefault("USE_FLAX", "0")
    os.environ.setdefault("USE_TF", "0")

import datasets
import filelock
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import transformers
import yaml
from datasets.iterable_dataset import ArrowExamplesIterable
from huggingface_hub import EvalResult, HfApi, ModelCardData, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    set_seed,
)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback
from transformers.trainer_utils import speed_metrics
from transformers.utils import check_min_version, is_torch_xla_available
from transformers.utils.hub import hf_api

check_min_version("5.23.0")

logger = logging.getLogger(__name__)

MODEL_TYPES = tuple(sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING))
OTHER_MODELS = ""
LINE_BY_LINE_DEFAULT = False  # The default of the original script: texts are joined and cut into full rows.
# The optimizer state in a checkpoint, one of these: plain, FSDP (two), DeepSpeed, FSDP on a TPU.
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*", "rank*-optimizer.pt")
# Arguments, grouped by the interval that their values must be in; a round bracket excludes its end.
INTERVALS = {
    "[1, 2147483647]": "train_batch_size eval_batch_size gradient_accumulation_steps max_seq_length max_train_samples "
    "max_val_samples preprocessing_num_workers shuffle_buffer_size save_total_limit num_processes tpu_num_cores "
    "eval_accumulation_steps torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout",
    "[0, 2147483647]": "warmup_steps process_id dataloader_num_workers neftune_noise_alpha",
    "[-1, 2147483647]": "max_steps local_rank",
    "[0, 4294967295]": "seed data_seed",
    "[1, 99]": "validation_split_percentage",
    "(0, 1000000]": "num_train_epochs",
    "(0, inf)": "adam_epsilon logging_steps eval_steps save_steps",
    "[0, inf)": "learning_rate weight_decay max_grad_norm eval_delay",
    "[0, 1)": "adam_beta1 adam_beta2 label_smoothing_factor dropout_rate",
    "(0, 1]": "mlm_probability final_mlm_probability eval_mlm_probability",
    "[0, 1]": "mask_replace_prob random_replace_prob",
}
# Arguments of the Trainer that do not work here or would have no effect, grouped by the reason.
UNUSABLE = {
    "no test data is read; give it as --validation_file": "do_predict",
    "evaluation keeps sums of loss and hits, and no logits": "batch_eval_metrics eval_do_concat_batches "
    "include_for_metrics label_names prediction_loss_only",
    "the loss is computed in this script": "liger_kernel_config use_liger_kernel",
    "the order of the samples follows from seed and step": "dataloader_in_order ignore_data_skip length_column_name "
    "train_sampling_strategy",
    "a signal always ends the run with a checkpoint": "enable_jit_checkpoint",
    "the Trainer's debugging fails at masks, or at a head without rows": "debug",
}
# Flags that Transformers has dropped, and what to give instead.
FORMER_FLAGS = {
    "adafactor": "--optim",
    "evaluation_strategy": "--eval_strategy",
    "fsdp_min_num_params": "--fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "--fsdp_config",
    "include_tokens_per_second": "nothing, tokens_per_second is always logged",
    "logging_dir": "nothing, logs are in --output_dir",
    "no_cuda": "--use_cpu",
    "per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "push_to_hub_model_id": "--hub_model_id",
    "push_to_hub_token": "--hub_token",
    "save_safetensors": "nothing, weights are always safetensors",
    "torchdynamo": "--torch_compile_backend",
    "warmup_ratio": "--warmup_steps",
}
FILE_FORMATS = "txt", "csv", "tsv", "json", "jsonl", "parquet"
ENCODE_BATCH = 1000  # Number of texts that are joined together, and the most that one call tokenizes.
CALL_LENGTH = 500_000  # Most characters in one call of the tokenizer, which needs about 50 bytes for each.
OVERLAP = 4_000  # Characters that two parts of a longer text share.
SAME_TOKENS = 100  # Tokens that both parts must agree on, on each side of the place where they meet.
WORD_MARKS = "▁", "Ġ", "Ċ", "\n", "<0x0A>"  # Prefixes of tokens that begin with a space or line break.
MAX_DEFAULT_LENGTH = 1024  # Longer tokenizer limits usually mean "no limit", and attention is quadratic.
# Architectures whose position ids start at pad_token_id + 1.
OFFSET_POSITIONS = (
    "camembert data2vec-text esm ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl "
    "xmod"
).split()
MAX_SHAPES = 6  # At most this many padded lengths: the step is compiled for each.
MAX_WORKERS = 4  # Processes that make batches for a GPU unless a flag says how many.
LENGTH_WINDOW = 50  # Batches whose samples `--group_by_length` sorts together.
STREAMED_VALIDATION = 1000  # Validation samples taken from the start of a stream that has no validation data.
CHECKPOINT_NAME = re.compile("checkpoint-[0-9]+")
# Files that a run writes about its model; a run that replaces the model deletes them.
RESULTS = "train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", "README.md"
# Files that an upload sends, besides the vocabulary files of the tokenizer; nothing else in the folder is uploaded.
PUBLISHED = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "training_args.bin", "runs/*events.out.tfevents.*"),
    *("logs/*events.out.tfevents.*", *RESULTS),
)
SECRETS = "token", "use_auth_token", "hub_token"  # Settings that are never written to a file.
HUB_TIMEOUT = 60  # Seconds without an answer after which a request to the hub fails.
MAX_CAUSE = 400  # Characters of a library's message that an error line shows.
IGNORED_LABEL = -100
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT
SECOND_INTERRUPT = 2.0  # Seconds after which a further Ctrl-C ends the program without a checkpoint.
EVAL_EPOCH = 2**63  # No training epoch has this number, so evaluation has its own masks, the same ones every time.
EVAL_SEED = 0  # Independent of --seed, so that runs with different seeds are evaluated with the same masks.
ORDER_KEYS = 2**62  # Above every sample index, so that the order of a block and the masks use different random numbers.


# ---- 1. Arguments ---------------------------------------------------------------------------------------------------
class UserError(Exception):
    """A mistake in the arguments or the input: reported in one line, with exit status 2."""


class InputError(ValueError):
    """A fault that this script finds in its input; `user_errors` adds where that input comes from."""


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer to use, and where to get them."""

    model_name_or_path: Optional[str] = HfArg(default=None, help="Model to start from: a hub name or a folder.")
    model_type: Optional[str] = HfArg(default=None, help=f"Architecture of a new model: {', '.join(MODEL_TYPES)}.")
    config_name: Optional[str] = HfArg(default=None, help="Configuration: a name or a folder (default: the model's).")
    config_overrides: Optional[str] = HfArg(default=None, help="Changes for a new model: hidden_size=128,...")
    tokenizer_name: Optional[str] = HfArg(default=None, help="Tokenizer: a name or a folder (default: the model's).")
    cache_dir: Optional[str] = HfArg(default=None, help="Folder for downloaded models and prepared data sets.")
    use_fast_tokenizer: bool = HfArg(default=True, help="Use the fast (Rust) tokenizer if there is one.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the hub.")
    token: Optional[str] = HfArg(default=None, repr=False, help="Hub token, for private models and data sets.")
    use_auth_token: bool = HfArg(default=False, help="Use the hub token stored by `hf auth login`.")
    new_tokens: Optional[str] = HfArg(default=None, help="File of tokens to add to the tokenizer, one per line.")
    dropout_rate: Optional[float] = HfArg(default=None, help="Every dropout probability of the model.")
    dense_head: bool = HfArg(default=False, help="Compute the vocabulary logits at every position.")

    @property
    def hub_options(self):
        """Keyword arguments of every hub download."""
        return {"cache_dir": self.cache_dir, "token": self.token or (True if self.use_auth_token else None)}

    @property
    def model_options(self):
        """Keyword arguments of `from_pretrained`; code from the hub is never run."""
        return {"revision": self.model_revision, "trust_remote_code": False, **self.hub_options}


@dataclass
class DataTrainingArguments:
    """Which text to use, and how it becomes rows of token ids."""

    dataset_name: Optional[str] = HfArg(default=None, help="Data set: a hub name or a folder.")
    dataset_config_name: Optional[str] = HfArg(default=None, help="Configuration of the data set.")
    train_file: Optional[list[str]] = HfArg(
        default=None, help=f"Training text, files or globs: {', '.join(FILE_FORMATS)}, also compressed (.gz, .zst)."
    )
    validation_file: Optional[list[str]] = HfArg(default=None, help="Validation text, in the same formats.")
    train_ref_file: Optional[str] = HfArg(
        default=None, help="Word references of train_file: per line, a JSON list of positions that continue a word."
    )
    validation_ref_file: Optional[str] = HfArg(default=None, help="Word references of validation_file.")
    text_column_name: Optional[str] = HfArg(default=None, help="Text column (default: text, or else the first one).")
    overwrite_cache: bool = HfArg(default=False, help="Read and tokenize again even if a cached result exists.")
    validation_split_percentage: Optional[int] = HfArg(
        default=5, help="Percentage of the training data used for validation if there is no validation data."
    )
    max_seq_length: Optional[int] = HfArg(default=None, help="Tokens per sample (default: model limit, up to 1024).")
    preprocessing_num_workers: Optional[int] = HfArg(default=None, help="Processes that tokenize.")
    mlm_probability: float = HfArg(default=0.15, help="Share of the tokens to choose and predict.")
    final_mlm_probability: Optional[float] = HfArg(
        default=None, help="Share to mask at the last step, reached linearly (default: mlm_probability)."
    )
    eval_mlm_probability: Optional[float] = HfArg(
        default=None, help="Share to mask in evaluation (default: final_mlm_probability)."
    )
    mask_replace_prob: float = HfArg(default=0.8, help="Share of the chosen tokens that become the mask token.")
    random_replace_prob: float = HfArg(default=0.1, help="Share of the chosen tokens that become a random one.")
    whole_word_mask: bool = HfArg(default=False, help="Mask whole words (needs a fast tokenizer).")
    line_by_line: bool = HfArg(default=LINE_BY_LINE_DEFAULT, help="Make each text a sample instead of joining texts.")
    pad_to_max_length: bool = HfArg(default=False, help="Pad every batch to max_seq_length.")
    streaming: bool = HfArg(default=False, help="Read and tokenize the text during training (needs max_steps).")
    shuffle_buffer_size: int = HfArg(default=10_000, help="With streaming, how many samples are shuffled together.")
    max_train_samples: Optional[int] = HfArg(default=None, help="Use only the first N training samples.")
    max_val_samples: Optional[int] = HfArg(
        default=None, help="Use only the first N validation samples.", aliases=["--max_eval_samples"]
    )

    def __post_init__(self):
        for name in ("train_file", "validation_file"):
            names = file_names(getattr(self, name))
            if len(names) == 1:
                setattr(self, name, names[0])  # One file is a string, as documented.


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's arguments, with the short batch-size names of the Flax script."""

    output_dir: Optional[str] = HfArg(default=None, help="Folder for the model, checkpoints, results and logs.")
    per_device_train_batch_size: int = HfArg(default=8, help="Batch size per device.", aliases=["--train_batch_size"])
    per_device_eval_batch_size: int = HfArg(default=8, help="Evaluation batch size.", aliases=["--eval_batch_size"])
    log_on_each_node: bool = HfArg(default=False, help="Log on each machine, not only on that of process 0.")
    report_to: Optional[list[str]] = HfArg(default=None, help="Where to log: all, tensorboard, wandb, none, ...")
    attn_implementation: Optional[str] = HfArg(default=None, help="Attention: sdpa, flash_attention_2, ...")
    hub_strategy: str = HfArg(default="end", help="When to upload: end, every_save, checkpoint, all_checkpoints.")
    dataloader_num_workers: Optional[int] = HfArg(
        default=None, help="Processes that make batches (default: up to 4 with an NVIDIA or AMD GPU, else none)."
    )
    # The Trainer has dropped these; the original scripts, the Flax script or `xla_spawn` still use them.
    overwrite_output_dir: bool = HfArg(default=False, help="Overwrite the contents of output_dir.")
    group_by_length: bool = HfArg(default=False, help="Group samples of similar length into batches.")
    tpu_num_cores: Optional[int] = HfArg(default=None, help="Number of TPU cores; xla_spawn sets it.")

    def __post_init__(self):
        self.check_usable()
        # The sampler drops the incomplete last step of an epoch; the Trainer would drop batches, in evaluation too.
        self.drop_last_step, self.dataloader_drop_last = self.dataloader_drop_last, False
        self.use_cpu |= not (torch.accelerator.is_available() or is_torch_xla_available())  # Allows --bf16 on a CPU.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else default_workers()
        self.remove_unused_columns = False  # The collator needs the epoch and index of a sample.
        self.logging_nan_inf_filter = False  # `training_step` raises an error instead.
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # Bars would leave fragments in a file.
        self.report_to = self.report_to or ["tensorboard"]  # The Trainer would report nowhere.
        if (self.metric_for_best_model or "").endswith("perplexity") and self.greater_is_better is None:
            self.greater_is_better = False  # To the Trainer, a metric is a score unless it ends in "loss".
        self.old_run, self.named_checkpoints = [], []  # Set by `find_checkpoint`.
        output_dir = self.output_dir
        super().__post_init__()
        self.output_dir = output_dir  # The Trainer would make one up.
        self.accelerator_config.non_blocking |= self.dataloader_pin_memory  # The host does not wait for copies.
        for callback in get_reporting_integration_callbacks(self.report_to):  # Raises for an unknown name,
            callback()  # and for a package that is not installed.
        online = "wandb" in self.report_to and os.environ.get("WANDB_MODE", "online") == "online"
        if online and not importlib.import_module("wandb").api.api_key:
            raise UserError("--report_to wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")
        if self.torch_compile_mode:
            torch.compile(math.sqrt, mode=self.torch_compile_mode)  # Raises for an unknown mode.
        self.check_combinations()

    def check_usable(self):
        """Raise `UserError` for an argument in `UNUSABLE` that is not at its default."""
        for reason, names in UNUSABLE.items():
            for name in names.split():
                value, default = getattr(self, name, None), getattr(type(self), name, None)
                if (value or None) != (default or None):  # The parser's default of an empty list or text is None.
                    raise UserError(f"--{name} does not work here: {reason}")

    def check_combinations(self):
        """Raise `UserError` for mistakes that the Trainer would notice only in the middle of a run."""
        best, metrics, workers = self.metric_for_best_model, mean_metrics(0, 0, 1), self.dataloader_num_workers
        known = best is None or best.removeprefix("eval_") in metrics
        requirements = [
            (known, f"--metric_for_best_model {best} is not one of {', '.join(metrics)}"),
            (self.do_eval or not self.eval_on_start, "--eval_on_start needs --do_eval"),
            (workers or not self.dataloader_persistent_workers, "--dataloader_persistent_workers has no workers"),
            (
                not self.accelerator_config.split_batches,
                "--accelerator_config split_batches does not work here; give the batch size of one device",
            ),
        ]
        for holds, message in requirements:
            if not holds:
                raise UserError(message)

    @property
    def global_batch_size(self):
        """Samples per optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def order_seed(self):
        """Seed of the order of the samples."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def writes_results(self):
        """Whether this process writes to `output_dir`."""
        return (self.do_train or self.do_eval) and self.process_index == 0

    @property
    def device(self):
        """The device. A CPU gets no index, because `torch.load` cannot map a checkpoint to `cpu:1`."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def __getstate__(self):
        return {**vars(self), "hub_token": None, "push_to_hub_token": None}  # Pickled into training_args.bin.


def default_workers():
    """Return the default number of loader workers: none without a GPU, else a few, fewer than there are cores."""
    if not torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_WORKERS, max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


class ArgumentParser(HfArgumentParser):
    """An `HfArgumentParser` that raises `UserError` for invalid and unknown flags; its messages start with `source`."""

    source = ""

    def error(self, message):
        if "--use_auth_token" in message:
            message = "--use_auth_token is true or false; give the token with --token"  # Do not print the token.
        raise UserError(self.source + message)

    def parse_known_args(self, *args, **kwargs):
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        for name, value in vars(namespace).items():
            setattr(namespace, name, expand_home(value))
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {flag}{self.advice(flag)}")
        for interval, names in INTERVALS.items():
            low, high = map(float, interval[1:-1].split(","))
            for flag in (f"--{name}" for name in names.split() if f"--{name}" in self._option_string_actions):
                value = getattr(namespace, self._option_string_actions[flag].dest)
                closed = (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)
                if value is not None and not (low < value < high or closed):
                    self.error(f"{flag} {value} is outside {interval}")
        return namespace, unknown

    def advice(self, flag):
        """Return what to give instead of an unknown flag, as the end of an error message."""
        instead, known = FORMER_FLAGS.get(flag.removeprefix("--")), self._option_string_actions
        if instead and (instead in known or not instead.startswith("--")):
            return f"; instead: {instead}"
        closest = difflib.get_close_matches(flag, known, n=1, cutoff=0.8)
        return f"; did you mean {closest[0]}?" if closest else ""

    def find_wrong_flag(self, values):
        """Return the flag that keeps the argument groups from being made, or "arguments" if no single one does."""
        for name, value in values.items():
            if value != self.get_default(name):
                with contextlib.suppress(Exception):
                    self.parse_dict({**values, name: self.get_default(name)})
                    return f"--{name}"
        return "arguments"


def expand_home(value):
    """Return a setting, or list of them, with a leading ~ replaced by the user's home folder."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def read_json_object(path):
    """Return the content of a JSON file that must hold an object."""
    with user_errors(path), open(path, encoding="utf-8-sig") as file, user_errors(f"{path} is not valid JSON"):
        content = json.load(file)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object, not a {type(content).__name__}")
    return content


def json_flags(path):
    """Return the settings in a JSON file as command-line flags; null leaves a setting at its default."""
    flags = []
    for name, value in read_json_object(path).items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


def parse_args(argv=None):
    """Return the three argument groups from flags, a JSON file, or a JSON file followed by flags that override it.

    `argv` is a list of strings (default: the command line). Raises `UserError` for an unknown or invalid argument.
    """
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    groups = ModelArguments, DataTrainingArguments, TrainingArguments
    parser = ArgumentParser(groups, allow_abbrev=False, description=__doc__.splitlines()[0])
    if argv and argv[0].endswith(".json"):
        flags, parser.source = json_flags(argv[0]), f"{argv[0]}: "
        parser.parse_known_args(flags)  # Its errors name the file.
        argv, parser.source = flags + argv[1:], ""
    values = vars(parser.parse_args(argv))
    try:
        groups = parser.parse_dict(values)
    except Exception:
        with user_errors(parser.find_wrong_flag(values)):
            raise
    given = {name: value for name, value in values.items() if value != parser.get_default(name)}
    groups[2].given = {name: value for name, value in given.items() if name not in SECRETS}  # For the model card.
    check_args(*groups)
    return groups


def check_args(model, data, training):
    """Raise `UserError` for missing or contradictory settings, before loading anything."""
    train_data = data.dataset_name or data.train_file
    files = data.train_file or data.validation_file
    references = data.train_ref_file or data.validation_ref_file
    new_model, known_types = model.config_name or model.model_type, ", ".join(MODEL_TYPES) + OTHER_MODELS
    replaced = data.mask_replace_prob + data.random_replace_prob
    final_share = data.final_mlm_probability or data.mlm_probability
    resumes = (training.resume_from_checkpoint or "").lower() == "true"
    requirements = [
        (training.output_dir, "--output_dir is required; see --help"),
        (model.model_name_or_path or new_model, "no model: give --model_name_or_path, --config_name or --model_type"),
        (model.model_name_or_path or model.tokenizer_name, "a new model needs --tokenizer_name"),
        (not (model.model_name_or_path and model.config_overrides), "--config_overrides is for new models only"),
        (model.model_type in (None, *MODEL_TYPES), f"--model_type {model.model_type}: not one of {known_types}"),
        (data.dataset_name or files, "no data: give --train_file, --validation_file or --dataset_name"),
        (train_data or not training.do_train, "--do_train needs --train_file or --dataset_name"),
        (not (data.dataset_name and files), "use either --dataset_name or --train_file and --validation_file"),
        (0 < replaced <= 1, f"--mask_replace_prob and --random_replace_prob add up to {replaced:g}, outside (0, 1]"),
        (final_share <= data.mlm_probability, f"--final_mlm_probability {final_share} is above --mlm_probability"),
        (data.train_file or not data.train_ref_file, "--train_ref_file needs --train_file"),
        (data.validation_file or not data.validation_ref_file, "--validation_ref_file needs --validation_file"),
        (data.line_by_line or not references, "--train_ref_file and --validation_ref_file need --line_by_line true"),
        (not (references and data.whole_word_mask), "use either --whole_word_mask or reference files"),
        (not (references and data.streaming), "reference files do not work with --streaming"),
        (training.max_steps > 0 or not (data.streaming and training.do_train), "--streaming needs --max_steps"),
        (training.max_steps > 0 or training.max_steps == -1, f"--max_steps {training.max_steps} is not above 0 or -1"),
        (training.do_train or not training.push_to_hub, "--push_to_hub needs --do_train"),
        (
            training.do_train or not training.resume_from_checkpoint,
            "--resume_from_checkpoint needs --do_train; give a checkpoint to evaluate as --model_name_or_path",
        ),
        (
            not (resumes and training.overwrite_output_dir),
            "use either --resume_from_checkpoint true or --overwrite_output_dir, which some configurations set",
        ),
    ]
    for holds, message in requirements:
        if not holds:
            raise UserError(message)
    for name in ("train_file", "validation_file"):
        for path in file_names(getattr(data, name)):
            if not find_files(path):
                raise UserError(f"--{name} {path}: no such file")


@contextlib.contextmanager
def user_errors(subject, kinds=Exception):
    """Turn an exception raised in the block into a `UserError` about `subject`, unless it is a bug of this script."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        if is_bug(error):
            raise
        cause = error.__cause__ or error
        if isinstance(cause, KeyError) or cause.__traceback__ is None:
            cause = error  # The cause would show only a key, or the whole traceback of another process.
        text = str(cause).removeprefix(f"[Errno {getattr(cause, 'errno', None)}]").removesuffix(f": {subject!r}")
        text = text.strip() or type(cause).__name__
        text = text if len(text) <= MAX_CAUSE else f"{text[:MAX_CAUSE]} ..."
        raise UserError(f"{subject}: {text}") from error


def is_bug(error):
    """Return whether a line of this script raised the exception, or one that caused it.

    Libraries raise exceptions about the user's input. A line of this script does so only where it opens or decodes a
    file, or with an `InputError`.
    """
    while error is not None:
        # As text: an exception from another process has no frames.
        trace = "".join(traceback.format_exception(error, chain=False))
        files = re.findall('^ *File "(.+)", line ', trace, re.MULTILINE)
        own = files[-1:] == [is_bug.__code__.co_filename]
        if own and not isinstance(error, (OSError, UnicodeError, InputError)):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def write_errors(folder, what):
    """Turn a failure to write `what` to a folder into a `UserError`, which says so if the disk is full."""
    try:
        with user_errors(f"--output_dir {folder}: {what} cannot be written", (OSError, RuntimeError, SafetensorError)):
            yield
    except UserError as error:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:  # The error itself may not say why.
                file.write(bytes(2**20))
        except OSError as reason:
            if reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(f"{error} (is the disk full?)") from error
        raise


@contextlib.contextmanager
def exit_on_user_error():
    """Print a `UserError` in one line and exit with status 2 (MLM_DEBUG=1: with its traceback)."""
    try:
        yield
    except UserError as error:
        if os.environ.get("MLM_DEBUG") == "1":
            raise
        print_error(error)
        raise SystemExit(2) from None


def print_error(error):
    """Print an error in one line, without what looks like a hub token."""
    line = re.sub("hf_[A-Za-z0-9]{16,}", "hf_...", " ".join(str(error).split()))
    tqdm.write(f"error: {line}", file=sys.stderr)


def is_lost_connection(error):
    """Return whether an operation that needs all processes failed because another process has ended."""
    cause = error.__cause__ or error
    words = re.search("gloo|nccl|remote server shutdown", str(cause), re.IGNORECASE)
    return isinstance(cause, (RuntimeError, ValueError)) and words is not None


# ---- 2. Data --------------------------------------------------------------------------------------------------------
def load_raw_datasets(model_args, data_args):
    """Return {"train", "validation"}, or one of them: data sets or streams with one column, the text.

    Word references are a second column. Without validation data, the first texts of the training data are used: a
    percentage of them or, from a stream, the first samples (see `tokenize_streams`).
    """
    if data_args.dataset_name:
        with user_errors(f"--dataset_name {data_args.dataset_name}"):
            raw = load_named_dataset(model_args, data_args)
    else:
        files = {"train": data_args.train_file, "validation": data_args.validation_file}
        raw = {split: load_files(split, names, model_args, data_args) for split, names in files.items() if names}
    for split, path in (("train", data_args.train_ref_file), ("validation", data_args.validation_ref_file)):
        if path:
            raw[split] = add_word_references(raw[split], path, files[split])
    if "validation" in raw or not raw:
        return raw
    train = raw["train"]
    if data_args.streaming:
        return {"train": train, "validation": train}
    first = round(len(train) * data_args.validation_split_percentage / 100)
    rows = {"train": range(first, len(train)), "validation": range(first)}
    return {split: train.select(part) for split, part in rows.items() if part}


def load_named_dataset(model_args, data_args):
    """Return {"train", "validation"}, or only one of them, of a data set on the hub or in a folder."""
    name, config_name = data_args.dataset_name, data_args.dataset_config_name
    options = {"streaming": data_args.streaming, **model_args.hub_options}
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # Otherwise even local files send a request, to be counted.
    if data_args.overwrite_cache:  # Read the files again, but do not download them again.
        options["download_mode"] = "reuse_cache_if_exists"
    if os.path.isdir(name):
        check_card(name)
        files = sorted(glob.glob(os.path.join(glob.escape(name), "**"), recursive=True))
        # The sizes become part of the cache key, which already has the modification times.
        options["description"] = " ".join(str(os.path.getsize(path)) for path in files if os.path.isfile(path))
    state = os.path.join(name, "state.json")
    if os.path.exists(state):  # One split, as `Dataset.save_to_disk` writes it; it leaves files of an earlier one.
        files = [file["filename"] for file in read_json_object(state)["_data_files"]]
        options["data_files"] = {"train": [os.path.join(glob.escape(name), glob.escape(file)) for file in files]}
        name = "arrow"
    elif os.path.isdir(name):
        config = datasets.load_dataset_builder(name, config_name, cache_dir=model_args.cache_dir).config
        files = {split: config.data_files[split] for split in ("train", "validation") if split in config.data_files}
        if {file_format(path)[0] for paths in files.values() for path in paths} <= set(FILE_FORMATS):
            separator = getattr(config, "sep", None)
            return {split: load_files(split, files[split], model_args, data_args, separator) for split in files}
    raw = datasets.load_dataset(name, config_name, **options)
    return {split: select_text(raw[split], data_args) for split in ("train", "validation") if split in raw}


def check_card(folder):
    """Raise `InputError` if the card of a data set in a folder names files elsewhere, which would be downloaded."""
    for path in (os.path.join(folder, name) for name in ("README.md", ".huggingface.yaml")):
        if os.path.exists(path):
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
            card = next(yaml.safe_load_all(text), None) if path.endswith("yaml") or text.startswith("---") else None
            if "://" in str((card or {}).get("configs")):
                raise InputError(f"{path} names remote files; download them into the folder")


def select_text(raw, data_args):
    """Return a data set with its text column alone; raises `InputError` if that is not text."""
    names = raw.column_names or list(next(iter(raw), {"text": ""}))  # A stream may not know its columns.
    column = choose_text_column(names, data_args.text_column_name)
    kind = raw.features[column] if raw.features else datasets.Value("string")
    if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise InputError(f"the column {column} holds {getattr(kind, 'dtype', kind)}, not text; see --text_column_name")
    return raw.select_columns([column])


def choose_text_column(names, wanted):
    """Return the name of the text column: the one that is wanted, or "text", or else the first one."""
    column = wanted or ("text" if "text" in names else next(iter(names), ""))
    if column not in names:
        raise InputError(f"--text_column_name {column} is not one of the columns {', '.join(names)}")
    return column


def file_names(setting):
    """Return the list of names in a setting such as `--train_file`: None, one name, or a list of them."""
    return [setting] if isinstance(setting, str) else setting or []


def find_files(name):
    """Return the files that a value of `--train_file` stands for: a file, a URL, or all files that match a glob."""
    if "://" in name or os.path.exists(name):
        return [name]
    return [path for path in sorted(glob.glob(name, recursive=True)) if os.path.isfile(path)]


def load_files(split, names, model_args, data_args, separator=None):
    """Return the texts of files, URLs or globs; `separator` is that of the columns of `csv` files."""
    subject = f"--{split}_file {' '.join(file_names(names))}"
    paths = [path for name in file_names(names) for path in find_files(name)]
    if not {file_format(path)[0] for path in paths} <= set(FILE_FORMATS):
        raise UserError(f"{subject}: the formats are {', '.join(FILE_FORMATS)}")
    settings = {"column": data_args.text_column_name, "separator": separator, "token": model_args.token}
    column, full = None, []
    for path in paths:
        first = next(read_texts(path, **settings), None)
        if first is None:
            logger.warning(f"{path} is empty.")
            continue
        full.append(path)
        column = column or first[0]
        if first[0] != column:
            cause = f"the text column of {full[0]} is {column}, that of {path} is {first[0]}"
            raise UserError(f"{subject}: {cause}; see --text_column_name")
    if not full:
        raise UserError(f"{subject}: no text")
    logger.info(f"{subject}: {file_format(full[0])[0]}, text column: {column}")
    read = functools.partial(read_tables, **settings)
    if data_args.streaming:
        return datasets.IterableDataset(ArrowExamplesIterable(read, {"paths": full}), split=datasets.NamedSplit(split))
    with user_errors(subject):
        return cache_texts(read, full, (column, separator), model_args.cache_dir, data_args.overwrite_cache)


def cache_texts(read, paths, settings, cache_dir, overwrite):
    """Return the texts of files as a data set in the cache; write it first if it is missing, or with `overwrite`."""
    folder = os.path.join(cache_dir or datasets.config.HF_DATASETS_CACHE, "texts")
    os.makedirs(folder, exist_ok=True)
    key = datasets.fingerprint.Hasher.hash([settings, [file_fingerprint(path) for path in paths]])
    path = os.path.join(folder, f"{key}.arrow")
    with filelock.FileLock(f"{path}.lock"):
        if overwrite or not os.path.exists(path):
            schema = pa.schema({"text": pa.string()})
            with pa.OSFile(f"{path}.incomplete", "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for _, table in read(paths):
                    writer.write_table(table)
            os.replace(f"{path}.incomplete", path)
        return datasets.Dataset.from_file(path)


def file_fingerprint(path):
    """Return what changes with the content of a file, for the key of the cache."""
    if "://" in path:
        system, name = fsspec.core.url_to_fs(path)
        return path, str(system.info(name))
    status = os.stat(path)
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def file_format(path):
    """Return (format, packing) of a file by its name: ("csv", "gzip") for a.csv.gz."""
    stem, extension = os.path.splitext(path.lower())
    packing = {".gz": "gzip", ".zst": "zstd"}.get(extension)
    return (os.path.splitext(stem)[1] if packing else extension).removeprefix("."), packing


def read_tables(paths, **settings):
    """Yield (key, table) for the texts of files, in order, as `ArrowExamplesIterable` needs it."""
    for path in paths:
        texts = ((text,) for _, text in read_texts(path, **settings))
        for number, part in enumerate(bounded_parts(texts)):
            yield (path, number), pa.table({"text": pa.array([text for (text,) in part], pa.string())})


def bounded_parts(items):
    """Yield lists of items (text, ...), at most `ENCODE_BATCH`; if several, at most `CALL_LENGTH` characters."""
    part, length = [], 0
    for item in items:
        if len(part) == ENCODE_BATCH or (part and length + len(item[0]) > CALL_LENGTH):
            yield part
            part, length = [], 0
        part.append(item)
        length += len(item[0])
    if part:
        yield part


def open_file(path, packing, token):
    """Open a file, local or remote, and unpack it."""
    if "://" not in path:
        return pa.input_stream(path, packing)
    if datasets.config.HF_HUB_OFFLINE:
        raise InputError("not a local file, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set")
    options = {"token": token} if token and path.startswith("hf://") else {}
    return pa.input_stream(fsspec.open(path, "rb", **options).open(), packing)


def read_texts(path, column, separator=None, token=None):
    """Yield (text column, text) for each row of a file; a missing text is an empty one.

    Only the text column is read, and no type is guessed. Raises `UserError` with the file and the line of a mistake.
    """
    kind, packing = file_format(path)
    with user_errors(path), open_file(path, packing, token) as file:
        newline = "" if kind in ("csv", "tsv") else None  # In these formats, a text may contain line breaks.
        lines = None if kind == "parquet" else io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
        if kind == "txt":
            rows = enumerate(({"text": line.removesuffix("\n")} for line in lines), 1)
        elif kind == "parquet":
            rows = read_parquet(file, column)
        elif kind in ("csv", "tsv"):
            rows = read_csv(lines, separator or {"csv": ",", "tsv": "\t"}[kind])
        else:
            rows = read_json(lines)
        name = None
        try:
            for number, row in rows:
                name = choose_text_column(row, column) if name is None else name
                if not column and name != "text" and "text" in row:
                    raise InputError(f"line {number}: the first line has no column text, but this one has")
                text = "" if row.get(name) is None else row[name]
                if not isinstance(text, str):
                    raise InputError(f"line {number}: the column {name} holds {text!s:.40}, not text")
                text.encode()  # Raises for half a character (a lone surrogate), which JSON may hold.
                yield name, text
        except UnicodeEncodeError as error:
            raise InputError(f"line {number}: {error}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 ({error.reason}); convert it: iconv -f ENCODING -t utf-8") from None


def read_csv(file, separator):
    """Yield (line, {column: text}) for each row; in a blank line, all texts are empty."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(file, delimiter=separator, strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            if row and len(row) != len(header):
                raise InputError(f"line {rows.line_num}: {len(row)} fields, but the header has {len(header)}")
            yield rows.line_num, dict(zip(header, row or [""] * len(header)))
    except csv.Error as error:
        raise InputError(f"line {rows.line_num}: {error}") from None


def read_json(file):
    """Yield (line, {column: value}) for each object: one a line, or all in one array.

    An array may also hold the texts themselves; its items are counted in place of lines.
    """
    for first, line in enumerate(file, 1):
        is_array = line.lstrip().startswith("[")
        try:
            rows = json.loads(line + file.read()) if is_array else [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise InputError(f"line {first}: {error}") from None
        for number, row in enumerate(rows, first):
            if is_array and isinstance(row, str):
                row = {"text": row}
            if not isinstance(row, dict):
                raise InputError(f"line {number}: {row!s:.40} is not a JSON object")
            yield number, row


def read_parquet(file, column):
    """Yield (row, {text column: text}) for each row."""
    parquet = pq.ParquetFile(file)
    column = choose_text_column(parquet.schema_arrow.names, column)
    groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
    row_size = sum(group.total_byte_size for group in groups) // max(1, parquet.metadata.num_rows)
    batches = parquet.iter_batches(max(1, min(ENCODE_BATCH, CALL_LENGTH // max(1, row_size))), columns=[column])
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def add_word_references(dataset, path, names):
    """Return the data set with a column "references", from a file whose line i belongs to text i.

    Each row holds the number of the line, followed by the positions on that line.
    """
    references = []
    with user_errors(path):
        lines = read_lines(path)
        while len(lines) > len(dataset) and not lines[-1].strip():
            lines.pop()
        for number, line in enumerate(lines, 1):
            with user_errors(f"{path}, line {number}"):
                positions = json.loads(line.strip() or "[]")
                if not isinstance(positions, list) or any(type(position) is not int for position in positions):
                    raise InputError(f"{line.strip():.40} is not a list of positions")
            references.append([number, *positions])
        if len(lines) != len(dataset):
            raise InputError(f"{len(lines):,} lines for the {len(dataset):,} texts of {' '.join(file_names(names))}")
        return dataset.add_column("references", pa.array(references, pa.list_(pa.int64())))


def read_lines(path):
    """Return the lines of a small file that the user wrote; raises `InputError` unless it is a regular file."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError("not a regular file")
    with open(path, encoding="utf-8-sig") as file:
        return file.read().removesuffix("\n").split("\n")


def needed_splits(raw_datasets, data_args, training_args):
    """Return the splits that training and evaluation read; all of them if the run only tokenizes."""
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval}
    if training_args.do_eval and "train" in raw_datasets and "validation" not in raw_datasets:
        share, texts = data_args.validation_split_percentage, len(raw_datasets["train"])
        remedies = "give --validation_file, raise --validation_split_percentage, or cut long texts into several"
        raise UserError(f"the validation data holds no sample: {share} % of {texts:,} texts is no text; {remedies}")
    return {split: raw for split, raw in raw_datasets.items() if wanted[split] or not any(wanted.values())}


def choose_max_seq_length(data_args, tokenizer, config):
    """Return the tokens per sample: as asked for, within the limits of tokenizer and model (default: at most 1024)."""
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if config.model_type in OFFSET_POSITIONS:
        positions -= 1 + (tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id)
    limit, asked = min(tokenizer.model_max_length, positions), data_args.max_seq_length
    if asked and asked > limit:
        logger.warning(f"--max_seq_length {asked} is more than the model or its tokenizer allows; using {limit}.")
    if asked and asked <= tokenizer.num_special_tokens_to_add():
        raise UserError(f"--max_seq_length {asked} leaves no room for text beside the special tokens")
    return min(asked or MAX_DEFAULT_LENGTH, limit)


def group_texts(values, max_seq_length):
    """Return 1-D values cut into full rows [N, max_seq_length], without the remainder."""
    return values[: len(values) // max_seq_length * max_seq_length].reshape(-1, max_seq_length)


def encode_texts(texts, tokenizer, special_ids, word_starts, line_by_line, max_seq_length):
    """Yield the token rows of a batch of texts, an iterable of (text,), as tables of `input_ids: list<id_type>`.

    Line by line, each non-blank text is a row, truncated; else the texts are joined and cut into full rows, and the
    remainder of the batch is dropped. With `word_starts`, or with references, (text, [line, *positions]), the column
    `continues_word: list<uint8>` is 1 where a token continues the word of the token before. Memory is bounded: the
    tokenizer gets at most `CALL_LENGTH` characters at a time.
    """
    before, after = special_ids
    room = max_seq_length - len(before) - len(after) if line_by_line else sys.maxsize
    remainders = {"input_ids": before[:0], "continues_word": np.zeros(0, np.uint8)}
    kinds = {name: pa.list_(pa.from_numpy_dtype(values.dtype)) for name, values in remainders.items()}

    def complete(values, first_ids, last_ids):
        first = max(0, len(values) - room) if tokenizer.truncation_side == "left" else 0
        return np.concatenate([first_ids, values[first : first + room], last_ids], dtype=values.dtype)

    for part in bounded_parts(texts):
        kept = [item for item in part if not line_by_line or (item[0] and not item[0].isspace())]
        bodies, words = encode_bodies([item[0] for item in kept], tokenizer, word_starts, before.dtype)
        if len(part[0]) == 2:
            words = [reference_flags(item[1], len(before), len(body)) for item, body in zip(kept, bodies)]
        columns = {"input_ids": [complete(body, before, after) for body in bodies]}
        if word_starts is not None or len(part[0]) == 2:
            columns["continues_word"] = [complete(flags, 0 * before, 0 * after) for flags in words]  # 0: special.
        if not line_by_line:
            for name, rows in columns.items():
                joined = np.concatenate([remainders[name], *rows])
                columns[name] = group_texts(joined, max_seq_length)
                remainders[name] = joined[columns[name].size :]
        yield pa.table({name: pa.array(list(rows), kinds[name]) for name, rows in columns.items()})


def text_item(values):
    """Return (text,) or (text, references) of a row; raises `InputError` for a value that is not text."""
    text, *references = values
    if text is not None and not isinstance(text, str):
        raise InputError(f"the text column holds {text!s:.40}, not text; see --text_column_name")
    return text or "", *references


def reference_flags(references, first, length):
    """Return `continues_word` [length] of a text whose first token is at position `first` of the row.

    Raises `InputError` for a position where no word can continue.
    """
    line, *positions = references
    for position in positions:
        if not first < position < first + length:
            tokens = f"the text has {length} tokens, the first one at position {first}"
            raise InputError(f"line {line} of its references: no word continues at position {position}; {tokens}")
    flags = np.zeros(length, np.uint8)
    flags[np.array(positions, int) - first] = 1
    return flags


def encode_bodies(texts, tokenizer, word_starts, id_type):
    """Return two lists by text, without special tokens: ids and, with `word_starts`, `continues_word`."""
    if not tokenizer.is_fast:
        rows = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
        return [np.array(row, id_type) for row in rows], []

    def arrays(encoding):
        ids = np.array(encoding.ids, id_type)
        return [ids] if word_starts is None else [ids, continues_word(ids, encoding.word_ids, word_starts)]

    # The backend is a fifth faster than the tokenizer, which also makes columns not used here.
    backend = tokenizer.backend_tokenizer
    if max(map(len, texts), default=0) > CALL_LENGTH:  # `bounded_parts` puts such a text into a part of its own.
        rows = [encode_long(texts[0], functools.partial(backend.encode, add_special_tokens=False), arrays)]
    else:
        encode = backend.encode_batch_fast if word_starts is None else backend.encode_batch
        rows = [arrays(encoding) for encoding in encode(texts, add_special_tokens=False)]
    return [ids for ids, *_ in rows], [words for _, *more in rows for words in more]


def encode_long(text, encode, arrays):
    """Return `arrays(encoding)` of a long text, encoded in overlapping parts to save memory.

    Two parts meet in the middle of their overlap, if both have the same tokens at the same places on both sides of it.
    Otherwise the text is encoded in one call.
    """
    parts = []
    for start in range(0, len(text) - OVERLAP, CALL_LENGTH - OVERLAP):
        encoding = encode(text[start : start + CALL_LENGTH])
        places = start + np.array([first for first, _ in encoding.offsets], int)
        part = [places, *arrays(encoding)]
        if parts:
            end, begin = (np.searchsorted(columns[0], start + OVERLAP // 2) for columns in (parts[-1], part))
            for before, after in zip(parts[-1], part):
                around = before[end - SAME_TOKENS : end + SAME_TOKENS]
                same = np.array_equal(around, after[begin - SAME_TOKENS : begin + SAME_TOKENS])
                if not same or len(around) < 2 * SAME_TOKENS:
                    return arrays(encode(text))
            parts[-1] = [column[:end] for column in parts[-1]]
            part = [column[begin:] for column in part]
        parts.append(part)
    return [np.concatenate(columns) for columns in zip(*parts)][1:]


def continues_word(ids, words, word_starts):
    """Return uint8 [L]: 1 where a token is of the same word as the one before, and not marked as a start."""
    words = np.array(words, float)  # None, of an added token, becomes NaN, which equals nothing.
    flags = np.zeros(len(ids), np.uint8)
    flags[1:] = (words[1:] == words[:-1]) & ~word_starts[ids[1:]]
    return flags


def find_word_starts(tokenizer):
    """Return for each id whether its token is marked as the start of a word: bool [V].

    Some tokenizers (Llama, Gemma) treat a whole text as one word, but mark the spaces in their tokens.
    """
    if not tokenizer.is_fast:
        raise UserError("--whole_word_mask needs a fast tokenizer; see --use_fast_tokenizer")
    vocabulary = tokenizer.get_vocab()
    word_starts = np.zeros(max(vocabulary.values()) + 1, bool)
    word_starts[[i for token, i in vocabulary.items() if token.startswith(WORD_MARKS)]] = True
    _, (flags,) = encode_bodies(["a a a"], tokenizer, word_starts, "int32")
    if np.count_nonzero(flags == 0) < 3:
        raise UserError("--whole_word_mask: this tokenizer does not tell where words begin")
    return word_starts


def find_word(tokenizer):
    """Return a word that has tokens: "a", or else one of the vocabulary, as some tokenizers drop unknown letters."""
    special = {*tokenizer.all_special_ids}

    def has_tokens(text):
        return bool({*tokenizer(text, add_special_tokens=False)["input_ids"]} - special)

    return "a" if has_tokens("a") else next(filter(has_tokens, sorted(tokenizer.get_vocab())), "a")


def make_encoder(tokenizer, data_args, max_seq_length):
    """Return `encode_texts` for the settings of a run."""
    tokenizer = copy.deepcopy(tokenizer)
    word = find_word(tokenizer)
    # These calls also reset the backend to the settings of the tokenizer, whatever earlier calls have left there.
    text, body = (tokenizer(word, add_special_tokens=special)["input_ids"] for special in (True, False))
    place = next(i for i in range(len(text)) if text[i : i + len(body)] == body)
    id_type = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "int32"
    return functools.partial(
        encode_texts,
        tokenizer=tokenizer,
        special_ids=(np.array(text[:place], id_type), np.array(text[place + len(body) :], id_type)),
        word_starts=find_word_starts(tokenizer) if data_args.whole_word_mask else None,
        line_by_line=data_args.line_by_line,
        max_seq_length=max_seq_length,
    )


def encode_dataset(raw, encode, data_args, description):
    """Return the token rows of a data set of texts, from the cache if it has them.

    Each worker encodes whole batches, so that joined rows do not depend on the number of workers.
    """
    batches = raw.select(range(0, len(raw), ENCODE_BATCH))  # A row per batch; its number is what `map` passes on.
    workers = data_args.preprocessing_num_workers
    return batches.with_format("arrow").map(
        functools.partial(encode_batch, raw=raw.with_format("arrow"), encode=encode),
        with_indices=True,
        batched=True,
        batch_size=1,
        num_proc=min(workers, len(batches)) if workers else None,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=description,
    )


def encode_batch(_, numbers, raw, encode):
    """Return the token rows of one batch of texts; `numbers` is a list that holds the number of the batch."""
    first = numbers[0] * ENCODE_BATCH
    columns = raw[first : first + ENCODE_BATCH].columns
    return pa.concat_tables(encode(text_item(value.as_py() for value in row) for row in zip(*columns)))


def tokenize_datasets(raw_datasets, tokenizer, data_args, max_seq_length, training_args=None):
    """Return {split: TokenizedDataset}, tokenized once and then cached; a training stream is a `StreamedDataset`."""
    encode = make_encoder(tokenizer, data_args, max_seq_length)
    if data_args.streaming:
        return tokenize_streams(raw_datasets, encode, data_args, training_args)
    tokenized = {}
    for split, raw in raw_datasets.items():
        limit = data_args.max_train_samples if split == "train" else data_args.max_val_samples
        source = data_args.dataset_name or getattr(data_args, f"{split}_file") or data_args.train_file
        if not len(raw):
            continue  # `check_samples` reports it.
        with user_errors(f"the {split} data of {' '.join(file_names(source))}"):
            rows = encode_dataset(raw, encode, data_args, f"Tokenizing the {split} data")
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        tokenized[split] = TokenizedDataset(rows, fixed_masks=split == "validation")
        log_data(split, f"{len(raw):,} texts", rows, tokenizer)
    return tokenized


def tokenize_streams(streams, encode, data_args, training_args):
    """Return {"train": StreamedDataset, "validation": TokenizedDataset}; the validation data is held in memory.

    If there is none, the first samples of the training data are held out for it.
    """
    tokenized, used = {}, 0
    if "validation" in streams:
        shared = streams["validation"].split == "train"
        wanted = data_args.max_val_samples or (STREAMED_VALIDATION if shared else sys.maxsize)
        read = [row for _, row in itertools.islice(read_rows(streams["validation"], encode), wanted)]
        if read:
            rows = pa.table({name: [row[name] for row in read] for name in read[0]})
            tokenized["validation"] = TokenizedDataset(datasets.Dataset(rows), fixed_masks=True)
            log_data("validation", "a stream", tokenized["validation"].dataset, encode.keywords["tokenizer"])
        if shared:
            logger.info(f"The first {len(read):,} samples of the stream are for validation and not for training.")
            used = len(read)
    if "train" in streams:
        tokenized["train"] = StreamedDataset(streams["train"], encode, data_args, training_args, used)
    return tokenized


def read_rows(stream, encode, state=None, skip=0):
    """Yield ({"raw": state, "skip": number}, row) for the token rows of a stream, starting at row `skip` after `state`.

    Each yielded state precedes the batch of texts in which the row has that number.
    """
    stream = copy.deepcopy(stream)
    stream.load_state_dict(state)
    texts = (text_item(example.values()) for example in stream)
    with user_errors(f"the streamed {stream.split} data"):
        for first in texts:
            tables = encode(itertools.chain([first], itertools.islice(texts, ENCODE_BATCH - 1)))
            for number, row in enumerate(row for table in tables for row in table_rows(table)):
                if skip > 0:
                    skip -= 1
                else:
                    yield {"raw": state, "skip": number}, row
            state = stream.state_dict()


def log_data(split, source, rows, tokenizer):
    """Log the size of a tokenized split and its share of unknown tokens."""
    ids = pc.list_flatten(rows.data.column("input_ids"))
    unknown = pc.sum(pc.equal(ids, pa.scalar(tokenizer.unk_token_id, ids.type))).as_py() or 0  # Null: it has none.
    size = f"{source}, {len(rows):,} samples, {len(ids):,} tokens"
    logger.info(f"{split}: {size} ({unknown / max(1, len(ids)):.2%} unknown)")


def check_samples(tokenized, training_args):
    """Raise `UserError` if a split that is needed is missing or too small."""
    for split, wanted in (("train", training_args.do_train), ("validation", training_args.do_eval)):
        if wanted and not len(tokenized.get(split, ())):
            raise UserError(f"the {split} data holds no sample; see --max_seq_length and --line_by_line, or add text")
    samples, size = len(tokenized.get("train", ())), training_args.global_batch_size
    if training_args.do_train and training_args.drop_last_step and samples < size:
        remedies = "--train_batch_size, --gradient_accumulation_steps or --dataloader_drop_last false"
        raise UserError(f"the train data has fewer samples ({samples}) than a step ({size}): see {remedies}")


def check_masks(dataset, collator):
    """Raise `UserError` if no token of the validation data is masked: evaluation would report a loss of 0."""
    if dataset and all((collator.mask(dataset[i])[1] == IGNORED_LABEL).all() for i in range(len(dataset))):
        raise UserError("no token of the validation data is masked: raise --eval_mlm_probability, or add text")


class SampleKey(NamedTuple):
    """A sample, epoch, training progress (0 to 1), and whether it has labels: with the seed, these give the masks."""

    index: int
    epoch: int = 0
    progress: float = 0.0
    labelled: bool = True


def fill_up(keys, size):
    """Return `size` keys: missing ones repeat the first key, without labels, so that each sample counts only once."""
    return keys + [keys[0]._replace(labelled=False)] * (size - len(keys))


class TokenizedDataset:
    """Tokenized samples, which are read by a `SampleKey` or an index.

    With `fixed_masks` the epoch is a constant: every evaluation masks the same tokens.
    """

    def __init__(self, dataset, fixed_masks=False):
        self.dataset, self.fixed_masks = dataset.with_format("arrow"), fixed_masks

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, keys):
        """Return the samples: {"input_ids": int [L], "epoch", "index", "progress", "labelled"}, and other columns."""
        keys = [key if isinstance(key, SampleKey) else SampleKey(int(key)) for key in keys]
        rows = table_rows(self.dataset[[key.index for key in keys]])
        epoch = {"epoch": EVAL_EPOCH} if self.fixed_masks else {}
        return [{**row, **key._asdict(), **epoch} for row, key in zip(rows, keys)]

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    @functools.cached_property
    def lengths(self):
        """The number of tokens of each sample: int [N]."""
        return pc.list_value_length(self.dataset.data.column("input_ids")).to_numpy()


def table_rows(table):
    """Yield the rows of an Arrow table as {column: value}; a list becomes a NumPy array."""
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    for i in range(len(table)):
        row = {name: column[i] for name, column in columns.items()}
        yield {
            name: value.values.to_numpy() if isinstance(value, pa.ListScalar) else value.as_py()
            for name, value in row.items()
        }


class StreamedDataset:
    """Samples that are tokenized while training reads them, pass after pass, shuffled in blocks.

    A sampler yields samples, not keys: `dataset[sample]` is the sample. Order and masks depend on (seed, pass, row)
    alone. `blocks` says where the latest blocks begin, for checkpoints: "first" counts from the run, "row" the pass.
    """

    def __init__(self, raw, encode, data_args, args, used=0):
        self.raw, self.encode, self.data_args, self.args = raw, encode, data_args, args
        self.beginning = {"row": 0, "raw": None, "skip": used}  # Of each pass.
        self.start({"first": 0, "epoch": 0, **self.beginning})
        self.num_samples = self.num_tokens = 0  # Read so far.
        self.lengths = np.zeros(1, int)  # Of the samples of the latest block.

    def __len__(self):
        return self.args.max_steps * self.args.global_batch_size

    def __getitem__(self, sample):
        return sample

    def start(self, block):
        """Begin to read at a block."""
        self.first_block, self.blocks = block, [block]

    def samples(self, seed, first):
        """Yield the samples of the run from number `first` on, pass after pass without end."""
        block = self.first_block
        self.blocks = []
        while True:
            left = max(0, (self.data_args.max_train_samples or sys.maxsize) - block["row"])
            rows = itertools.islice(read_rows(self.raw, self.encode, block["raw"], block["skip"]), left)
            while read := list(itertools.islice(rows, self.data_args.shuffle_buffer_size)):
                block = {"batch": self.args.global_batch_size, **block, **read[0][0]}  # Or as saved.
                self.blocks.append(block)
                self.lengths = np.array([len(row["input_ids"]) for _, row in read])
                self.num_samples += len(read)
                self.num_tokens += self.lengths.sum()
                order = sample_generator(seed, block["epoch"], ORDER_KEYS + block["row"]).permutation(len(read))
                if self.args.group_by_length:
                    order = group_by_length(order, self.lengths, block["batch"])
                for place in range(max(0, first - block["first"]), len(read)):
                    key = {"epoch": block["epoch"], "index": block["row"] + int(order[place])}
                    yield {**key, **read[order[place]][1]}
                block = {**block, "first": block["first"] + len(read), "row": block["row"] + len(read)}
                del block["batch"]
            if not block["row"]:
                remedies = "give more text, or lower --max_seq_length, or --max_val_samples"
                raise UserError(f"the train data holds no sample: {remedies}")
            block = {**block, "epoch": block["epoch"] + 1, **self.beginning}

    def forget_blocks_before(self, number):
        """Forget the blocks before the one that holds sample `number`, which is then the first of `blocks`."""
        while len(self.blocks) > 1 and self.blocks[1]["first"] <= number:
            self.blocks.pop(0)


def group_by_length(order, lengths, batch_size):
    """Sort an order by length within windows of some batches, so that each batch holds samples of similar length."""
    windows = np.split(order, range(LENGTH_WINDOW * batch_size, len(order), LENGTH_WINDOW * batch_size))
    return np.concatenate([window[np.argsort(-lengths[window], kind="stable")] for window in windows])


class Position(NamedTuple):
    """A place in the training data: the epoch, how many of its samples are trained, and the batch size of its order."""

    epoch: int
    sample: int
    batch_size: int


class RunPlan:
    """Which samples each optimizer step of a run trains on: a function of data, arguments and the step alone.

    An epoch is a pass over the samples; a stream is one epoch without end. `start` is where this command begins,
    after `first_step` steps. Those may have had another batch size, so the position counts samples.
    """

    def __init__(self, dataset, args, first_step=0, start=None):
        self.dataset, self.args = dataset, args
        self.is_stream, self.batch_size = isinstance(dataset, StreamedDataset), args.global_batch_size
        self.first_step, self.start = 0, Position(0, 0, self.batch_size)
        if first_step:
            epoch, sample, batch_size = start or self.position(first_step)
            self.first_step = first_step
            self.start = Position(epoch, sample, batch_size if sample else self.batch_size)
        self.num_steps = args.max_steps
        if self.num_steps <= 0:  # Given in epochs; earlier steps count as if they had used this batch size.
            left = math.ceil(args.num_train_epochs * self.steps_per_epoch) - self.start.epoch * self.steps_per_epoch
            done = self.steps_per_epoch - self.steps_left(self.start)
            self.num_steps = self.first_step + left - done

    @property
    def steps_per_epoch(self):
        """Optimizer steps of one pass over the training data."""
        return self.steps_left(Position(self.start.epoch + 1, 0, self.batch_size))

    def steps_left(self, position):
        """Optimizer steps from a position to the end of its epoch; with `drop_last_step`, complete ones alone."""
        if self.is_stream:
            return sys.maxsize
        if not self.args.drop_last_step:
            return max(0, math.ceil((len(self.dataset) - position.sample) / self.batch_size))
        size = len(self.dataset) // position.batch_size * position.batch_size
        return max(0, (size - position.sample) // self.batch_size)

    def position(self, step):
        """Return the position after a step; at the end of an epoch, that is the beginning of the next one."""
        steps, left = step - self.first_step, self.steps_left(self.start)
        if steps < left:
            return self.start._replace(sample=self.start.sample + steps * self.batch_size)
        epochs, steps = divmod(steps - left, self.steps_per_epoch)
        return Position(self.start.epoch + 1 + epochs, steps * self.batch_size, self.batch_size)

    def num_samples(self, step):
        """Return how many samples this command has trained on after a step; an incomplete step has fewer."""
        if self.is_stream or self.args.drop_last_step:  # All steps are complete.
            return (step - self.first_step) * self.batch_size
        position = self.position(step)
        return (position.epoch - self.start.epoch) * len(self.dataset) + position.sample - self.start.sample

    def epoch(self, step):
        """Return the passes over the training data after a step; for a stream, the share of the run that is done."""
        if self.is_stream:
            return step / self.num_steps
        position = self.position(step)
        return position.epoch + 1 - self.steps_left(position) / self.steps_per_epoch

    def ends_epoch(self, step):
        """Return whether a step is the last one of an epoch, or of the run."""
        return step == self.num_steps or (step > 0 and self.position(step).sample == 0)

    def steps(self):
        """Yield the keys, or the samples of a stream, of each optimizer step to come: `batch_size` of them."""
        last = max(1, self.num_steps - 1)
        if self.is_stream:
            samples = self.dataset.samples(self.args.order_seed, self.start.sample)
            for step in range(self.first_step, self.num_steps):
                yield [{**sample, "progress": step / last} for sample in itertools.islice(samples, self.batch_size)]
            return
        epoch = order = None
        for step in range(self.first_step, self.num_steps):
            position = self.position(step)
            if position.epoch != epoch:
                epoch, order = position.epoch, epoch_order(self.dataset, self.args, position)
            indices = order[position.sample : position.sample + self.batch_size].tolist()
            keys = [SampleKey(index, epoch, step / last) for index in indices]
            yield fill_up(keys, self.batch_size)


def epoch_order(dataset, args, position):
    """Return the indices of the samples of an epoch in training order: int64 [N].

    With `drop_last_step`, the samples of an incomplete last step are dropped before the order is sorted by length.
    """
    order, size = epoch_permutation(args.order_seed, position.epoch, len(dataset)), position.batch_size
    if args.drop_last_step:
        order = order[: len(order) // size * size]
    return group_by_length(order, dataset.lengths, size) if args.group_by_length else order


def epoch_permutation(seed, epoch, num_samples):
    """Return the order of an epoch's samples: int64 [N], equal to `jax.random.permutation` in run_mlm_flax.py.

    JAX sorts by random keys, often enough that ties do not matter; here, NumPy runs the same generator.
    """
    pair = np.zeros(2, np.uint32), np.arange(2, dtype=np.uint32)
    key = np.concatenate(threefry(np.uint32([0, seed]), np.uint32([0]), np.uint32([epoch])))
    order = np.arange(num_samples)
    for _ in range(math.ceil(3 * math.log(max(1, num_samples)) / math.log(2**32 - 1))):
        key, subkey = np.stack(threefry(key, *pair), axis=1)
        high, low = threefry(subkey, np.zeros(num_samples, np.uint32), np.arange(num_samples, dtype=np.uint32))
        order = order[np.argsort(high ^ low, kind="stable")]
    return order


def threefry(key, high, low):
    """Return the Threefry-2x32 hash, 20 rounds, of uint32 counters (Salmon et al. 2011), as JAX draws random bits."""
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


# ---- 3. Masking -----------------------------------------------------------------------------------------------------
def sample_generator(seed, epoch, index):
    """Return the random generator of a sample in an epoch: the same one wherever and whenever it is asked for."""
    return np.random.default_rng((seed, epoch, index))


def mask_tokens(
    input_ids,
    special_tokens_mask,
    generator,
    mask_token_id,
    vocab_size,
    mlm_probability=0.15,
    mask_replace_prob=0.8,
    random_replace_prob=0.1,
    continues_word=None,
):
    """Choose the tokens of a sample to predict and hide most of them (BERT, Devlin et al. 2019, section 3.1).

    `input_ids: int [L]`, `special_tokens_mask: bool [L]` (never chosen). A chosen token becomes the mask token, a
    random one, or stays. With `continues_word: bool [L]`, a word is chosen if its first token is. Returns (inputs,
    labels), both int32 [L]; labels are -100 where nothing was chosen.
    """
    chosen = generator.random(len(input_ids)) < mlm_probability
    if continues_word is not None:
        word_start = np.maximum.accumulate(np.where(continues_word, 0, np.arange(len(input_ids))))
        chosen = chosen[word_start]
    positions = np.flatnonzero(chosen & ~special_tokens_mask)
    inputs, labels = input_ids.astype(np.int32), np.full(len(input_ids), IGNORED_LABEL, np.int32)
    labels[positions] = inputs[positions]
    action, token = generator.random((2, len(positions)))
    random_ids = (token * vocab_size).astype(np.int32)
    visible = np.where(action < mask_replace_prob + random_replace_prob, random_ids, inputs[positions])
    inputs[positions] = np.where(action < mask_replace_prob, mask_token_id, visible)
    return inputs, labels


@dataclass
class MaskingCollator:
    """Pads samples into one batch and masks it, in NumPy.

    A sample's masks depend only on (seed, epoch, index), their share also on its "progress" in the run, from 0 to 1;
    batch, worker, device and restart do not matter. Samples without an index are numbered in the order they come in.
    """

    tokenizer: PreTrainedTokenizerBase
    mlm: bool = True
    mlm_probability: float = 0.15
    final_mlm_probability: Optional[float] = None
    eval_mlm_probability: Optional[float] = None
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.mlm and self.tokenizer.mask_token is None:
            raise ValueError("the tokenizer has no mask token, which masked language modeling needs")
        self.samples_seen = 0
        self.vocab_size, self.mask_token_id = len(self.tokenizer), self.tokenizer.mask_token_id
        self.is_special = np.zeros(max(self.tokenizer.get_vocab().values()) + 1, bool)
        # Never masked: what the tokenizer adds to every text, and padding. Unknown words are masked like other words.
        empty = self.tokenizer("", return_special_tokens_mask=True)
        special = {i for i, added in zip(empty["input_ids"], empty["special_tokens_mask"]) if added}
        self.is_special[list(special | {self.tokenizer.pad_token_id} - {None})] = True

    def collate(self, samples, pad_to_multiple_of=None, length=0):
        """Return {"input_ids", "attention_mask", "labels"}, each int32 [B, L], with L at least `length`."""
        rows = [self.mask(sample) for sample in samples]
        length = max(length, *(len(inputs) for inputs, _ in rows))
        length += -length % (pad_to_multiple_of or 1)
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0, "labels": IGNORED_LABEL}
        batch = {name: np.full((len(rows), length), value, np.int32) for name, value in padding.items()}
        for i, (sample, (inputs, labels)) in enumerate(zip(samples, rows)):
            place = slice(-len(inputs), None) if self.tokenizer.padding_side == "left" else slice(len(inputs))
            batch["input_ids"][i, place], batch["labels"][i, place] = inputs, labels
            batch["attention_mask"][i, place] = sample.get("attention_mask", 1)
        return batch

    def probability(self, epoch, progress=0.0):
        """Return the share of tokens to choose: it falls in training (Ankner et al. 2023); evaluation has its own."""
        final = self.final_mlm_probability or self.mlm_probability
        if epoch == EVAL_EPOCH:
            return self.eval_mlm_probability or final
        return self.mlm_probability + (final - self.mlm_probability) * progress

    def mask(self, sample):
        """Return (inputs, labels), both int32 [L], of a sample {"input_ids", "epoch", "index"}."""
        ids, epoch = np.asarray(sample["input_ids"]), sample.get("epoch", 0)
        if not self.mlm:
            return ids, np.where(ids == self.tokenizer.pad_token_id, IGNORED_LABEL, ids)
        index, self.samples_seen = sample.get("index", self.samples_seen), self.samples_seen + 1
        continues_word = sample.get("continues_word")
        inputs, labels = mask_tokens(
            ids,
            np.asarray(sample.get("special_tokens_mask", self.is_special[ids]), bool),
            sample_generator(EVAL_SEED if epoch == EVAL_EPOCH else self.seed, epoch, index),
            self.mask_token_id,
            self.vocab_size,
            self.probability(epoch, sample.get("progress", 0.0)),
            self.mask_replace_prob,
            self.random_replace_prob,
            None if continues_word is None else np.asarray(continues_word, bool),
        )
        return inputs, labels if sample.get("labelled", True) else np.full_like(labels, IGNORED_LABEL)


@dataclass
class MaskedLMCollator(MaskingCollator, DataCollatorForLanguageModeling):
    """The stock collator with reproducible masks. It pads batches to at least `length`.

    With `few_shapes`, it pads them to one of few lengths up to `max_seq_length`. With `compact`, it leaves out what a
    step does not need: the mask of a batch without padding, and the positions without a label. With `fill_slots`, it
    keeps so many of these that their number K, with the labelled ones, is the same for almost every batch.
    """

    length: int = 0
    max_seq_length: Optional[int] = None
    few_shapes: bool = False
    compact: bool = False
    fill_slots: bool = False

    def __call__(self, examples, return_tensors=None):
        """Return int64 tensors {"input_ids", "attention_mask", "labels"} [B, L], or "labels" and "positions" [K]."""
        length = self.length
        if self.few_shapes:
            longest = max(len(sample["input_ids"]) for sample in examples)
            length = max(length, padded_length(longest, self.max_seq_length))
        batch = self.collate(examples, self.pad_to_multiple_of, length)
        if self.compact:
            if batch["attention_mask"].all() and not self.few_shapes:
                del batch["attention_mask"]  # Models would check whether it hides anything, and wait for the device.
            slots = int((batch["labels"] != IGNORED_LABEL).sum())
            if self.fill_slots:
                slots = label_slots(batch["labels"], self.probability(examples[0].get("epoch", 0)))
            batch |= select_labels(batch["labels"], slots)
        return {name: torch.from_numpy(array).long() for name, array in batch.items()}


def padded_length(longest, max_seq_length):
    """Return the length that a batch is padded to: one of at most `MAX_SHAPES`, as the step is compiled for each."""
    multiple = 8 * math.ceil(max_seq_length / MAX_SHAPES / 8)
    return min(max_seq_length, multiple * math.ceil(longest / multiple))


def label_slots(labels, probability):
    """Return K, the slots for the labels [..., B, L]. It rarely changes: each K compiles the step again."""
    tokens = labels.shape[-2] * labels.shape[-1]
    expected = tokens * probability
    # Five standard deviations above the expected number if tokens are chosen independently (spans of tokens would need
    # more), or a multiple of that if there are more labels.
    slots = 8 * math.ceil((expected + 5 * math.sqrt(expected * (1 - probability))) / 8)
    most = int((labels >= 0).sum((-2, -1)).max())
    return min(tokens, slots * max(1, math.ceil(most / slots)))


def select_labels(labels, slots):
    """Return {"positions" in B * L, "labels"}, int32 [..., K]: those with a label first, then others; K is `slots`."""
    flat = labels.reshape(-1, labels.shape[-2] * labels.shape[-1])
    positions = np.argsort(flat < 0, axis=1, kind="stable")[:, :slots].astype(np.int32)
    selected = {"positions": positions, "labels": np.take_along_axis(flat, positions, 1)}
    return {name: array.reshape(*labels.shape[:-2], slots) for name, array in selected.items()}


# ---- 4. Model -------------------------------------------------------------------------------------------------------
def load_tokenizer(model_args):
    """Return the tokenizer; raises `UserError` if it has no mask token."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if not os.path.exists(name) and os.path.isdir(os.path.dirname(name)):
        logger.warning(f"There is no folder {name}; looking for it on the hub.")
    with user_errors(f"the tokenizer {name}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=model_args.use_fast_tokenizer, **model_args.model_options
        )
    if tokenizer.mask_token is None:
        raise UserError(f"the tokenizer {name} has no mask token; choose another with --tokenizer_name")
    return tokenizer


def add_new_tokens(tokenizer, path):
    """Add the tokens in a file, one per line, that the tokenizer lacks; return {new id: ids of its old pieces}."""
    if path is None:
        return {}
    with user_errors(f"--new_tokens {path}"):
        lines = read_lines(path)
    if getattr(tokenizer, "do_lower_case", False):
        lines = [line.lower() for line in lines]
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    spellings = {}
    for token in filter(None, map(str.strip, lines)):
        # Spellings that the tokenizer normalizes to one, such as "Café" and "cafe", are one token.
        spellings.setdefault(normalizer.normalize_str(token) if normalizer else token, token)
    tokens = list(spellings.values())
    if not tokens:
        raise UserError(f"--new_tokens {path}: holds no token")
    pieces, vocabulary, last_id = {}, tokenizer.get_vocab(), max(tokenizer.get_vocab().values())
    for token in tokens:  # With a space before it, as inside a sentence, the token may be known to a BPE tokenizer.
        forms = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (token, f" {token}")]
        known = token in vocabulary or any(len(ids) == 1 and ids[0] != tokenizer.unk_token_id for ids in forms)
        if forms[0] and not known:
            pieces[token] = forms[0]
    # Chinese and Japanese (from U+3040 to U+9FFF) have no spaces around words.
    spaced = {token: not any("\u3040" <= char <= "\u9fff" for char in token) for token in pieces}
    tokenizer.add_tokens([transformers.AddedToken(token, single_word=spaced[token], lstrip=True) for token in pieces])
    logger.info(f"new tokens: {len(pieces):,} added, {len(tokens) - len(pieces):,} known")
    found = {max(tokenizer(token, add_special_tokens=False)["input_ids"]): ids for token, ids in pieces.items()}
    return {new_id: ids for new_id, ids in found.items() if new_id > last_id}  # The highest id is the new one.


def token_axes(model, size):
    """Return (a new model for `size` tokens, {weight: the axis that has a row per token})."""
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = size
    other = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    shapes = {name: zip(values.shape, model.state_dict()[name].shape) for name, values in other.state_dict().items()}
    return other, {name: i for name, pairs in shapes.items() for i, (new, old) in enumerate(pairs) if new != old}


def add_rows(model, size):
    """Return the model with a row for each of `size` tokens: added rows are the mean of the others, biases 0."""
    larger, axes = token_axes(model, size)
    values = larger.state_dict()
    for name, old in model.state_dict().items():
        if name in axes and old.ndim > 1:
            values[name][:] = old.mean(axes[name], keepdim=True)
        values[name][tuple(map(slice, old.shape))] = old
    return larger


def fill_new_rows(model, new_tokens):
    """Set the rows of new tokens, in all weights with a row per token, to the mean of the rows of their pieces."""
    with torch.device("meta"):  # Shapes alone.
        _, axes = token_axes(model, model.config.get_text_config().vocab_size + 1)
    for name, axis in axes.items():
        rows = model.state_dict()[name].movedim(axis, 0)
        for new_id, pieces in new_tokens.items():
            rows[new_id] = rows[pieces].mean(0)


def log_new_tokens(new_tokens, dataset):
    """Log by how many tokens the new ones shorten the training text."""
    if new_tokens and isinstance(dataset, TokenizedDataset):
        ids = pc.list_flatten(dataset.dataset.data.column("input_ids")).to_numpy()
        counts = np.bincount(ids, minlength=max(new_tokens) + 1)
        saved = sum(int(counts[new_id]) * (len(pieces) - 1) for new_id, pieces in new_tokens.items())
        logger.info(f"new tokens: the training text has {saved:,} tokens fewer ({saved / (len(ids) + saved):.2%})")


def set_dropout(config, rate):
    """Set every dropout probability of a configuration."""
    for name, value in config.to_dict().items():
        if "dropout" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, rate)


def load_config(model_args, tokenizer):
    """Return the model's own configuration, or that of a new model for this tokenizer, with all overrides applied."""
    name = model_args.config_name or model_args.model_name_or_path
    with user_errors(f"the configuration {name or model_args.model_type}"):
        if name:
            config = AutoConfig.from_pretrained(name, **model_args.model_options)
        else:
            config = CONFIG_MAPPING[model_args.model_type]()
        if model_args.config_overrides:
            with user_errors(f"--config_overrides {model_args.config_overrides}"):
                config.update_from_string(model_args.config_overrides)
            if len(getattr(config, "layer_types", None) or ()) not in (0, config.num_hidden_layers):
                config = type(config)(**{**config.to_dict(), "layer_types": None})  # Computed again for the new number.
    if config.model_type not in MODEL_TYPES:
        known = f"{', '.join(MODEL_TYPES)}{OTHER_MODELS}"
        raise UserError(f"{name}: {config.model_type} has no masked-LM model here; known: {known}")
    if model_args.model_type not in (None, config.model_type):
        raise UserError(f"--model_type {model_args.model_type}: {name} is of type {config.model_type}")
    if model_args.dropout_rate is not None:
        set_dropout(config, model_args.dropout_rate)
    vars(config).pop("auto_map", None)  # It names code in the model folder, which is neither run nor copied.
    if not model_args.model_name_or_path:
        text_config = config.get_text_config()  # The text part, if the model also takes images.
        text_config.vocab_size = max(tokenizer.get_vocab().values()) + 1
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(tokenizer, key) is not None:
                setattr(text_config, key, getattr(tokenizer, key))
    return config


def read_tensorflow_weights(path):
    """Return {PyTorch name: array} of an original TensorFlow checkpoint of BERT, without its optimizer state."""
    try:
        from tensorflow import train
    except ImportError:
        raise InputError("TensorFlow, which reads .ckpt files, is missing (pip install tensorflow-cpu)") from None
    kinds = {"kernel": "weight", "gamma": "weight", "beta": "bias", "output_weights": "weight", "output_bias": "bias"}
    reader, weights = train.load_checkpoint(path), {}
    for name in reader.get_variable_to_shape_map():
        *modules, kind = re.sub(r"layer_(\d+)", r"layer/\1", name).split("/")
        if not modules or kind in ("adam_m", "adam_v"):
            continue
        value = reader.get_tensor(name)
        kind = f"{kind}.weight" if kind.endswith("_embeddings") else kinds.get(kind, kind)
        weights[".".join([*modules, kind])] = value.T if name.endswith("/kernel") else value
    return weights


def load_model(model_args, config, tokenizer, training_args, new_tokens=None):
    """Return the masked-LM model, pretrained or with random weights, with the vocabulary of the tokenizer."""
    name, attention = model_args.model_name_or_path, training_args.attn_implementation
    overrides = f" with --config_overrides {model_args.config_overrides}" if model_args.config_overrides else ""
    options = {"dtype": torch.float32, **({"attn_implementation": attention} if attention else {})}
    with user_errors(f"the model {name or config.model_type}{overrides}"), torch.no_grad():
        if not name:
            model = AutoModelForMaskedLM.from_config(config, **options)
        elif ".ckpt" in os.path.basename(name) and not os.path.isdir(name):
            model = load_tensorflow_model(name.removesuffix(".index"), config)
        else:
            options |= {"output_loading_info": True, **model_args.model_options}
            model, info = AutoModelForMaskedLM.from_pretrained(name, config=config, **options)
            if not model.state_dict().keys() - info["missing_keys"]:
                raise InputError("its files hold no weight of this architecture")
        if (size := max(tokenizer.get_vocab().values()) + 1) > model.config.get_text_config().vocab_size:
            model = add_rows(model, size)
        if new_tokens:
            fill_new_rows(model, new_tokens)
    return model


def load_tensorflow_model(path, config):
    """Return the model of an original TensorFlow checkpoint; raises `InputError` for one that is not of a BERT."""
    weights = {name: torch.from_numpy(value) for name, value in read_tensorflow_weights(path).items()}
    model = AutoModelForMaskedLM.from_config(config)
    missing = [name for name in model.load_state_dict(weights, strict=False).missing_keys if ".decoder." not in name]
    if missing:
        raise InputError(f"these weights are missing: {', '.join(missing)}")
    return model


# ---- 5. Training ----------------------------------------------------------------------------------------------------
class StepSampler(torch.utils.data.Sampler):
    """Yields the samples of the remaining steps of a `RunPlan`: keys or, from a stream, the samples themselves."""

    def __init__(self, plan):
        self.plan = plan

    def __len__(self):
        return self.plan.num_steps * self.plan.batch_size  # Those of the whole run: the Trainer counts steps from 0.

    def __iter__(self):
        return itertools.chain.from_iterable(self.plan.steps())


@contextlib.contextmanager
def blocked_signals():
    """Block SIGTERM and Ctrl-C within the block, and for good in the processes that are forked there."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def model_inputs(model, batch):
    """Return what the model takes of a batch, without the labels: the loss is computed here."""
    return {name: batch[name] for name in input_names(type(model.config)) if name in batch}


@functools.cache
def input_names(config_class):
    """Return the names of the inputs of the masked-LM model for a configuration class, without "labels"."""
    names = inspect.signature(MODEL_FOR_MASKED_LM_MAPPING[config_class].forward).parameters
    return [name for name in names if name != "labels"]


class SparseHead:
    """From one place in a model on, keeps only the hidden states [1, K, H] at the positions given to `at`.

    `start` is "encoder": after the encoder, so that only the head is sparse; or "layer": after the last attention.
    Raises `InputError` for a model without this place. The hook stays, so that the compiler sees one model.
    """

    def __init__(self, model, start):
        self.positions = self.shape = None
        if start == "layer":
            last = f".{getattr(model.config, 'num_hidden_layers', 0) - 1}.attention.output"
            found = [module for path, module in model.named_modules() if path.endswith(last)]
            if not found:
                raise InputError(f"no module {last}")
            self.hook = found[0].register_forward_pre_hook(self.select_inputs)
        else:
            self.hook = model.base_model.register_forward_hook(self.select_outputs)

    @contextlib.contextmanager
    def at(self, positions, shape):
        """In the block, keep only the hidden states at `positions`, int [K] in B * L, of batches of shape (B, L)."""
        self.positions, self.shape = positions, shape
        try:
            yield
        finally:
            self.positions = self.shape = None

    def select(self, hidden):
        if self.positions is None:
            return hidden
        if getattr(hidden, "shape", ())[:2] != self.shape:
            raise InputError("no hidden state of each token at this place")
        return hidden.flatten(0, 1).index_select(0, self.positions)[None]

    def select_inputs(self, module, inputs):
        return tuple(self.select(hidden) for hidden in inputs)

    def select_outputs(self, module, inputs, output):
        hidden = self.select(output[0])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output


def find_sparse_start(model, collator, lengths, training):
    """Return the best `start` of a `SparseHead` that leaves the logits as they are, or None if none does.

    It is tried on a copy without dropout, in the mode and with rows of the lengths of the run: some models fail in one
    mode, attend to padded rows, or change for good when they see a short row.
    """
    config, found = copy.deepcopy(model.config), None
    set_dropout(config, 0.0)
    # The attention of the run may need a GPU.
    trial = AutoModelForMaskedLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    trial.load_state_dict(model.state_dict())
    trial.train(training)
    for start in ("encoder", "layer"):
        if all(keeps_logits(trial, collator, start, length) for length in lengths):
            found = start
    if found is None:
        logger.warning(f"{type(model).__name__} needs all positions in its head: training with the dense head.")
    return found


def keeps_logits(model, collator, start, length):
    """Return whether a `SparseHead` leaves the logits of two rows of a length as they are."""
    ids = np.resize(np.flatnonzero(~collator.is_special), (2, length))  # Without padding, which models look for.
    inputs = model_inputs(model, collator([{"input_ids": row} for row in ids]))
    positions, sparse = torch.arange(0, 2 * length, 3), None
    with torch.no_grad(), contextlib.ExitStack() as hooks:
        torch.manual_seed(0)  # Some models hash their tokens at random.
        dense = model(**inputs, return_dict=True).logits.flatten(0, 1)[positions]
        torch.manual_seed(0)
        # Any failure means that the model does not allow this start.
        with contextlib.suppress(UserError), user_errors(start):
            head = SparseHead(model, start)
            hooks.callback(head.hook.remove)
            with head.at(positions, ids.shape):
                sparse = model(**inputs, return_dict=True).logits[0]
    if sparse is None or sparse.shape != dense.shape:
        return False
    return bool((sparse - dense).abs().max() <= 1e-3 * dense.abs().max())


class HostCopy:
    """A tensor being copied to the host: `read` waits for the GPU work queued before the copy, not for later work."""

    def __init__(self, tensor):
        self.tensor = tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor
        self.event = torch.cuda.current_stream().record_event() if tensor.is_cuda else None

    def read(self):
        """Return the tensor as a list."""
        if self.event:
            self.event.synchronize()
        return self.tensor.tolist()


class MaskedLMTrainer(Trainer):
    """Trainer whose loss is averaged over all masked tokens of an optimizer step (all its batches and processes)."""

    def __init__(self, *args, sparse_start, settings, **kwargs):
        super().__init__(*args, compute_metrics=self.metrics_of_sums, **kwargs)
        self.model_accepts_loss_kwargs = True  # `compute_loss` gets the number of masked tokens of the step.
        # A model's configuration can turn it on, too.
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if sparse_start and (self.args.gradient_checkpointing or checkpointing or self.args.fsdp):
            sparse_start = "encoder"  # Layers may run again in the backward pass, without positions; FSDP wraps them.
        self.sparse_start = None if self.args.n_gpu > 1 else sparse_start  # DataParallel splits the batch.
        self.head = SparseHead(self.model, self.sparse_start) if self.sparse_start else None
        self.settings, self.losses, self.plan = settings, LossSums(), None
        self.micro_batch, self.step_loss, self.stop_signal = 0, 0.0, 0
        self.timer = 0, time.perf_counter()
        # The Trainer would delete folders with other names too, such as `checkpoint-10-old`.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None

    def masked_logits(self, model, inputs):
        """Return (logits [K, V], labels [K]) at the positions that a batch names, or at all of its positions."""
        labels, positions = inputs["labels"].flatten(), inputs.get("positions")
        batch = model_inputs(self.model, inputs)
        if self.head is None or positions is None:
            logits = model(**batch, return_dict=True).logits.flatten(0, 1)
            return logits if positions is None else logits[positions], labels
        with self.head.at(positions, inputs["input_ids"].shape):
            return model(**batch, return_dict=True).logits.flatten(0, 1), labels

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the summed loss of a batch, one of those of the step, divided by the masked tokens of the step."""
        logits, labels = self.masked_logits(model, inputs)
        smoothing = self.args.label_smoothing_factor
        loss = cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        count = (labels != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / count.clamp(min=1).to(loss.device)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # Gradients are averaged over the processes.
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Return the loss of a batch. Its dropout is a function of (seed, step, batch of the step, process)."""
        place = self.args.seed, self.state.global_step, self.micro_batch, self.args.process_index
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_batch, self.step_loss = self.micro_batch + 1, self.step_loss + loss
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return (None, [loss, hits] per sample [B, 2], masked tokens per sample [B]): no logits are kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits, labels = self.masked_logits(model, inputs)
        size, length = inputs["input_ids"].shape
        losses = cross_entropy(logits.float(), labels, reduction="none")
        scores = torch.stack([losses, logits.argmax(-1) == labels, labels != IGNORED_LABEL], dim=1)
        positions = inputs.get("positions", torch.arange(size * length, device=labels.device))
        sums = scores.new_zeros(size, 3).index_add_(0, positions // length, scores)
        return None, sums[:, :2], sums[:, 2]

    def metrics_of_sums(self, prediction):
        """Return {"loss", "accuracy", "perplexity", "masked_share"} from the sums of `prediction_step`."""
        loss, hits = prediction.predictions.sum(axis=0, dtype=np.float64)
        count = prediction.label_ids.sum()
        return {**mean_metrics(loss, hits, count), "masked_share": float(count / self.eval_dataset.lengths.sum())}

    def is_local_process_zero(self):
        """Return whether this process prints what the Trainer's callbacks log."""
        return self.args.should_log

    def log(self, logs, *args, **kwargs):
        """Log as the Trainer does, with the tokens per second since the last report."""
        seconds_per_step = 0.0
        if "loss" in logs:
            (step, start), now = self.timer, time.perf_counter()
            seconds_per_step = (now - start) / max(1, self.state.global_step - step)
            samples = self.plan.num_samples(self.state.global_step) - self.plan.num_samples(step)
            logs["tokens_per_second"] = round(self.train_dataset.lengths.mean() * samples / (now - start))
            self.timer = self.state.global_step, now
            self.read_steps()
            logs["loss"] = self.losses.report()
        if "train_loss" in logs:  # After a resume, the Trainer has the loss of this command's steps, the speed of all.
            start, steps = time.time() - logs["train_runtime"], self.state.global_step - self.plan.first_step
            logs |= speed_metrics("train", start, self.plan.num_samples(self.state.global_step), steps)
            self.read_steps()
            logs["train_loss"] = self.losses.mean()
        elif self.args.disable_tqdm and self.args.should_log and self.state.max_steps:
            log_report(result_names(logs), self.state.global_step, self.state.max_steps, seconds_per_step)
        with write_errors(self.args.output_dir, "the reports"):
            super().log(logs, *args, **kwargs)
        self.state.log_history[-1] = result_names(self.state.log_history[-1])

    def create_accelerator_and_postprocess(self):
        """Set up Accelerate; raises `UserError` for what this machine cannot do."""
        with user_errors("--fsdp, --deepspeed, --accelerator_config or --torch_compile_backend"):
            super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args, **kwargs):
        """Return the optimizer; raises `UserError` for one that is not installed."""
        more = ", --optim_args" if self.args.optim_args else ""
        with user_errors(f"--optim {self.args.optim.value}{more}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """Return the schedule; raises `UserError` for arguments that do not fit it."""
        with user_errors("--lr_scheduler_type, --lr_scheduler_kwargs, --warmup_steps"):
            scheduler = super().create_scheduler(*args, **kwargs)
            for factor in getattr(scheduler, "lr_lambdas", ()):
                factor(self.plan.num_steps)  # Some schedules fail at the last step only, after the training.
            return scheduler

    def init_hf_repo(self, *args, **kwargs):
        """Create the hub repository; raises `UserError` if that fails."""
        with user_errors("--push_to_hub, --hub_model_id"):
            super().init_hf_repo(*args, **kwargs)
        api = hf_api()

        def upload_folder(path_in_repo=None, **options):
            if path_in_repo is None:  # The output folder, and not a checkpoint in it.
                options["allow_patterns"] = [*PUBLISHED, *self.data_collator.tokenizer.vocab_files_names.values()]
            return HfApi.upload_folder(api, path_in_repo=path_in_repo, **options)

        api.upload_folder = upload_folder

    # Trainer internals.

    def _get_train_sampler(self, train_dataset=None):
        return StepSampler(self.plan)  # There is no public way to give a sampler.

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        base = getattr(loader, "base_dataloader", loader)
        base.worker_init_fn = ignore_signals  # A signal to the group must not end workers; the main process ends them.
        if hasattr(signal, "pthread_sigmask"):  # Not on Windows.
            # Workers start in `_get_iterator`. A forked one must not get a signal before it ignores them.
            base._get_iterator = blocked_signals()(base._get_iterator)
        return loader

    def get_batch_samples(self, *args, **kwargs):
        """Return the batches of a step and the number of their masked tokens."""
        self.micro_batch, self.step_loss = 0, 0.0
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.args.n_gpu > 1:  # The Trainer divides the count by the devices, but the loss here is a sum over all.
            count = sum((batch["labels"] != IGNORED_LABEL).sum() for batch in batches)
        return batches, count

    def _inner_training_loop(self, batch_size=None, resume_from_checkpoint=None, **kwargs):
        args = self.args
        if args.auto_find_batch_size:
            args.per_device_train_batch_size = batch_size // max(1, args.n_gpu)
        self._train_batch_size = args.train_batch_size  # The Trainer would use that of the checkpoint.
        self.plan, self.losses = resume_run(self.train_dataset, args, self.settings, resume_from_checkpoint)
        self.unread = []
        # To the Trainer, the run is one epoch of this many steps, and `StepSampler` begins where the run is.
        max_steps, args.max_steps, args.ignore_data_skip = args.max_steps, self.plan.num_steps, True
        try:
            return super()._inner_training_loop(
                self._train_batch_size, resume_from_checkpoint=resume_from_checkpoint, **kwargs
            )
        finally:
            args.max_steps = max_steps

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with user_errors(f"the model in {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _determine_best_metric(self, *args, **kwargs):
        """Return whether this is the best model so far; a step at which no checkpoint is due does not count."""
        step, due = self.state.global_step, self.args.save_strategy != "steps"
        due |= step == self.state.max_steps or step % self.state.save_steps == 0
        if self.args.load_best_model_at_end and not due:
            return False
        return super()._determine_best_metric(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        for name in ("*optimizer*", "scheduler.pt") if checkpoint and not self.is_deepspeed_enabled else ():
            if not glob.glob(os.path.join(glob.escape(checkpoint), name)):  # The Trainer would load neither.
                raise UserError(f"{checkpoint} cannot be resumed: it has no file {name}")
        peaks = getattr(self.lr_scheduler, "base_lrs", None)
        settings = set(self.optimizer.param_groups[0])
        with user_errors(f"the optimizer state in {checkpoint}"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if not settings <= set(self.optimizer.param_groups[0]):
            raise UserError(
                f"the optimizer state in {checkpoint} is of another optimizer than --optim {self.args.optim.value}"
            )
        if checkpoint and isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):  # The flags set the rate.
            self.lr_scheduler.base_lrs, self.lr_scheduler.last_epoch = peaks, self.lr_scheduler.last_epoch - 1
            self.lr_scheduler.step()

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler:  # Without --fp16, as on a CPU, there is no scaler to load.
            with user_errors(f"the scale of the loss in {checkpoint}"):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        pass  # No random number depends on what was drawn before.

    def save_metrics(self, split, metrics, combined=True):
        """Write the results of a split; a kill leaves no incomplete file."""
        if self.is_world_process_zero():
            save_results(self.args.output_dir, split, metrics)

    def save_state(self):
        """Write `trainer_state.json` to the output folder."""
        with write_errors(self.args.output_dir, "the results"):
            super().save_state()

    def create_model_card(self, *args, **kwargs):
        """Leave the card to `write_card`."""

    def get_decay_parameter_names(self, model):
        """Return the names of all weights but biases and norms, whatever the modules are called."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        follow_umask(output_dir or self.args.output_dir)

    def _save_checkpoint(self, *args, **kwargs):
        self.read_steps()
        run = run_state(self.plan, self.losses, self.settings, self.state.global_step)
        self.state.stateful_callbacks["run"] = run  # Part of `trainer_state.json`, which completes the checkpoint.
        replace_old_run(self.args)
        self.accelerator.wait_for_everyone()  # Each process writes to the folder.
        with write_errors(self.args.output_dir, "a checkpoint"):
            super()._save_checkpoint(*args, **kwargs)
        rotate_checkpoints(self.args, self.save_total_limit, self.state.global_step)

    def end_step(self, signal_received):
        """Exchange loss and signal of a step with the other processes, and read those of the step before."""
        signals = [self.step_loss.new_full((), signal_received == number) for number in STOP_SIGNALS]
        sums = self.accelerator.reduce(torch.stack([self.step_loss, *signals]), "sum")  # NCCL only queues it.
        self.unread.append((self.state.global_step, HostCopy(sums)))
        self.read_steps(all_but=1)
        if self.plan.is_stream:
            self.train_dataset.forget_blocks_before(self.plan.position(self.state.global_step).sample)

    def read_steps(self, all_but=0):
        """Add the losses of the unread steps, all but the last `all_but`; waits until those steps are done."""
        while len(self.unread) > all_but:
            step, sums = self.unread.pop(0)
            loss, *counts = sums.read()
            self.losses.add(loss / self.args.world_size, step)
            self.stop_signal = max(number * (count > 0) for number, count in zip(STOP_SIGNALS, counts))


class RunCallback(TrainerCallback):
    """Decides what is due after each step, makes up for a missed evaluation on a resume, and stops after a signal."""

    def __init__(self, trainer, signals, checkpoint, setup):
        self.trainer, self.signals, self.checkpoint, self.setup = trainer, signals, checkpoint, setup

    def any_signal(self):
        """Return the signal that any of the processes has received, or 0."""
        if self.trainer.args.world_size > 1:
            number = torch.tensor(self.signals.number, device=self.trainer.args.device)
            return int(self.trainer.accelerator.gather(number).max())
        return self.signals.number

    def on_train_begin(self, args, state, control, **kwargs):
        """Check and log the steps to come; evaluate if the run was stopped before it could evaluate its last step."""
        self.setup.close()
        if state.global_step > state.max_steps:
            raise UserError(f"checkpoint-{state.global_step} is already past the {state.max_steps} steps asked for")
        state.compute_steps(args, state.max_steps)  # The Trainer would keep the intervals of the checkpoint.
        log_training(args, self.trainer.model.num_parameters(), state.global_step, state.max_steps, args.learning_rate)
        args.eval_on_start &= state.global_step == 0
        due = TrainerControl()
        if self.checkpoint:
            self.decide(args, state, due)
        if self.checkpoint and state.best_global_step:  # The folder may have been moved since.
            best = os.path.join(os.path.dirname(self.checkpoint), f"checkpoint-{state.best_global_step}")
            state.best_model_checkpoint = best if os.path.isdir(best) else state.best_model_checkpoint
        evaluated = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        if due.should_evaluate and state.global_step not in evaluated:
            metrics = self.trainer._evaluate(None, None)
            if self.trainer._determine_best_metric(metrics, None):
                state.best_model_checkpoint = self.checkpoint
        self.trainer.timer = state.global_step, time.perf_counter()

    def decide(self, args, state, control):
        """Set what is due after a step. An epoch ends with its last step, so that its checkpoint comes last."""
        state.epoch = self.trainer.plan.epoch(state.global_step)
        flow = DefaultFlowCallback()
        flow.on_step_end(args, state, control)
        if self.trainer.plan.ends_epoch(state.global_step):
            flow.on_epoch_end(args, state, control)
        last = state.global_step >= state.max_steps
        control.should_log |= last and args.logging_strategy != "no"
        if last and args.do_eval and not args.metric_for_best_model:  # `evaluate` follows, and no best model is chosen.
            control.should_evaluate = False

    def on_evaluate(self, args, state, control, **kwargs):
        """Save after a signal in an evaluation; the time of an evaluation does not count as training time."""
        if self.any_signal():
            control.should_save, args.save_only_model = True, False
        self.trainer.timer = state.global_step, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Save after a signal, before any evaluation. Several processes know of it one step later."""
        self.trainer.end_step(self.signals.number)
        self.decide(args, state, control)
        if control.should_log or control.should_evaluate or control.should_save:
            self.trainer.read_steps()
        if self.trainer.stop_signal if args.world_size > 1 else self.signals.number:
            control.should_save, control.should_evaluate, args.save_only_model = True, False, False

    def on_save(self, args, state, control, **kwargs):
        """Stop after a signal."""
        note = ", without an optimizer state: it cannot be resumed" if args.save_only_model else ""
        logger.info(f"Saved {os.path.join(args.output_dir, f'checkpoint-{state.global_step}')}{note}.")
        self.trainer.timer = state.global_step, time.perf_counter()
        if stop_signal := self.any_signal():
            self.trainer.accelerator.wait_for_everyone()
            self.signals.stop(stop_signal, f"; checkpoint-{state.global_step} is saved")


def result_names(metrics):
    """Return metrics with the documented name of the perplexity; the Trainer puts "eval_" before every name."""
    return {name.replace("eval_perplexity", "perplexity"): value for name, value in metrics.items()}


def mean_metrics(loss, hits, count):
    """Return {"loss", "accuracy", "perplexity"} from sums over `count` masked tokens; perplexity is inf on overflow."""
    mean, accuracy = float(loss) / max(int(count), 1), float(hits) / max(int(count), 1)
    return {"loss": mean, "accuracy": accuracy, "perplexity": math.inf if mean > 700 else math.exp(mean)}


# ---- 6. Run ---------------------------------------------------------------------------------------------------------
def write_json(path, content):
    """Write a JSON file that is either complete or absent."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
    os.replace(f"{path}.tmp", path)


def read_state(checkpoint):
    """Return the state of a checkpoint, None if it is unfinished, or False if neither script can have written it."""
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            state = json.load(file)
    except (FileNotFoundError, ValueError):  # It is written last, and the Trainer does not write it in one go.
        return None
    except OSError:
        return False
    if not isinstance(state, dict):
        return False
    step, history, best = state.get("global_step"), state.get("log_history"), state.get("best_model_checkpoint")
    valid = type(step) is int and step >= 0 and isinstance(history, list) and isinstance(best, str | None)
    return state if valid and all(isinstance(entry, dict) for entry in history) else False


def has_optimizer(checkpoint):
    """Return whether a checkpoint holds an optimizer state of this script."""
    return any(glob.glob(os.path.join(glob.escape(checkpoint), name)) for name in OPTIMIZER_FILES)


def checkpoint_folders(folder):
    """Return {path: state} of the folders `checkpoint-N`, oldest first, with states as from `read_state`."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    paths = [os.path.join(folder, name) for name in names if CHECKPOINT_NAME.fullmatch(name)]
    paths = [path for path in paths if os.path.isdir(path) and not os.path.islink(path)]
    return {path: read_state(path) for path in sorted(paths, key=lambda path: int(path.rpartition("-")[2]))}


def list_checkpoints(folder):
    """Return (step, path) of the checkpoints in a folder that this script can resume, oldest first; warn of others."""
    found = []
    for path, state in checkpoint_folders(folder).items():
        if not state:
            logger.warning(f"{path} is ignored: it is not a complete checkpoint.")
        elif not has_optimizer(path):
            logger.warning(f"{path} is ignored: it has no optimizer state of this script and cannot be resumed.")
        else:
            found.append((state["global_step"], path))
    return sorted(found)


def find_checkpoint(model_args, data_args, training_args):
    """Return the checkpoint to resume from, or None to start a new run, and note what the run may delete.

    Sets `old_run`, the paths that the run replaces, and `named_checkpoints`, the checkpoints that flags name. Raises
    `UserError` if the run would overwrite or delete what is not its own, or what a flag reads.
    """
    args, folder, named = training_args, training_args.output_dir, training_args.resume_from_checkpoint
    check_results(model_args, args)
    if not args.do_train:
        return None
    own = [] if args.overwrite_output_dir else list_checkpoints(folder)
    step, checkpoint = own[-1] if own else (0, None)
    if named and named.lower() != "true":
        state = read_state(named)
        if not state or not has_optimizer(named):
            raise UserError(f"--resume_from_checkpoint {named}: no complete checkpoint of this script is there")
        if own and not os.path.samefile(checkpoint, named):
            cause = f"--output_dir {folder} continues from its newest checkpoint, {checkpoint}"
            raise UserError(f"--resume_from_checkpoint {named}: {cause}; omit this flag, or use another folder")
        step, checkpoint = state["global_step"], os.path.abspath(named)
    if 0 < args.max_steps < step:
        raise UserError(f"{checkpoint} is already past --max_steps {args.max_steps}")
    check_output_dir(args, own)
    flags = flag_paths((model_args, data_args, args))
    args.old_run = find_old_run(args, checkpoint)
    args.named_checkpoints = [path for path in checkpoint_folders(folder) if os.path.realpath(path) in flags]
    unfinished = [path for path, state in checkpoint_folders(folder).items() if state is None]
    for path in (*args.old_run, *unfinished):
        if flag := flags.get(os.path.realpath(path)):
            cause = f"the run would replace {path}, which --{flag} reads"
            raise UserError(f"--output_dir {folder}: {cause}; use another folder")
    return checkpoint


def check_results(model_args, args):
    """Raise `UserError` if the folder holds another model, or an all_results.json that cannot be read."""
    folder, name = args.output_dir, model_args.model_name_or_path
    model_differs = os.path.realpath(name or "") != os.path.realpath(folder)
    if args.do_eval and not args.do_train and model_differs and os.path.exists(os.path.join(folder, "config.json")):
        raise UserError(f"--output_dir {folder} holds another model than {name or 'a new one'}; use another folder")
    path = os.path.join(folder, "all_results.json")
    if os.path.exists(path) and not (args.do_train and args.overwrite_output_dir):
        read_json_object(path)


def check_output_dir(args, own):
    """Raise `UserError` if the folder holds what a run must not write to; `own` are checkpoints to continue from."""
    folder = args.output_dir
    content = set(os.listdir(folder) if os.path.isdir(folder) else ()) - {"runs", "logs", "_lock"}
    folders = {os.path.basename(path): state for path, state in checkpoint_folders(folder).items()}
    for name in content - folders.keys():
        if CHECKPOINT_NAME.fullmatch(name):  # Writing a checkpoint would fail, or follow the link.
            raise UserError(f"--output_dir {folder}: {name} is a link or a file, not a folder; use another folder")
    unfinished = {name for name, state in folders.items() if state is None}
    if content - unfinished and not own and not args.overwrite_output_dir:
        raise UserError(f"--output_dir {folder} is not empty; use another folder or --overwrite_output_dir")
    for name, state in folders.items():
        if state is False:  # Writing a checkpoint would overwrite what is not the run's own.
            raise UserError(f"--output_dir {folder}: {name} is not a checkpoint of these scripts; use another folder")


def find_old_run(args, checkpoint):
    """Return what a run replaces in its folder: results and, with `--overwrite_output_dir`, charts and checkpoints."""
    folder = args.output_dir
    paths = [os.path.join(folder, name) for name in (*RESULTS, "training_args.bin")]
    found = [path for path in paths if os.path.isfile(path)]
    if not args.overwrite_output_dir:
        return found
    for charts in ("logs", "runs", "runs/*"):
        found += glob.glob(os.path.join(glob.escape(folder), charts, "events.out.tfevents.*"))
    kept = needed_checkpoints(checkpoint) if checkpoint else set()
    replaced = [path for path, state in checkpoint_folders(folder).items() if state is not False]
    return found + [path for path in replaced if os.path.realpath(path) not in kept]


def flag_paths(groups):
    """Return {real path: flag} of all that flags may read: values as paths, globs expanded, and their parents."""
    found = {}
    for name, value in itertools.chain.from_iterable(vars(group).items() for group in groups):
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        for text in texts:
            for path in map(os.path.realpath, (text, *glob.glob(text, recursive=True))):
                found |= dict.fromkeys((path, *map(str, Path(path).parents)), name)
    return found


def needed_checkpoints(checkpoint):
    """Return the real paths of a checkpoint and of its best one: where its state says, and, if moved, beside it."""
    best = read_state(checkpoint).get("best_model_checkpoint") or checkpoint
    beside = os.path.join(os.path.dirname(checkpoint), os.path.basename(best))
    return {os.path.realpath(path) for path in (checkpoint, best, beside)}


def replace_old_run(args, trained=True):
    """Delete what the run replaces, right before its first checkpoint or model.

    If there was nothing left to train (`trained` is false), a finished run keeps its results.
    """
    finished = os.path.exists(os.path.join(args.output_dir, "train_results.json")) and not args.overwrite_output_dir
    if args.writes_results and (trained or not finished):
        for path in args.old_run:
            delete(path)
        args.old_run = []


def follow_umask(folder):
    """Give weights the mode of a model's other files: `safetensors` lets only their owner read them."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        shutil.copymode(os.path.join(folder, "config.json"), path)


def log_metrics(split, metrics):
    """Log the metrics of a split, one a line."""
    logger.info(f"***** {split} metrics *****")
    for name, value in sorted(metrics.items()):
        logger.info(f"  {name:<26} {value:.6g}")


def save_results(folder, split, metrics):
    """Write the results of a split, and add them to `all_results.json`."""
    path = os.path.join(folder, "all_results.json")
    everything = read_json_object(path) if os.path.exists(path) else {}
    with write_errors(folder, "the results"):
        write_json(os.path.join(folder, f"{split}_results.json"), metrics)
        write_json(path, everything | metrics)


def training_results(args, metrics):
    """Return the results of the training: the saved ones if an earlier command has finished it, or else `metrics`."""
    path = os.path.join(args.output_dir, "train_results.json")
    return read_json_object(path) if args.writes_results and os.path.exists(path) else metrics


def rotate_checkpoints(args, limit, step):
    """Delete the oldest checkpoints above a limit once that of `step` is written.

    Keeps the best one and those that a flag names. If the new one has an optimizer state, only such checkpoints count,
    otherwise only those without.
    """
    if limit is None or not args.writes_results:
        return
    newest = os.path.join(args.output_dir, f"checkpoint-{step}")
    folders, kept = checkpoint_folders(args.output_dir), needed_checkpoints(newest)
    found = [path for path, state in folders.items() if state and has_optimizer(path) == has_optimizer(newest)]
    others = [path for path in found if os.path.realpath(path) not in kept and path not in args.named_checkpoints]
    for path in others[: max(0, len(found) - limit)]:
        delete(path)


def delete(path):
    """Delete a file, or a checkpoint: its state first, so that a kill in between leaves an unfinished one.

    Logs a warning for what cannot be deleted: no step is lost for that.
    """
    try:
        if not os.path.isdir(path):
            os.remove(path)
            return
        if os.path.exists(os.path.join(path, "trainer_state.json")):
            os.remove(os.path.join(path, "trainer_state.json"))
        shutil.rmtree(path)
        logger.info(f"Deleted {path}.")
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning(f"{path} cannot be deleted: {error.strerror}")


@contextlib.contextmanager
def output_lock(training_args):
    """Hold a lock on the output folder, so that no second run writes to it; the lock ends with the process."""
    if not training_args.writes_results:
        yield
        return
    folder = training_args.output_dir
    in_use = user_errors(f"--output_dir {folder} (is another run writing there?)", filelock.Timeout)
    with user_errors(f"--output_dir {folder}"), in_use:
        os.makedirs(folder, exist_ok=True)
        lock = filelock.FileLock(os.path.join(folder, "_lock")).acquire(blocking=False)
    with lock:
        yield


class StopSignals:
    """Notes SIGTERM and SIGINT in `number` and ends the program; while `deferred`, it leaves that to the training.

    A further SIGTERM changes nothing. A second Ctrl-C, seconds after the first, ends the program without a checkpoint.
    """

    def __enter__(self):
        self.number, self.time, self.deferred, self.process = 0, 0.0, False, os.getpid()
        in_main_thread = threading.current_thread() is threading.main_thread()  # Only the main thread can set handlers.
        numbers = STOP_SIGNALS if in_main_thread else ()
        self.previous = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if self.number and not self.deferred:
                # Compiled code may have turned the exit of `handle` into an error, or a destructor swallowed it.
                self.stop(self.number)
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def handle(self, number, frame):
        """Handle a signal."""
        again = number == self.number == signal.SIGINT and time.monotonic() - self.time > SECOND_INTERRUPT
        if os.getpid() != self.process or again:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.time = number, time.monotonic()
            if not self.deferred:
                raise SystemExit(128 + number)
            name = signal.Signals(number).name  # Not logged: the signal may have interrupted the logger.
            os.write(2, f"{name}: stopping after this step; a second Ctrl-C stops without a checkpoint.\n".encode())

    @contextlib.contextmanager
    def defer(self):
        """Within the block, only note signals; the block itself calls `stop`."""
        self.deferred = True
        if self.number:  # A destructor can swallow the exception of `handle`.
            self.stop(self.number)
        yield
        self.deferred = False  # Still true after an exception: `__exit__` does not replace what the training raises.

    def stop(self, number, outcome=""):
        """Log a signal to this or another process and end the program."""
        logger.info(f"Stopped by {signal.Signals(number).name}{outcome}.")
        raise SystemExit(128 + number)


def ignore_signals(worker_id=None):
    """Ignore SIGTERM and Ctrl-C from now on: in a loader worker, or while the program ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def setup_logging(training_args):
    """Log to stdout, from the main process only."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[logging.StreamHandler(sys.stdout)]
    )
    logger.setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    if not training_args.should_log:
        transformers.utils.logging.set_verbosity_error()
    if training_args.disable_tqdm or not training_args.should_log:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def log_report(logs, step, num_steps, seconds_per_step=0.0):
    """Log a report in one line, for a log without a progress bar; with the time of a step, it tells the time left."""
    left = datetime.timedelta(seconds=round(seconds_per_step * (num_steps - step)))
    left = f", {left} left" if seconds_per_step else ""
    values = [f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in logs.items()]
    logger.info(f"step {step:,} of {num_steps:,} ({step / num_steps:.0%}{left}): {', '.join(values)}")


def log_training(args, num_parameters, step, num_steps, learning_rate):
    """Log the size of the training ahead, after `step` of `num_steps` steps."""
    samples, accumulated, size = args.train_batch_size, args.gradient_accumulation_steps, args.global_batch_size
    steps = f"{num_steps - step:,} of {num_steps:,} steps to go"
    logger.info(f"training: {num_parameters:,} parameters, {steps}, peak learning rate {learning_rate:.3g}")
    devices = size // (samples * accumulated)
    logger.info(f"global batch size: {size:,} (batch {samples}, accumulation {accumulated}, devices {devices})")
    decay = (args.lr_scheduler_kwargs or {}).get("num_decay_steps") or 1
    if step == num_steps:
        logger.info("The run is finished. To train again, use another --output_dir or --overwrite_output_dir.")
    elif num_steps < args.warmup_steps + decay and args.lr_scheduler_type != "constant":
        logger.warning("--warmup_steps and the decay are longer than the run: the learning rate never peaks.")


def log_predictions(dataset, collator, predict):
    """Log the predictions for the mask tokens of a few samples; `predict` maps a batch to logits [B, L, V]."""
    samples = [dataset[i] for i in range(min(30, len(dataset)))]
    samples = [{name: value if np.isscalar(value) else value[:32] for name, value in row.items()} for row in samples]
    batch, decode = collator.collate(samples), collator.tokenizer.decode
    hidden = (batch["labels"] != IGNORED_LABEL) & (batch["input_ids"] == collator.mask_token_id)
    shown = np.flatnonzero(hidden.any(axis=1))[:3]
    if not shown.size:
        return
    batch = {name: array[shown] for name, array in batch.items()}
    logits = np.asarray(predict({name: batch[name] for name in ("input_ids", "attention_mask")}), np.float32)
    for ids, attended, labels, masked, scores in zip(*batch.values(), hidden[shown], logits):
        places = np.flatnonzero(masked)  # A Perceiver returns more positions than it receives.
        guesses = zip(scores[places].argmax(-1), labels[places])
        pairs = [f"{decode(guess)} ({decode(label)})" for guess, label in guesses]
        logger.info(f"  {decode(ids[attended == 1])}")
        logger.info(f"    predicted (in the text): {', '.join(pairs)}")


@dataclass
class LossSums:
    """Sums of the training losses of the steps: since the last report, and before it. A checkpoint carries them."""

    since_report: float = 0.0
    steps_since_report: int = 0
    reported: float = 0.0
    steps_reported: int = 0

    def add(self, loss, step):
        """Count the loss of a step; raises `UserError` if it is not finite."""
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} in step {step}; lower --learning_rate")
        self.since_report, self.steps_since_report = self.since_report + loss, self.steps_since_report + 1

    def report(self):
        """Return the mean loss of the steps since the last report, and begin the next one."""
        mean = self.since_report / max(1, self.steps_since_report)
        self.reported += self.since_report
        self.steps_reported += self.steps_since_report
        self.since_report, self.steps_since_report = 0.0, 0
        return mean

    def mean(self):
        """Return the mean loss of all steps."""
        return (self.reported + self.since_report) / max(1, self.steps_reported + self.steps_since_report)


def masking_settings(data_args, training_args):
    """Return the arguments of the masking collator: the masking flags, which have the names of its fields."""
    names = [item.name for item in fields(MaskingCollator) if hasattr(data_args, item.name)]
    return {"seed": training_args.seed, **{name: getattr(data_args, name) for name in names}}


def run_settings(data_args, training_args, max_seq_length, dataset):
    """Return the settings that the order of the samples and the random numbers of their masks depend on."""
    settings = {name: getattr(data_args, name) for name in ("line_by_line", "streaming", "whole_word_mask")}
    for name in ("seed", "group_by_length", "drop_last_step"):
        settings[name] = getattr(training_args, name)
    if data_args.streaming:
        held_out = dataset.beginning["skip"] if dataset else 0  # For validation, at the start of each pass.
        order = {"shuffle_buffer_size": data_args.shuffle_buffer_size, "held_out_samples": held_out}
        order["max_train_samples"] = data_args.max_train_samples
    else:
        places = np.linspace(0, len(dataset) - 1, 100).astype(int)
        some = table_rows(dataset.dataset[places]) if dataset else ()
        content = b"".join(row["input_ids"].astype("<i4").tobytes() for row in some)
        order = {"samples": len(dataset), "text_checksum": f"{zlib.crc32(content):08x}"}
    return {**settings, **order, "order_seed": training_args.order_seed, "max_seq_length": max_seq_length}


def run_state(plan, losses, settings, step):
    """Return what a checkpoint after a step holds besides model and optimizer."""
    block = plan.dataset.blocks[0] if plan.is_stream else None
    return {"position": plan.position(step), "block": block, "losses": asdict(losses), "settings": settings}


def resume_run(dataset, args, settings, checkpoint):
    """Return (`RunPlan`, `LossSums`) of a new run, or of one that continues from a checkpoint."""
    if checkpoint is None:
        return RunPlan(dataset, args), LossSums()
    state = read_state(checkpoint)
    run = (state.get("stateful_callbacks") or {}).get("run") or {}  # Earlier versions did not write it.
    if isinstance(dataset, StreamedDataset) and run.get("block"):
        dataset.start(run["block"])
    saved = {**settings, **run.get("settings", {})}
    changed = [f"{name} {saved[name]} (now {settings[name]})" for name in settings if saved[name] != settings[name]]
    if changed:
        logger.warning(f"{checkpoint} has {', '.join(changed)}: samples may be repeated or left out in this epoch.")
    return RunPlan(dataset, args, state["global_step"], run.get("position")), LossSums(**run.get("losses", {}))


def build_trainer(model_args, data_args, training_args, model, tokenizer, tokenized, max_seq_length):
    """Return the trainer; raises `UserError` if the model fails on a batch, or the Trainer with its arguments."""
    collator = MaskedLMCollator(
        tokenizer,
        **masking_settings(data_args, training_args),
        pad_to_multiple_of=8 if training_args.fp16 else None,
        length=max_seq_length if data_args.pad_to_max_length else 0,
        max_seq_length=max_seq_length,
        few_shapes=training_args.torch_compile and data_args.line_by_line,
        compact=not training_args.accelerator_config.dispatch_batches,  # It would split positions like samples.
        fill_slots=training_args.torch_compile or not training_args.use_cpu,  # Otherwise it is wasted work.
    )
    check_masks(tokenized.get("validation"), collator)
    log_devices(training_args)
    with user_errors(f"{type(model).__name__} fails on a first batch"):
        lengths = {max_seq_length}
        if data_args.line_by_line and not data_args.pad_to_max_length:
            lengths.add(min(31, max_seq_length))
        settings = model, collator, lengths, training_args.do_train
        sparse_start = None if model_args.dense_head else find_sparse_start(*settings)
    with user_errors("the Trainer"):
        trainer = MaskedLMTrainer(
            model=model,
            args=training_args,
            data_collator=collator,
            train_dataset=tokenized.get("train"),
            eval_dataset=tokenized.get("validation"),
            sparse_start=sparse_start,
            settings=run_settings(data_args, training_args, max_seq_length, tokenized.get("train", ())),
        )
    trainer.remove_callback(PrinterCallback)  # `log_report` does this.
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):  # Without training, it would write to the current folder.
            callback.logging_dir = callback.logging_dir or os.path.join(training_args.output_dir, "runs")
    return trainer


def log_devices(args):
    """Log how batches are made, and that one process should not use several GPUs."""
    if args.dataloader_num_workers:
        logger.info(f"{args.dataloader_num_workers} loader workers make the batches; see --dataloader_num_workers.")
    if args.n_gpu > 1:
        command = f"torchrun --nproc_per_node {args.n_gpu} {os.path.basename(sys.argv[0])} ..."
        cost = "is slow, needs memory for all logits, and ignores --bf16, --fp16 and --torch_compile"
        logger.warning(f"One process for {args.n_gpu} GPUs {cost}: use `{command}`.")


def train(trainer, checkpoint, signals):
    """Train, save the model and return the metrics; after a signal, save a checkpoint and exit with 128 + signal."""
    args = trainer.args
    logger.info(f"Resuming from {checkpoint}." if checkpoint else f"Starting a new run in {args.output_dir}.")
    setup = contextlib.ExitStack()
    callback = RunCallback(trainer, signals, checkpoint, setup)
    trainer.remove_callback(DefaultFlowCallback)  # `RunCallback` calls it.
    trainer.add_callback(callback)
    with signals.defer(), setup:
        setup.enter_context(user_errors("the Trainer"))  # Until the callback closes `setup`, a failure is due to flags.
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        replace_old_run(args, trained=trainer.state.global_step > trainer.plan.first_step)
        with write_errors(args.output_dir, "the model"):
            trainer.save_model(_internal_call=True)  # Without an upload: `publish` does that.
        if stop_signal := callback.any_signal():
            signals.stop(stop_signal, " after the last step; the model is saved")
    metrics = training_results(args, {**metrics, "train_samples": len(trainer.train_dataset)})
    last = trainer.state.log_history[-1]
    last.update({name: metrics[name] for name in last if name in metrics})
    log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return metrics


def evaluate(trainer):
    """Evaluate on all validation samples and return the metrics."""
    metrics = result_names(trainer.evaluate())
    for name in ("eval_model_preparation_time",) if trainer.args.do_train else ("eval_model_preparation_time", "epoch"):
        metrics.pop(name, None)  # Without training, the Trainer reports epoch 0.
    metrics["eval_samples"] = len(trainer.eval_dataset)
    log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if trainer.args.do_train:
        trainer.save_state()
    show_predictions(trainer)
    return metrics


def show_predictions(trainer):
    """Log the predictions for a few samples, in all processes: each may hold a part of the model."""
    model = trainer.deepspeed or trainer.model  # What FSDP has wrapped is `trainer.model`.

    def predict(batch):
        batch = {name: torch.from_numpy(array).long().to(trainer.args.device) for name, array in batch.items()}
        with torch.no_grad():
            return model(**model_inputs(trainer.model, batch), return_dict=True).logits.float().cpu()

    try:
        with user_errors("the example predictions"):
            log_predictions(trainer.eval_dataset, trainer.data_collator, predict)
    except UserError as error:  # They are optional: the run does not fail without them.
        logger.warning(str(error))


def publish(trainer, groups, metrics):
    """Write the model card and, with `--push_to_hub`, upload the model, its card and the results.

    The card of a finished run stays as it is: nothing was trained with the flags of this command.
    """
    args, trained = trainer.args, trainer.state.global_step > trainer.plan.first_step
    if args.should_save and (trained or not os.path.exists(os.path.join(args.output_dir, "README.md"))):
        write_card(trainer, groups, trainer.state.log_history, metrics)
    if args.push_to_hub:
        trainer.save_model = lambda **kwargs: None  # It is saved, and `--bf16_full_eval` rounds the one in memory.
        with user_errors(f"--push_to_hub failed; the model is saved in {args.output_dir}"):
            trainer.push_to_hub()


@contextlib.contextmanager
def main_process_first(args):
    """Run the block in process 0 first, then in one process of each machine, so that the others find the cache."""
    if not torch.distributed.is_initialized():  # One process, or TPUs.
        with args.main_process_first(local=False):
            yield
        return
    first_here = args.process_index - args.local_process_index
    awaited = first_here if args.local_process_index else 0
    # A barrier of the devices would fail after `--ddp_timeout`, half an hour.
    store = torch.distributed.distributed_c10d._get_default_store()
    while args.process_index > 0 and not store.check([f"done by {awaited}"]):
        time.sleep(0.2)
    yield
    store.set(f"done by {args.process_index}", "")


@contextlib.contextmanager
def ending_together(args, signals):
    """After an error, end the process at once, so that the others end too.

    Reports in one line that another process has ended, which a process notices when it waits for the others.
    """
    try:
        yield
    except Exception as error:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise
        if is_lost_connection(error):
            if signals.number:  # The other process has, too.
                signals.stop(signals.number, "; another process has ended, so no checkpoint is saved")
            error = UserError("another process of this run has ended; see its error")
        end_process(error)


def end_process(error):
    """Report an error and end the process without leaving the group: on GPUs, leaving waits for the others."""
    status = 1
    try:
        with exit_on_user_error():
            raise error
    except SystemExit as stop:
        status = stop.code
    except Exception:
        traceback.print_exc()
    end_workers()
    with contextlib.suppress(OSError):  # The reader of a pipe may have gone.
        sys.stdout.flush()
    os._exit(status)


def end_workers():
    """End the loader workers, which ignore SIGTERM."""
    for worker in multiprocessing.active_children():
        worker.kill()


def leave_process_group():
    """End loader workers and the process group, whose threads would abort the process while Python exits."""
    ignore_signals()
    end_workers()  # Python would wait forever for those that are left.
    gc.collect()  # Models wrapped for the group would keep it alive.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def hub_client():
    """Return a client of the hub that gives up when a server does not answer; the default one waits forever."""
    client = default_client_factory()
    client.timeout = HUB_TIMEOUT
    return client


def write_card(trainer, groups, history, metrics):
    """Write the model card and `arguments.json`, which repeats the run if it is the first argument of the script.

    The card is public: it names no folder of this machine. `history` is the log history.
    """
    model_args, data_args, args = groups
    base, script = model_args.model_name_or_path, Path(__file__).name
    name = os.path.basename(os.path.abspath(args.hub_model_id or args.output_dir))
    origin = f"It started from {public_names(base)[0]}" if base else "It started with random weights"
    keys = "eval_loss", "eval_accuracy", "perplexity"
    known = [key for key in keys if key in metrics and math.isfinite(metrics[key])]
    results = {key.removeprefix("eval_"): metrics[key] for key in known}
    evaluations = [[entry["step"], *(entry.get(key, "") for key in keys)] for entry in history if "eval_loss" in entry]
    sections = [
        f"---\n{card_metadata(name, groups, results)}\n---",
        f"# {name}\n\nA masked language model, trained with `{script}`. {origin}.",
        "\n".join(f"- {kind}: {value:.4g}" for kind, value in results.items()),
        "## Data\n\n" + describe_data(trainer, data_args),
        "## Settings\n\n" + markdown_table(["setting", "value"], card_settings(trainer, groups, history[-1]["step"])),
        "## Evaluations\n\n" + markdown_table(["step", *keys], evaluations) if evaluations else "",
        f"## Command\n\n    {command_line(script, args.given)}",
    ]
    with write_errors(args.output_dir, "the model card"):
        arguments = json.dumps(args.given, indent=2, ensure_ascii=False)
        Path(args.output_dir, "arguments.json").write_text(arguments, encoding="utf-8")
        card = "\n\n".join(section for section in sections if section)
        Path(args.output_dir, "README.md").write_text(card + "\n", encoding="utf-8")


def card_metadata(name, groups, results):
    """Return what the hub reads of a card, as YAML; `results` are the evaluation's, by the hub's names."""
    base, dataset = groups[0].model_name_or_path, groups[1].dataset_name
    source = " ".join(public_names(dataset or groups[1].validation_file or groups[1].train_file))
    found = [EvalResult("fill-mask", source, source, kind, value) for kind, value in results.items()]
    card = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["masked-language-modeling"],
        base_model=None if is_local(base or "") else base,
        datasets=None if is_local(dataset or "") else dataset,
        eval_results=found or None,
    )
    return card.to_yaml()


def describe_data(trainer, data_args):
    """Return a line about the text of each split: where it is from, and how much it is."""
    lines = []
    for split, dataset in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        source = data_args.dataset_name or getattr(data_args, f"{split}_file") or data_args.train_file
        if isinstance(dataset, StreamedDataset):
            size = f"a stream, of which {dataset.num_samples:,} samples with {dataset.num_tokens:,} tokens were read"
        elif dataset:
            size = f"{len(dataset):,} samples, {dataset.lengths.sum():,} tokens"
        else:
            continue
        lines.append(f"- {split}: {' '.join(public_names(source))}, {size}")
    return "\n".join(lines)


def card_settings(trainer, groups, num_steps):
    """Return [(setting, value)]: what changes the result of a run, whether or not a flag was given for it."""
    _, data_args, args = groups
    masking = ("mlm_probability", "mask_replace_prob", "random_replace_prob")
    settings = {name: getattr(data_args, name) for name in masking}
    settings |= {"learning_rate": args.learning_rate, "weight_decay": args.weight_decay}
    settings["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    settings |= {**trainer.settings, "global_batch_size": args.global_batch_size, "steps": num_steps}
    return settings.items()


def command_line(script, given):
    """Return the command of the run, without folders of this machine."""
    words = ["python", script]
    for name, value in given.items():
        words += [f"--{name}", *public_names(value)]
    return shlex.join(words)


def markdown_table(names, rows):
    """Return a Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    cells = [[f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def public_names(values):
    """Return a setting, or a list of them, as words for a public card: paths on this machine as their base names."""
    words = map(str, values if isinstance(values, list) else [values])
    return [os.path.basename(os.path.abspath(word)) if os.sep in word and is_local(word) else word for word in words]


def is_local(name):
    """Return whether a name is a path on this machine, which must not appear in a public card."""
    return os.path.exists(name) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".ckpt" in name


# ---- 7. Main --------------------------------------------------------------------------------------------------------
@exit_on_user_error()
def main(argv=None):
    """Run what the arguments ask for and return all metrics."""
    set_client_factory(hub_client)
    model_args, data_args, training_args = parse_args(argv)
    setup_logging(training_args)
    atexit.register(leave_process_group)
    with (
        StopSignals() as signals,
        ending_together(training_args, signals),
        output_lock(training_args),
        logging_redirect_tqdm(),
    ):
        checkpoint = find_checkpoint(model_args, data_args, training_args)
        tokenizer = load_tokenizer(model_args)
        new_tokens = add_new_tokens(tokenizer, model_args.new_tokens)
        config = load_config(model_args, tokenizer)
        max_seq_length = choose_max_seq_length(data_args, tokenizer, config)
        if not training_args.should_log:
            data_args.overwrite_cache = False  # The main process overwrites it, before the others read it.
        with main_process_first(training_args):
            raw_datasets = needed_splits(load_raw_datasets(model_args, data_args), data_args, training_args)
            tokenized = tokenize_datasets(raw_datasets, tokenizer, data_args, max_seq_length, training_args)
        check_samples(tokenized, training_args)
        log_new_tokens(new_tokens, tokenized.get("train"))
        if not (training_args.do_train or training_args.do_eval):
            logger.info("The data, unless streamed, is tokenized and cached. Give --do_train or --do_eval to use it.")
            return {}

        set_seed(training_args.seed)
        model = load_model(model_args, config, tokenizer, training_args, new_tokens)
        trainer = build_trainer(model_args, data_args, training_args, model, tokenizer, tokenized, max_seq_length)
        metrics = {}
        if training_args.do_train:
            metrics |= train(trainer, checkpoint, signals)
        if training_args.do_eval:
            metrics |= evaluate(trainer)
        if training_args.do_train:
            publish(trainer, (model_args, data_args, training_args), metrics)
        return metrics


def _mp_fn(index):
    """Entry point of TPU launchers such as `xla_spawn`."""
    return main()


if __name__ == "__main__":
    main()
