#!/usr/bin/env python
"""Train a masked language model on your own text with JAX and Flax.

Fine-tune a BERT-like model, or train one from scratch:

    python run_mlm_flax.py --model_name_or_path bert-base-cased --train_file my.txt --do_train --do_eval --output_dir o
    python run_mlm_flax.py configs/quickstart.json --learning_rate 1e-3

`run_mlm.py` is the same program on PyTorch: the same flags, masks, batches and result files. PyTorch is not needed.
Definitions with the same name have the same source in both scripts, unless they depend on the framework.

Where to change what: the masking rule in `mask_tokens`, which sees token ids, not text (its shares are flags); which
ids are never masked in `MaskingCollator`; how text becomes rows of ids in `encode_texts`; the order of the samples in
`epoch_order`; the models in section 4, and the names of a new family in `FAMILIES`; the training loss and its divisor
in `training_step`; loss and metrics of an evaluation in `compute_metrics` and `mean_metrics`; the optimizer in
`create_optimizer`; file formats in `FILE_FORMATS`. A new flag is a field of an argument class, with its limits in
`INTERVALS` or `check_args`; `tests/flags_table.py --write` lists flags and defaults.

Shapes: B batch (samples), L length (tokens), V vocabulary, K label slots of a batch (see `label_slots`), H hidden size,
A accumulated batches, D devices, d head size.
"""

import atexit
import collections
import contextlib
import copy
import csv
import datetime
import difflib
import errno
import functools
import glob
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import datasets
import filelock
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import transformers
import yaml
from datasets.iterable_dataset import ArrowExamplesIterable
from flax import jax_utils, serialization
from flax import linen as nn
from flax.training import train_state
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import EvalResult, HfApi, ModelCardData, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from jax import lax
from jax._src import compilation_cache, distributed, lru_cache  # What is used of these has no public interface.
from jax.experimental import multihost_utils
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save_file
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.trainer_utils import speed_metrics
from transformers.utils import cached_file, check_min_version
from transformers.utils.hub import get_checkpoint_shard_files

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError:
    EventFileWriter = None

check_min_version("5.23.0")

logger = logging.getLogger(__name__)

# Names of the parts and settings of model families in PyTorch: "part=name". Of two pairs for one part, the later one
# counts. An empty name means that the family has no such part. `activation` is that of feed-forward and head.
BERT = (
    "base=bert words=embeddings.word_embeddings positions=embeddings.position_embeddings "
    "types=embeddings.token_type_embeddings embedding_norm=embeddings.LayerNorm layer=encoder.layer.{} "
    "query=attention.self.query key=attention.self.key value=attention.self.value attended=attention.output.dense "
    "attention_norm=attention.output.LayerNorm up=intermediate.dense down=output.dense norm=output.LayerNorm "
    "transform=cls.predictions.transform.dense transform_norm=cls.predictions.transform.LayerNorm "
    "decoder=cls.predictions.decoder bias=cls.predictions.bias activation=hidden_act inner_size=intermediate_size "
    "dropout=hidden_dropout_prob attention_dropout=attention_probs_dropout_prob "
)
ROBERTA = (
    "base=roberta transform=lm_head.dense transform_norm=lm_head.layer_norm decoder=lm_head.decoder bias=lm_head.bias "
)
FAMILIES = {
    "bert": BERT,
    "roberta": BERT + ROBERTA,
    "xlm-roberta": BERT + ROBERTA,
    "camembert": BERT + ROBERTA,
    "electra": BERT + "base=electra projection=embeddings_project transform=generator_predictions.dense "
    "transform_norm=generator_predictions.LayerNorm decoder=generator_lm_head bias=generator_lm_head.bias",
    "distilbert": BERT + "base=distilbert types= layer=transformer.layer.{} query=attention.q_lin key=attention.k_lin "
    "value=attention.v_lin attended=attention.out_lin attention_norm=sa_layer_norm up=ffn.lin1 down=ffn.lin2 "
    "norm=output_layer_norm transform=vocab_transform transform_norm=vocab_layer_norm decoder=vocab_projector "
    "bias=vocab_projector.bias activation=activation inner_size=hidden_dim dropout=dropout "
    "attention_dropout=attention_dropout",
    "albert": BERT + "base=albert projection=encoder.embedding_hidden_mapping_in "
    "layer=encoder.albert_layer_groups.{}.albert_layers.{} query=attention.query key=attention.key "
    "value=attention.value attended=attention.dense attention_norm=attention.LayerNorm up=ffn down=ffn_output "
    "norm=full_layer_layer_norm transform=predictions.dense transform_norm=predictions.LayerNorm "
    "decoder=predictions.decoder bias=predictions.bias",
    "modernbert": "base=model words=embeddings.tok_embeddings decoder=decoder bias=decoder.bias "
    "activation=hidden_activation",
}
FAMILIES = {family: dict(pair.split("=") for pair in names.split()) for family, names in FAMILIES.items()}
MODEL_TYPES = tuple(sorted(FAMILIES))
OTHER_MODELS = "; run_mlm.py has more"
# Activations by the names that configurations have for them.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_10": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
    "laplace": lambda x: 0.5 * (1 + jax.scipy.special.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "linear": lambda x: x,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "hardswish": jax.nn.hard_swish,
    **{name: getattr(jax.nn, name) for name in ("leaky_relu", "mish", "relu", "relu6", "sigmoid", "silu", "tanh")},
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), jax.nn.gelu),
}
# Files of weights, in the order in which they are looked for.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack")
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}  # Parameter names: Flax to PyTorch.
SORTED_BLOCK = 64  # Token gradients in one matrix product; see `look_up`.
LINE_BY_LINE_DEFAULT = True  # The default of the original script: each text is a sample.
OPTIMIZER_FILES = ("optimizer.msgpack",)  # The optimizer state in a checkpoint.
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay")
MEETING_SECONDS = 300  # How long processes wait for each other at the start; JAX's default.
MAX_SHAPES = 6  # At most this many padded lengths: the step is compiled for each.
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
ENDING = threading.Lock()  # Taken by the thread that ends the process.
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
class TrainingArguments:
    """Arguments of the training loop, named as in the PyTorch script."""

    output_dir: Optional[str] = HfArg(default=None, help="Folder for the model, checkpoints, results and logs.")
    overwrite_output_dir: bool = HfArg(default=False, help="Overwrite the contents of output_dir.")
    do_train: bool = HfArg(default=False, help="Train.")
    do_eval: bool = HfArg(default=False, help="Evaluate.")
    train_batch_size: int = HfArg(default=8, help="Batch size per device.", aliases=["--per_device_train_batch_size"])
    eval_batch_size: int = HfArg(default=8, help="Evaluation batch size.", aliases=["--per_device_eval_batch_size"])
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches per optimizer step.")
    learning_rate: float = HfArg(default=5e-5, help="Base learning rate.")
    weight_decay: float = HfArg(default=0.0, help="Weight decay of AdamW (not of biases and layer norms).")
    adam_beta1: float = HfArg(default=0.9, help="Decay of Adam's first moment.")
    adam_beta2: float = HfArg(default=0.999, help="Decay of Adam's second moment.")
    adam_epsilon: float = HfArg(default=1e-8, help="Epsilon of Adam.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip gradients to this norm; 0 turns clipping off.")
    num_train_epochs: float = HfArg(default=3.0, help="Passes over the training data.")
    max_steps: int = HfArg(default=-1, help="Number of optimizer steps; overrides num_train_epochs if above 0.")
    lr_scheduler_type: str = HfArg(
        default="constant * linear_warmup * rsqrt_decay", help=f"{', '.join(SCHEDULES)}, or factors joined by *."
    )
    lr_scheduler_kwargs: Optional[str] = HfArg(
        default=None, help="JSON: num_decay_steps, decay_type, ... of warmup_stable_decay."
    )
    warmup_steps: float = HfArg(default=0, help="Steps of linear warmup; below 1, a share of all steps.")
    label_smoothing_factor: float = HfArg(default=0.0, help="Label smoothing of the training loss.")
    group_by_length: bool = HfArg(default=False, help="Group samples of similar length into batches.")
    dataloader_drop_last: bool = HfArg(default=True, help="Drop the last step of an epoch if it is incomplete.")
    eval_strategy: Literal["no", "steps", "epoch"] = HfArg(default="epoch", help="When to evaluate during training.")
    eval_steps: int = HfArg(default=500, help="Steps between evaluations with eval_strategy steps.")
    logging_steps: int = HfArg(default=500, help="Steps between reports of the training loss.")
    save_strategy: Literal["no", "steps", "epoch"] = HfArg(default="steps", help="When to save a checkpoint.")
    save_steps: int = HfArg(default=500, help="Steps between checkpoints with save_strategy steps.")
    save_total_limit: Optional[int] = HfArg(default=None, help="Keep at most this many checkpoints, the newest.")
    resume_from_checkpoint: Optional[str] = HfArg(default=None, help="Checkpoint (default: the newest in output_dir).")
    seed: int = HfArg(default=42, help="Seed of new weights, dropout, order and masks.")
    disable_tqdm: Optional[bool] = HfArg(default=None, help="No progress bars (default: if stderr is not a terminal).")
    bf16: bool = HfArg(default=False, help="Compute in bfloat16; the weights stay float32.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute layers in the backward pass to save memory.")
    push_to_hub: bool = HfArg(default=False, help="Upload the model, its card and results to the hub after training.")
    hub_model_id: Optional[str] = HfArg(default=None, help="Hub repository (default: the name of output_dir).")
    hub_token: Optional[str] = HfArg(default=None, repr=False, help="Hub token for the upload (default: HF_TOKEN).")
    hub_private_repo: Optional[bool] = HfArg(default=None, help="Make a new repository private.")
    coordinator_address: Optional[str] = HfArg(default=None, help="Address (host:port) of process 0, if several run.")
    num_processes: Optional[int] = HfArg(default=None, help="Number of processes; 1 disables cluster detection.")
    process_id: Optional[int] = HfArg(default=None, help="Rank of this process, starting at 0.")

    def __post_init__(self):
        self.drop_last_step = self.dataloader_drop_last  # `run_mlm.py` resets that flag.
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # Bars would leave fragments in a file.
        self.old_run, self.named_checkpoints = [], []  # Set by `find_checkpoint`.
        self.lr_scheduler_kwargs = json.loads(self.lr_scheduler_kwargs or "{}")
        if not isinstance(self.lr_scheduler_kwargs, dict):
            raise InputError("--lr_scheduler_kwargs must be a JSON object")
        create_schedule(self, num_steps=1)  # Only to raise its errors early.

    @property
    def should_log(self):
        """Whether this is the main process."""
        # Asking JAX starts its threads, after which tokenizing in several processes is not safe.
        return not jax.distributed.is_initialized() or jax.process_index() == 0

    @property
    def global_batch_size(self):
        """Samples per optimizer step, over all devices."""
        return self.train_batch_size * self.gradient_accumulation_steps * jax.device_count()

    @property
    def order_seed(self):
        """Seed of the order of the samples."""
        return self.seed

    @property
    def writes_results(self):
        """Whether this process writes to `output_dir`."""
        return (self.do_train or self.do_eval) and self.should_log


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
    """Return the order of an epoch's samples: int64 [N], whatever generator JAX is configured to use."""
    with jax.threefry_partitionable(True):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), epoch)
        return np.asarray(jax.random.permutation(key, num_samples), np.int64)


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


class FlaxDataCollatorForLanguageModeling(MaskingCollator):
    """The masking collator, with the name and `mask_tokens` of the Transformers example."""

    def __call__(self, examples, pad_to_multiple_of=None, length=0):
        """Return {"input_ids", "attention_mask", "labels"}, int32 [B, L]."""
        return self.collate(examples, pad_to_multiple_of, length)

    def mask_tokens(self, inputs, special_tokens_mask=None):
        """Return (inputs, labels), both int32 [B, L], for `inputs: int [B, L]` and a mask of the same shape."""
        special = self.is_special[inputs] if special_tokens_mask is None else special_tokens_mask
        rows = [self.mask({"input_ids": row, "special_tokens_mask": mask}) for row, mask in zip(inputs, special)]
        return tuple(np.stack(part) for part in zip(*rows))


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


def check_config(config):
    """Raise `InputError` for a setting that changes what the model computes, but is not implemented here."""
    wanted = {"is_decoder": (False,), "position_embedding_type": ("absolute", None), "quantization_config": (None,)}
    wanted |= {"sinusoidal_pos_embds": (False,), "pruned_heads": (None, {})}
    settings = [(name, getattr(config, name, values[0]) in values) for name, values in wanted.items()]
    names = [FAMILIES[config.model_type]["activation"], "classifier_activation"]
    settings += [(name, getattr(config, name, "gelu") in ACTIVATIONS) for name in names]
    heads = config.num_attention_heads
    settings.append(("num_attention_heads", heads > 0 and config.hidden_size % heads == 0))
    settings.append(("num_hidden_layers", config.num_hidden_layers > 0))
    if hasattr(config, "num_hidden_groups"):
        settings.append(("num_hidden_groups", 0 < config.num_hidden_groups <= config.num_hidden_layers))
    if config.model_type in OFFSET_POSITIONS:  # Positions are numbered from pad_token_id + 1.
        settings.append(("pad_token_id", config.pad_token_id is not None))
    if config.model_type == "modernbert":
        ropes = [config.rope_parameters[kind] for kind in set(config.layer_types)]
        settings.append(("rope_parameters", all(rope["rope_type"] == "default" for rope in ropes)))
    for name, holds in settings:
        if not holds:
            raise InputError(f"{name} {getattr(config, name)} is not supported for {config.model_type} here")


class Part(nn.Module):
    """A module whose submodules have the names of their counterparts in PyTorch.

    Parameters are float32; the computation has the type `dtype`. Dropout is on if there is a key named "dropout".
    """

    config: Any
    dtype: Any = jnp.float32
    attention: Optional[str] = None  # See `fused_attention`; unused with dropout.

    def setting(self, part):
        """Return a setting; its name in the configuration depends on the family."""
        return getattr(self.config, FAMILIES[self.config.model_type][part])

    def initializer(self, scale=1.0):
        """Return the distribution of new weights, whose standard deviation is multiplied by `scale`."""
        return nn.initializers.normal((self.config.initializer_range or 0.02) * scale)

    def dense(self, size, name, bias=True, scale=1.0):
        """Return a linear layer to [..., size]."""
        return nn.Dense(size, use_bias=bias, dtype=self.dtype, kernel_init=self.initializer(scale), name=name)

    def norm(self, name):
        """Return a layer norm."""
        return nn.LayerNorm(epsilon=getattr(self.config, "layer_norm_eps", 1e-12), dtype=self.dtype, name=name)

    def table(self, count, size, name, padding_id=None):
        """Return an embedding table, float32 [count, size]; a new one has zeros in the row of `padding_id`."""
        return Table(self.initializer(), count, size, padding_id, name=name)()

    def drop(self, inputs, rate):
        """Apply dropout."""
        return fast_dropout(inputs, rate, self.make_rng("dropout")) if rate and self.has_rng("dropout") else inputs

    def attend(self, query, key, value, mask, rate):
        """Return the attended values [B, L, H] of [B, L, heads, d]; `mask: bool [B, 1, 1 or L, L]` picks the keys."""
        length, width = query.shape[1], query.shape[-1]
        if rate and self.has_rng("dropout"):
            attended = dropped_attention(query, key, value, mask, self.make_rng("dropout"), rate)
        else:
            fused = self.attention if length % 2 == 0 and width in range(8, 129, 8) else None  # cuDNN's limits.
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, length)) if fused else mask
            attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=fused)
        return attended.reshape(*attended.shape[:2], -1)


class Table(nn.Module):
    """The parameters of an embedding: float32 [count, size]."""

    initializer: Any
    count: int
    size: int
    padding_id: Optional[int]

    @nn.compact
    def __call__(self):
        def init(*args):
            values = self.initializer(*args)
            return values if self.padding_id is None else values.at[self.padding_id].set(0)

        return self.param("embedding", init, (self.count, self.size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table, ids, padding_id=None):
    """Return the rows [..., H] of `table: [V, H]` for `ids: int [...]`; the row of `padding_id` gets no gradient.

    The gradient of a plain look-up adds each token's into its row, and thousands of additions to one row (the mask
    token's, the most frequent words') wait for each other on a GPU. Here tokens are sorted, equal ones in a block are
    added up by a product of matrices, and each block adds once to each of its rows.
    """
    return table[ids]


def look_up_backward(padding_id, saved, gradient):
    """Return the gradient of `look_up` for its table, and None for its ids."""
    (table, ids), size = saved, len(saved[0])
    ids = ids.ravel()
    ids = ids if padding_id is None else jnp.where(ids == padding_id, size, ids)  # What is added to row V is dropped.
    order, filling = jnp.argsort(ids), -len(ids) % SORTED_BLOCK
    rows = jnp.pad(gradient.reshape(-1, table.shape[1])[order], ((0, filling), (0, 0)))
    blocks = jnp.pad(ids[order], (0, filling), constant_values=size).reshape(-1, SORTED_BLOCK)
    equal = blocks[:, :, None] == blocks[:, None, :]
    rows = rows.reshape(*blocks.shape, -1)
    sums = jnp.einsum("nij,njh->nih", equal.astype(rows.dtype), rows, precision=lax.Precision.HIGHEST)
    is_first = equal.argmax(-1) == jnp.arange(SORTED_BLOCK)
    places = jnp.where(is_first, blocks, size).ravel()
    return jnp.zeros_like(table).at[places].add(sums.reshape(len(places), -1), mode="drop"), None


look_up.defvjp(lambda table, ids, padding_id: (table[ids], (table, ids)), look_up_backward)


def fast_dropout(inputs, rate, key):
    """Apply dropout by `dropout_mask`."""
    return jnp.where(dropout_mask(inputs.shape, rate, key), inputs / (1.0 - rate), 0)


def dropout_mask(shape, rate, key):
    """Return which values dropout keeps, bool: hashed ("lowbias32") from position and key, so never stored."""
    words = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    for word in jax.random.bits(key, (2,), jnp.uint32):
        words = words + word
        words = (words ^ (words >> 16)) * np.uint32(0x7FEB352D)
        words = (words ^ (words >> 15)) * np.uint32(0x846CA68B)
        words = words ^ (words >> 16)
    return words < np.uint32(min(round((1.0 - rate) * 2**32), 2**32 - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def dropped_attention(query, key, value, mask, rng, rate):
    """Return the attended values [B, L, heads, d], with dropout of the probabilities; arguments as of `Part.attend`.

    Of the arrays [B, heads, L, L], only the probabilities, in the type of `query`, are stored for the gradient. JAX's
    own gradient stores two: in float32, and after dropout.
    """
    return dropped_attention_forward(query, key, value, mask, rng, rate)[0]


def dropped_attention_forward(query, key, value, mask, rng, rate):
    """Return (attended values, what their gradient needs)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1]).astype(query.dtype)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores.astype(jnp.float32)).astype(scores.dtype)
    attended = jnp.einsum("bhqk,bkhd->bqhd", fast_dropout(probabilities, rate, rng), value)
    return attended, (query, key, value, rng, probabilities)


def dropped_attention_backward(rate, saved, gradient):
    """Return the gradients of `dropped_attention` for query, key and value."""
    query, key, value, rng, probabilities = saved
    # Dividing `dropped` instead would repeat the forward pass, whose result XLA would then store for reuse.
    gradient = gradient / (1.0 - rate)
    dropped = jnp.where(dropout_mask(probabilities.shape, rate, rng), probabilities, 0)
    products = dropped.astype(jnp.float32) * jnp.einsum("bqhd,bkhd->bhqk", gradient, value)
    scores = (products - probabilities * products.sum(-1, keepdims=True)) / math.sqrt(query.shape[-1])
    scores = scores.astype(query.dtype)
    for_query = jnp.einsum("bhqk,bkhd->bqhd", scores, key)
    for_key = jnp.einsum("bhqk,bqhd->bkhd", scores, query)
    return for_query, for_key, jnp.einsum("bhqk,bqhd->bkhd", dropped, gradient), None, None


dropped_attention.defvjp(dropped_attention_forward, dropped_attention_backward)


class BertLayer(Part):
    """Attention and feed-forward, each followed by dropout, residual and norm (BERT, Devlin et al. 2019)."""

    @nn.compact
    def __call__(self, hidden, mask, positions):
        """Return [B, L, H], or [K, H] at `positions: int [K]` in B * L, for `hidden: [B, L, H]`."""
        config, names = self.config, FAMILIES[self.config.model_type]
        heads = (*hidden.shape[:2], config.num_attention_heads, -1)
        query, key, value = (
            self.dense(config.hidden_size, names[part])(hidden).reshape(heads) for part in ("query", "key", "value")
        )
        attended = self.attend(query, key, value, mask, self.setting("attention_dropout"))
        if positions is not None:
            attended, hidden = select(attended, positions), select(hidden, positions)
        attended = self.dense(config.hidden_size, names["attended"])(attended)
        if config.model_type != "distilbert":  # DistilBERT has no dropout here.
            attended = self.drop(attended, self.setting("dropout"))
        hidden = self.norm(names["attention_norm"])(hidden + attended)
        inner = self.dense(self.setting("inner_size"), names["up"])(hidden)
        inner = self.dense(config.hidden_size, names["down"])(ACTIVATIONS[self.setting("activation")](inner))
        if config.model_type != "albert":  # ALBERT has no dropout here.
            inner = self.drop(inner, self.setting("dropout"))
        return self.norm(names["norm"])(hidden + inner)


def select(hidden, positions):
    """Return [K, H] of `hidden: [B, L, H]` at `positions: int [K]` in B * L, which are distinct."""
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)  # Its gradient adds: slow in bfloat16.
    return rows.at[positions].get(unique_indices=True).astype(hidden.dtype)


class MaskedLM(Part):
    """What all models share: word embeddings, and a decoder that may be tied to them."""

    gradient_checkpointing: bool = False

    def layer(self, kind, name, **settings):
        """Return a layer of the encoder; with gradient checkpointing, it stores its inputs only."""
        kind = nn.remat(kind) if self.gradient_checkpointing else kind
        return kind(self.config, self.dtype, self.attention, name=name, **settings)

    def words(self, input_ids, width):
        """Return (table float32 [V, width], embeddings float32 [B, L, width])."""
        config, names = self.config, FAMILIES[self.config.model_type]
        zero_id = None if config.model_type == "modernbert" else config.pad_token_id  # As in PyTorch.
        table = self.table(config.vocab_size, width, f"{names['base']}.{names['words']}", zero_id)
        return table, look_up(table, input_ids, config.pad_token_id)

    def decode(self, hidden, table, bias=True, scale=1.0):
        """Return the logits [..., V] of the head's hidden states."""
        config, names = self.config, FAMILIES[self.config.model_type]
        if not config.tie_word_embeddings:
            return self.dense(config.vocab_size, names["decoder"], bias, scale)(hidden)
        logits = hidden @ table.astype(self.dtype).T
        if not bias:
            return logits
        return logits + self.param(names["bias"], nn.initializers.zeros, (config.vocab_size,)).astype(self.dtype)


class FlaxBertForMaskedLM(MaskedLM):
    """BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019), XLM-R, CamemBERT, DistilBERT, ELECTRA's generator, ALBERT.

    Returns logits of the type `dtype`: [B, L, V], or [K, V] at `positions: int [K]` in B * L, for `input_ids` and
    `attention_mask`, both int [B, L]. After the last attention, only these positions are computed.
    """

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions=None):
        config, names = self.config, FAMILIES[self.config.model_type]
        base, width = names["base"], getattr(config, "embedding_size", config.hidden_size)
        table, hidden = self.words(input_ids, width)
        hidden = hidden + self.place(input_ids, width)
        if names["types"]:  # All tokens are of type 0.
            hidden = hidden + self.table(config.type_vocab_size, width, f"{base}.{names['types']}")[0]
        hidden = self.norm(f"{base}.{names['embedding_norm']}")(hidden)
        hidden = self.drop(hidden, self.setting("dropout"))
        if config.model_type == "albert" or width != config.hidden_size:
            hidden = self.dense(config.hidden_size, f"{base}.{names['projection']}")(hidden)
        mask, layers = (attention_mask > 0)[:, None, None, :], self.layers()
        for layer in layers[:-1]:
            hidden = layer(hidden, mask, None)
        hidden = layers[-1](hidden, mask, positions)
        activation = "gelu" if base in ("roberta", "electra") else self.setting("activation")
        hidden = ACTIVATIONS[activation](self.dense(width, names["transform"])(hidden))
        return self.decode(self.norm(names["transform_norm"])(hidden), table)

    def place(self, input_ids, width):
        """Return the position embeddings: [L, width], or [B, L, width] if positions skip padding."""
        config, names = self.config, FAMILIES[self.config.model_type]
        counted, name = config.model_type in OFFSET_POSITIONS, f"{names['base']}.{names['positions']}"
        padding_id = config.pad_token_id if counted else None
        table = self.table(config.max_position_embeddings, width, name, padding_id)
        if not counted:
            return table[: input_ids.shape[1]]
        real = input_ids != padding_id
        return look_up(table, jnp.cumsum(real, axis=1) * real + padding_id, padding_id)

    def layers(self):
        """Return the layers in the order of their use; those of ALBERT are used again and again."""
        config, names = self.config, FAMILIES[self.config.model_type]
        count, base = config.num_hidden_layers, names["base"]
        if config.model_type != "albert":
            return [self.layer(BertLayer, f"{base}.{names['layer'].format(i)}") for i in range(count)]
        groups = [
            [self.layer(BertLayer, f"{base}.{names['layer'].format(i, j)}") for j in range(config.inner_group_num)]
            for i in range(config.num_hidden_groups)
        ]
        return [layer for i in range(count) for layer in groups[int(i / (count / len(groups)))]]


class ModernPart:
    """The norms and new weights of ModernBERT."""

    def norm(self, name):
        """Return a layer norm."""
        config = self.config
        return nn.LayerNorm(epsilon=config.norm_eps, use_bias=config.norm_bias, dtype=self.dtype, name=name)

    def initializer(self, scale=1.0):
        """Return the distribution of new weights: normal, cut off at some standard deviations."""
        cutoff = 3.0 if self.config.initializer_cutoff_factor is None else self.config.initializer_cutoff_factor
        return nn.initializers.truncated_normal(self.config.initializer_range * scale, lower=-cutoff, upper=cutoff)

    @property
    def output_scale(self):
        """Scale of the new weights of layers that add to the residual stream."""
        return 1 / math.sqrt(2 * self.config.num_hidden_layers)


class ModernLayer(ModernPart, Part):
    """Norms first, rotary positions, gated feed-forward; attention may be within a window (ModernBERT)."""

    index: int = 0

    @nn.compact
    def __call__(self, hidden, mask, positions):
        """Return [B, L, H], or [K, H] at `positions: int [K]` in B * L, for `hidden: [B, L, H]`."""
        config, kind = self.config, self.config.layer_types[self.index]
        if kind == "sliding_attention":
            places = jnp.arange(hidden.shape[1])
            mask = mask & (abs(places[:, None] - places) <= config.local_attention // 2)
        normed = self.norm("attn_norm")(hidden) if self.index > 0 else hidden
        qkv = self.dense(3 * config.hidden_size, "attn.Wqkv", config.attention_bias)(normed)
        query, key, value = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, config.num_attention_heads, -1), 2, 0)
        theta, rate = config.rope_parameters[kind]["rope_theta"], config.attention_dropout
        attended = self.attend(rotate(query, theta), rotate(key, theta), value, mask, rate)
        if positions is not None:
            attended, hidden = select(attended, positions), select(hidden, positions)
        attended = self.dense(config.hidden_size, "attn.Wo", config.attention_bias, self.output_scale)(attended)
        hidden = hidden + self.drop(attended, rate)
        inner = self.dense(2 * config.intermediate_size, "mlp.Wi", config.mlp_bias)(self.norm("mlp_norm")(hidden))
        inner, gate = jnp.split(inner, 2, axis=-1)
        inner = self.drop(ACTIVATIONS[config.hidden_activation](inner) * gate, config.mlp_dropout)
        return hidden + self.dense(config.hidden_size, "mlp.Wo", config.mlp_bias, self.output_scale)(inner)


def rotate(inputs, theta):
    """Return [B, L, heads, d] with rotary position embeddings (Su et al. 2021)."""
    half = inputs.shape[-1] // 2
    angles = jnp.arange(inputs.shape[1])[:, None] / theta ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(inputs.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(inputs.dtype)


class FlaxModernBertForMaskedLM(ModernPart, MaskedLM):
    """ModernBERT (Warner et al. 2024); arguments and result as in `FlaxBertForMaskedLM`."""

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions=None):
        config, last = self.config, self.config.num_hidden_layers - 1
        table, hidden = self.words(input_ids, config.hidden_size)
        hidden = self.drop(self.norm("model.embeddings.norm")(hidden), config.embedding_dropout)
        mask = (attention_mask > 0)[:, None, None, :]
        for i in range(config.num_hidden_layers):
            layer = self.layer(ModernLayer, f"model.layers.{i}", index=i)
            hidden = layer(hidden, mask, positions if i == last else None)
        hidden = self.norm("model.final_norm")(hidden)
        hidden = self.dense(config.hidden_size, "head.dense", config.classifier_bias, self.output_scale)(hidden)
        hidden = self.norm("head.norm")(ACTIVATIONS[config.classifier_activation](hidden))
        return self.decode(hidden, table, config.decoder_bias, self.output_scale)


def masked_logits(params, batch, dropout_rng=None, *, model):
    """Return logits: [K, V] at the `positions` of a batch (flat in [B * L]) if it names them, else [B, L, V].

    Dropout is on if there is a `dropout_rng`.
    """
    rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
    inputs = batch["input_ids"], batch["attention_mask"], batch.get("positions")
    return model.apply({"params": params}, *inputs, rngs=rngs)


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


def load_model(model_args, config, tokenizer, training_args, new_tokens=None, checkpoint=None):
    """Return (model, parameters): those of a checkpoint, pretrained, or random; they fit the tokenizer."""
    name, size = checkpoint or model_args.model_name_or_path, max(tokenizer.get_vocab().values()) + 1
    overrides = f" with --config_overrides {model_args.config_overrides}" if model_args.config_overrides else ""
    if checkpoint:
        config.vocab_size = max(size, config.vocab_size)  # A checkpoint has the rows of all tokens.
    with user_errors(f"the model {name or config.model_type}{overrides}"):
        check_config(config)
        weights = {}
        if name:
            options = {} if checkpoint else model_args.model_options
            weights = match_weights(read_weights(name, options), create_model(config, training_args), name)
        if size > config.vocab_size:
            add_rows(weights, config, size)
        model = create_model(config, training_args)
        params = create_parameters(model, weights, training_args.seed)
        if new_tokens and not checkpoint:
            fill_new_rows(params, config, new_tokens)
    return model, params


def create_model(config, training_args):
    """Return the model of a configuration, without parameters."""
    kind = FlaxModernBertForMaskedLM if config.model_type == "modernbert" else FlaxBertForMaskedLM
    dtype, attention = (jnp.bfloat16, fused_attention()) if training_args.bf16 else (jnp.float32, None)
    return kind(config, dtype, attention, training_args.gradient_checkpointing)


@functools.cache
def fused_attention():
    """Return the name of JAX's fused attention for bfloat16, or None where it does not run: it needs an NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None

    def total(inputs):
        mask = jnp.ones((1, 1, *inputs.shape[1:2] * 2), bool)
        return jax.nn.dot_product_attention(inputs, inputs, inputs, mask=mask, implementation="cudnn").sum()

    try:
        inputs = np.ones((jax.local_device_count(), 1, 64, 1, 64), jnp.bfloat16)
        jax.block_until_ready(jax.pmap(jax.grad(total))(inputs))
    except Exception as error:  # No document says which cards, drivers and cuDNN versions work.
        logger.warning(f"Attention is not fused on this GPU: {str(error).splitlines()[0]}")
        return None
    return "cudnn"


def vocabulary_names(config):
    """Return the PyTorch names of the parameters that have a row for each token."""
    names = FAMILIES[config.model_type]
    words, decoder = f"{names['base']}.{names['words']}.weight", names["decoder"]
    return {words, f"{decoder}.weight", f"{decoder}.bias", names["bias"]}


def parameter_name(path):
    """Return the PyTorch name of a parameter: its path joined by dots, its last part renamed by `LEAVES`."""
    return ".".join([*path[:-1], LEAVES.get(path[-1], path[-1])])


def parameter_shapes(model, seed=0):
    """Return {path: shape and type} of the parameters of a model."""
    ids = jnp.ones((1, 1), jnp.int32)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(seed), ids, ids)["params"])


def create_parameters(model, weights, seed):
    """Return the tree of parameters, NumPy arrays: from `weights`, by PyTorch name, or random if not there."""
    shapes, params = parameter_shapes(model), {}
    if any(parameter_name(path) not in weights for path in shapes):
        ids = jnp.ones((1, 1), jnp.int32)
        new = jax.jit(model.init)(jax.random.key(seed), ids, ids)["params"]
        params = jax.tree.map(np.array, flatten_dict(new))
    for path in shapes:
        if parameter_name(path) in weights:
            values = weights[parameter_name(path)]
            params[path] = np.array(values.T if path[-1] == "kernel" else values, np.float32)
    return unflatten_dict(params)


def read_weights(name, options):
    """Return {PyTorch name: array} of a model folder or hub name; raises `InputError` if it has no known file."""
    if ".ckpt" in os.path.basename(name) and not os.path.isdir(name):
        return read_tensorflow_weights(name.removesuffix(".index"))
    for file in WEIGHT_FILES:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        if path:
            break
    else:
        raise InputError(f"there is none of {', '.join(WEIGHT_FILES)}")
    paths = [path]
    if path.endswith(".index.json"):
        paths, _ = get_checkpoint_shard_files(name, path, **options)
    return {key: value for path in paths for key, value in read_weight_file(path).items()}


def read_weight_file(path):
    """Return {PyTorch name: array} of one file."""
    if path.endswith(".safetensors"):
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return load_file(path)
    if path.endswith(".msgpack"):
        with open(path, "rb") as file:
            params = flatten_dict(serialization.msgpack_restore(file.read()))
        return {parameter_name(key): value.T if key[-1] == "kernel" else value for key, value in params.items()}
    try:
        import torch
    except ImportError:
        raise InputError(f"{path} is read with PyTorch, which is not installed (pip install torch)") from None
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value.float().numpy() for key, value in weights.items()}


def match_weights(weights, model, source):
    """Return the weights under the names of the model's parameters; log what is missing and what is left over.

    Raises `InputError` for a weight of the wrong shape, or if no weight of the encoder is found.
    """
    names, found, left = FAMILIES[model.config.model_type], {}, set(weights)
    prefix = f"{names['base']}."
    for path, value in parameter_shapes(model).items():
        name = parameter_name(path)
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        # Old files, a model without head, and the bias of an untied decoder, which may be in two places.
        forms = [name, old, name.removeprefix(prefix), old.removeprefix(prefix)]
        forms += [names["bias"]] if name == f"{names['decoder']}.bias" else []
        form = next((form for form in forms if form in weights), None)
        if form:
            shape = value.shape[::-1] if path[-1] == "kernel" else value.shape
            if weights[form].shape != shape:
                raise InputError(f"{form} has the shape {weights[form].shape}; the configuration asks for {shape}")
            found[name] = weights[form]
            left.discard(form)
    if not any(name.startswith(prefix) for name in found):
        raise InputError(f"it holds no weights of the type {model.config.model_type}")
    missing = [parameter_name(path) for path in parameter_shapes(model) if parameter_name(path) not in found]
    left = [name for name in left - vocabulary_names(model.config) if not name.endswith("position_ids")]
    for what, these in (("lacks these, newly initialized", missing), ("has weights that are not used", left)):
        if these:
            logger.warning(f"{source} {what}: {', '.join(sorted(these))}")
    return found


def add_rows(weights, config, size):
    """Give embeddings and decoder rows for `size` tokens: new rows are the mean of the old ones, new biases are 0."""
    for name in vocabulary_names(config) & weights.keys():
        old = np.asarray(weights[name], np.float32)
        mean = old.mean(0, keepdims=True) if old.ndim > 1 else np.zeros(1, np.float32)
        weights[name] = np.concatenate([old, np.repeat(mean, size - len(old), axis=0)])
    config.vocab_size = size


def fill_new_rows(params, config, new_tokens):
    """Set the rows of new tokens, in all parameters with a row per token, to the mean of the rows of their pieces."""
    for path, values in flatten_dict(params).items():
        if parameter_name(path) in vocabulary_names(config):
            rows = values.T if path[-1] == "kernel" else values
            for new_id, pieces in new_tokens.items():
                rows[new_id] = rows[pieces].mean(0)


def pytorch_weights(params, config):
    """Return {name: array} of the parameters, under the names and in the layout of the PyTorch model."""
    weights, names = {}, FAMILIES[config.model_type]
    for path, value in flatten_dict(jax.device_get(params)).items():
        weights[parameter_name(path)] = np.ascontiguousarray(value.T if path[-1] == "kernel" else value)
    if f"{names['decoder']}.bias" in weights:  # The PyTorch model has it twice.
        weights[names["bias"]] = weights[f"{names['decoder']}.bias"]
    return weights


# ---- 5. Training ----------------------------------------------------------------------------------------------------
def create_learning_rate_scheduler(
    factors="constant * linear_warmup * rsqrt_decay",
    base_learning_rate=0.5,
    warmup_steps=1000,
    decay_factor=0.5,
    steps_per_decay=20000,
    steps_per_cycle=100000,
):
    """Return step -> learning rate: the product of named factors (Flax, examples/lm1b); `InputError` if unknown."""
    warmup = max(1, warmup_steps)  # The divisor.

    def linear_warmup(step):
        return jnp.minimum(1.0, step / warmup) if warmup_steps else 1.0

    def cosine(step):
        progress = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
        return 0.5 * (1.0 + jnp.cos(jnp.pi * (progress % 1.0)))

    known = {
        "constant": lambda step: base_learning_rate,
        "linear_warmup": linear_warmup,
        "rsqrt_decay": lambda step: 1.0 / jnp.sqrt(jnp.maximum(step, warmup)),
        "rsqrt_normalized_decay": lambda step: jnp.sqrt(warmup / jnp.maximum(step, warmup)),
        "decay_every": lambda step: decay_factor ** (step // steps_per_decay),
        "cosine_decay": cosine,
    }
    names = [name.strip() for name in factors.split("*")]
    for name in names:
        if name not in known:
            raise InputError(f"unknown factor {name!r} in the schedule {factors!r}; known: {', '.join(known)}")
    return lambda step: jnp.asarray(math.prod(known[name](step) for name in names), jnp.float32)


def warmup_stable_decay(rate, warmup, num_steps, num_decay_steps, decay_type="cosine", min_lr_ratio=0.0):
    """Return step -> learning rate: warmup, a constant rate, a decay at the end (Transformers, `get_wsd_schedule`)."""
    if decay_type not in ("linear", "cosine", "1-sqrt"):
        raise InputError(f"decay_type {decay_type} is not linear, cosine or 1-sqrt")
    if type(num_decay_steps) is not int or not isinstance(min_lr_ratio, (int, float)):
        raise InputError(f"num_decay_steps {num_decay_steps} or min_lr_ratio {min_lr_ratio} is not a number")
    length = max(1, num_decay_steps)

    def schedule(step):
        done = jnp.clip((step - num_steps + num_decay_steps) / length, 0, 1)
        decay = {"linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2, "1-sqrt": 1 - jnp.sqrt(done)}
        factor = jnp.where(step < warmup, step / max(1, warmup), decay[decay_type])
        return rate * (min_lr_ratio + (1 - min_lr_ratio) * factor)

    return schedule


def create_schedule(args, num_steps):
    """Return step -> learning rate for `lr_scheduler_type`: factors, or the Trainer's schedule of that name."""
    rate, warmup, name = args.learning_rate, args.warmup_steps, args.lr_scheduler_type
    warmup = int(warmup) if warmup >= 1 else math.ceil(warmup * num_steps)
    timescale = warmup or 10_000
    if name == "warmup_stable_decay":
        with user_errors("--lr_scheduler_kwargs"):
            # `bind` makes a wrong name a user error; raised by the call itself, it would count as a bug (see `is_bug`).
            inspect.signature(warmup_stable_decay).bind(rate, warmup, num_steps, **args.lr_scheduler_kwargs)
            return warmup_stable_decay(rate, warmup, num_steps, **args.lr_scheduler_kwargs)
    if args.lr_scheduler_kwargs:
        raise UserError("--lr_scheduler_kwargs is for warmup_stable_decay only")
    schedules = {
        "linear": optax.linear_schedule(rate, 0.0, max(1, num_steps - warmup)),
        "cosine": optax.cosine_decay_schedule(rate, max(1, num_steps - warmup)),
        "constant": optax.constant_schedule(rate),
        "constant_with_warmup": optax.constant_schedule(rate),
        "inverse_sqrt": lambda step: rate * jnp.sqrt(timescale / (jnp.maximum(step, 0) + timescale)),
    }
    if name not in schedules:
        return create_learning_rate_scheduler(name, rate, warmup)
    if name == "constant" or not warmup:
        return schedules[name]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedules[name]], [warmup])


def create_optimizer(args, schedule):
    """Return AdamW after clipping by the global norm; biases and layer norms do not decay, as in the Trainer."""

    def decays(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    betas = {"b1": args.adam_beta1, "b2": args.adam_beta2, "eps": args.adam_epsilon}
    adamw = optax.adamw(schedule, **betas, weight_decay=args.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm or math.inf), adamw)


def compute_metrics(logits, labels, weights, label_smoothing=0.0):
    """Return the sums {"loss", "accuracy", "normalizer"}: `logits: [..., V]`, `labels` and `weights: [...]`."""
    loss, normalizer = cross_entropy(logits, labels, weights, label_smoothing)
    return {"loss": loss, "accuracy": accuracy(logits, labels, weights), "normalizer": normalizer}


def accuracy(logits, targets, weights=None):
    """Return the weighted hits for `logits: [..., V]`, `targets: int [...]`; raises `ValueError` for other shapes."""
    check_shapes(logits, targets)
    hits = jnp.argmax(logits, -1) == targets
    return jnp.sum(hits if weights is None else hits * weights)


def cross_entropy(logits, targets, weights=None, label_smoothing=0.0):
    """Return (sum of the weighted losses, sum of the weights) for `logits: [..., V]`, `targets: int [...]`.

    The other tokens share the probability `label_smoothing`, and the lowest possible loss is subtracted (Flax,
    examples/lm1b). Raises `ValueError` for other shapes.
    """
    check_shapes(logits, targets)
    logits = logits.astype(jnp.float32)
    # A comparison, because the gradient of indexing would be a scatter into zeros as large as the logits.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    loss = jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_target, logits, 0).sum(-1)
    if label_smoothing > 0:
        confidence, low = 1.0 - label_smoothing, label_smoothing / (logits.shape[-1] - 1)
        lowest = -(confidence * math.log(confidence) + label_smoothing * math.log(low))
        others = -jax.nn.log_softmax(logits).sum(-1) - loss
        loss = confidence * loss + low * others - lowest
    weights = jnp.ones_like(loss) if weights is None else weights
    return (loss * weights).sum(), weights.sum()


def check_shapes(logits, targets):
    """Raise `ValueError` if the targets do not have the shape of the logits without their last axis."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets of shape {targets.shape} do not fit logits of shape {logits.shape}")


def mean_metrics(loss, hits, count):
    """Return {"loss", "accuracy", "perplexity"} from sums over `count` masked tokens; perplexity is inf on overflow."""
    mean, accuracy = float(loss) / max(int(count), 1), float(hits) / max(int(count), 1)
    return {"loss": mean, "accuracy": accuracy, "perplexity": math.inf if mean > 700 else math.exp(mean)}


class TrainState(train_state.TrainState):
    """Parameters, AdamW state and step, and the gradient norm of the last step."""

    grad_norm: jax.Array


def training_step(state, batch, dropout_rng, *, label_smoothing=0.0):
    """Return (loss, state, dropout_rng) after one update, under `jax.pmap` over the axis "batch".

    `batch` holds arrays int32 [B, ...], or [A, B, ...] to accumulate the gradients of A batches. The loss is the mean
    over the labels (those of 0 and above) of all devices and batches. Dropout is a function of (`dropout_rng` of the
    device, step, batch of the step).
    """
    if batch["input_ids"].ndim == 2:
        batch = jax.tree.map(lambda array: array[None], batch)
    # Each device divides its sum by the mean count: the mean over the devices is then that over all labels.
    count = jnp.maximum(lax.pmean((batch["labels"] >= 0).sum().astype(jnp.float32), "batch"), 1e-9)

    def batch_loss(params, batch, rng):
        logits, labels = state.apply_fn(params, batch, rng), batch["labels"]
        return cross_entropy(logits, jnp.maximum(labels, 0), labels >= 0, label_smoothing)[0] / count

    def accumulate(total, inputs):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(batch_loss)(state.params, *inputs)), None

    num_batches = len(batch["labels"])
    inputs = batch, jax.random.split(jax.random.fold_in(dropout_rng, state.step), num_batches)
    if num_batches == 1:  # Without a second copy of the gradients.
        inputs = jax.tree.map(lambda array: array[0], inputs)
        loss, gradients = jax.value_and_grad(batch_loss)(state.params, *inputs)
    else:
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        (loss, gradients), _ = lax.scan(accumulate, zero, inputs)
    if lax.axis_size("batch") > 1:  # XLA would copy all gradients of a single device.
        loss, gradients = lax.pmean((loss, gradients), "batch")
    return loss, state.apply_gradients(grads=gradients, grad_norm=optax.tree.norm(gradients)), dropout_rng


def eval_step(params, batch, *, apply_fn):
    """Return the sums {"loss", "accuracy", "normalizer"} of each sample, [D, B] on every device, under `jax.pmap`."""
    size, length = batch["input_ids"].shape
    logits, labels = apply_fn(params, batch), batch["labels"].ravel()
    positions = batch.get("positions", jnp.arange(size * length))
    logits = logits.reshape(-1, logits.shape[-1])
    metrics = jax.vmap(compute_metrics)(logits, jnp.maximum(labels, 0), labels >= 0)
    sums = jax.tree.map(lambda values: jax.ops.segment_sum(values, positions // length, size), metrics)
    return lax.all_gather(sums, "batch")


def generate_batch_splits(samples_idx, batch_size, drop_last=True):
    """Return the batches of an order of samples; the last one, if it is incomplete, is dropped or kept."""
    stop = len(samples_idx) // batch_size * batch_size if drop_last else len(samples_idx)
    return [samples_idx[i : i + batch_size] for i in range(0, stop, batch_size)]


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


def connect_processes(data_args, args):
    """Join the other processes of the run: as the flags say, or as JAX finds them on SLURM, Open MPI or a TPU pod."""
    tasks = args.num_processes or os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    if jax.distributed.is_initialized() or (tasks in (1, "1") and not args.coordinator_address):
        return
    place, detection = (args.coordinator_address, args.num_processes, args.process_id), None
    if None not in place:
        meet_processes(*place)
        detection = "deactivate"  # With SLURM's variables, JAX would use one GPU in each process.
    jax.config.update("jax_enable_preemption_service", False)  # It would catch SIGTERM instead of `StopSignals`.
    try:
        jax.distributed.initialize(*place, cluster_detection_method=detection, shutdown_timeout_seconds=60)
    except (ValueError, RuntimeError) as error:
        # There is no cluster, or this is not the first run of this interpreter.
        alone = "coordinator_address should" in str(error) or "must be called before" in str(error)
        if args.coordinator_address or args.num_processes or not alone:
            raise UserError(f"--coordinator_address {args.coordinator_address}: {error}") from error
        return
    if data_args.preprocessing_num_workers:
        raise UserError("--preprocessing_num_workers does not work with several processes: tokenize in an earlier run")
    # Connect the devices while all processes are here: Gloo waits 30 seconds for the first operation of a group.
    multihost_utils.process_allgather(np.zeros(1))
    jax.pmap(lambda value: lax.psum(value, "batch"), "batch")(np.zeros(jax.local_device_count()))


def meet_processes(address, count, process_id):
    """Wait until all processes have told process 0 their ids; raises `UserError` where JAX would abort in minutes."""
    host, _, port = address.rpartition(":")
    tqdm.write(f"process {process_id} of {count} meets the others at {address}", file=sys.stderr)
    with user_errors(f"--coordinator_address {address}"):
        if not host or not port.isdecimal():
            raise InputError("must be HOST:PORT, where process 0 is reached")
        if process_id == 0:
            problem = collect_ids(int(port), count)
        else:
            problem = send_id((host.strip("[]"), int(port)), count, process_id)
        if problem:
            raise InputError(problem)


def collect_ids(port, count):
    """Wait for the ids of the other processes at this port; tell each what is wrong with them, and return it, or ""."""
    ids, connections, problem, deadline = {0}, [], "", time.monotonic() + MEETING_SECONDS
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), family=family, dualstack_ipv6=both))
        while len(ids) < count and not problem:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(number) for number in range(count) if number not in ids)
                problem = f"process {missing} did not report in {MEETING_SECONDS} seconds; check its output and address"
                break
            connection.settimeout(5)
            with contextlib.suppress(OSError, ValueError):  # Something else may have connected.
                number, its_count = map(int, connection.recv(100).split())
                connections.append(connection)
                if its_count != count:
                    problem = f"--num_processes is {count} in process 0 and {its_count} in process {number}"
                elif number in ids or number >= count:
                    problem = f"--process_id {number} is given twice, or is not below --num_processes {count}"
                ids.add(number)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall((problem or "complete").encode())
    return problem


def send_id(address, count, process_id):
    """Tell process 0 the id of this process; return what process 0 finds wrong with all ids, or ""."""
    cause, deadline = "", time.monotonic() + MEETING_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=10) as connection:
                connection.settimeout(2 * MEETING_SECONDS)
                connection.sendall(f"{process_id} {count}".encode())
                if reply := connection.makefile().read():
                    return reply.removeprefix("complete")
        except socket.gaierror:
            raise
        except OSError as error:  # Process 0 may not have started yet.
            cause = error
        time.sleep(0.2)
    return f"process 0 did not answer in {MEETING_SECONDS} seconds ({cause}); check its output and this address"


@contextlib.contextmanager
def ending_together():
    """If one process ends early, end all, because the others would wait for it forever."""
    if not jax.distributed.is_initialized():
        yield
        return
    finished, client = threading.Event(), distributed.global_state.client

    def watch():
        with contextlib.suppress(RuntimeError):  # Process 0 was killed: JAX ends this one.
            while not finished.wait(0.5):
                for _, message in client.key_value_dir_get("end"):
                    end_processes(*json.loads(message))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except SystemExit as stop:
        with contextlib.suppress(RuntimeError):
            client.wait_at_barrier("stop", 5000)  # A signal in the training stops all at the same step.
            raise
        end_processes("stopped by a signal", stop.code)
    except Exception as error:
        cause = str(error)
        if is_lost_connection(error):
            cause = f"another process of this run has ended; see its error ({error})"
        elif not isinstance(error, UserError) or os.environ.get("MLM_DEBUG") == "1":
            sys.excepthook(type(error), error, error.__traceback__)
            cause = f"{type(error).__name__}: {error}"
        end_processes(cause, 2)
    finally:
        finished.set()
        watcher.join()


def end_processes(cause, status):
    """Print why this process ends, tell the others, and end it even if one of its threads waits for a device."""
    ENDING.acquire()  # Never released: only the first cause is reported.
    print_error(cause)
    client = distributed.global_state.client
    with contextlib.suppress(RuntimeError):  # Another process was first.
        client.key_value_set("end/cause", json.dumps([f"process {jax.process_index()}: {cause}", status]))
    with contextlib.suppress(RuntimeError):  # A process that was killed does not come.
        client.wait_at_barrier("end", 5000)
    if jax.process_index() == 0:
        time.sleep(2)  # The others must end first, or JAX aborts them.
    sys.stdout.flush()
    os._exit(status)


@contextlib.contextmanager
def main_process_first(name):
    """Run the block in the main process first, so that the others find its cache; go on when all have run it."""
    if not jax.distributed.is_initialized():
        yield
        return
    client = distributed.global_state.client

    def wait_until_done(count):
        # A barrier on the devices would time out after half an hour.
        while len(client.key_value_dir_get(name)) < count:
            time.sleep(0.2)

    wait_until_done(min(1, jax.process_index()))
    yield
    client.key_value_set(f"{name}/{jax.process_index()}", "done", allow_overwrite=True)
    wait_until_done(jax.process_count())


def largest_of_processes(*values):
    """Return the largest of each value over all processes; with several of them, this waits for their devices."""
    if jax.process_count() == 1:
        return values
    return multihost_utils.process_allgather(np.array(values)).max(axis=0).tolist()


class MaskedLMTrainer:
    """Trains and evaluates a model, and writes its files: what this script needs of the Trainer, under its names."""

    def __init__(self, groups, model, params, tokenizer, tokenized, max_seq_length):
        model_args, data_args, self.args = self.groups = groups
        self.model, self.params, self.tokenizer, self.max_seq_length = model, params, tokenizer, max_seq_length
        self.train_dataset, self.eval_dataset = tokenized.get("train"), tokenized.get("validation")
        self.pad_to_max_length, self.sparse_head = data_args.pad_to_max_length, not model_args.dense_head
        self.data_collator = FlaxDataCollatorForLanguageModeling(tokenizer, **masking_settings(data_args, self.args))
        check_masks(self.eval_dataset, self.data_collator)
        self.settings = run_settings(data_args, self.args, max_seq_length, tokenized.get("train", ()))
        self.apply_fn = functools.partial(masked_logits, model=model)
        self.eval_step = jax.pmap(functools.partial(eval_step, apply_fn=self.apply_fn), "batch")
        self.largest = jax.pmap(lambda values: lax.pmax(values, "batch"), "batch")
        self.writer = None
        if self.args.should_log and EventFileWriter:
            with write_errors(self.args.output_dir, "the reports"):
                self.writer = EventFileWriter(os.path.join(self.args.output_dir, "logs"))
        if self.args.push_to_hub and self.args.should_log:
            create_repository(self.args)  # Fails before the training, not after it.
        # All that changes during a run.
        self.state = self.plan = self.schedule = None  # `TrainState` on every device, `RunPlan`, step -> learning rate.
        self.step, self.losses, self.log_history = 0, LossSums(), []
        self.timer = 0, 0.0  # Step and time from which `tokens_per_second` is measured.
        self.unread = []  # Losses and notices of the latest steps, on the devices.
        self.stop_signal = 0  # A signal that any process has received, known one step late.
        self.slots = collections.deque()  # K of the batches to come; see `batches`.
        self.eval_slots = []  # K of each batch of an evaluation, with several processes.

    @property
    def epoch(self):
        """{"epoch": passes over the training data so far}, or {} without training."""
        return {"epoch": self.plan.epoch(self.step)} if self.plan else {}

    @property
    def device_params(self):
        """The parameters on every device: those of the training, if there was one."""
        return self.state.params if self.state else jax_utils.replicate(self.params, axis_name="batch")

    def log(self, logs, seconds_per_step=0.0):
        """Record values in the history and in TensorBoard, under the Trainer's names."""
        logs = {**logs, **self.epoch}
        self.log_history.append({**logs, "step": self.step})
        if not self.args.should_log:
            return
        if not self.args.disable_tqdm:
            tqdm.write(str({name: float(f"{value:.6g}") for name, value in logs.items()}))
        elif self.plan and "train_loss" not in logs:
            log_report(logs, self.step, self.plan.num_steps, seconds_per_step)
        if self.writer:
            values = []
            for name, value in logs.items():
                chart = "eval" if name.startswith("eval_") or name == "perplexity" else "train"
                values.append(Summary.Value(tag=f"{chart}/{name.removeprefix('eval_')}", simple_value=value))
            with write_errors(self.args.output_dir, "the reports"):
                self.writer.add_event(Event(step=self.step, wall_time=time.time(), summary=Summary(value=values)))

    def progress_bar(self, items, name, **settings):
        """Return the items, with a progress bar in the main process unless `--disable_tqdm`."""
        return tqdm(items, name, disable=self.args.disable_tqdm or not self.args.should_log, **settings)

    def batch(self, dataset, keys, rows, accumulation=1):
        """Return this process's part of the batch of samples `keys`: arrays [D, A, B, L], D its own devices.

        The longest sample of all processes sets the length, rounded up to one of at most `MAX_SHAPES` lengths.
        """
        places = np.arange(len(keys)).reshape(accumulation, jax.process_count(), -1)
        own_keys = [keys[i] for i in places[:, jax.process_index()].ravel()]
        if isinstance(dataset, StreamedDataset):
            samples, longest = own_keys, max(len(sample["input_ids"]) for sample in keys)
        else:
            samples, longest = dataset.__getitems__(own_keys), dataset.lengths[[key.index for key in keys]].max()
        length = padded_length(longest, self.max_seq_length)
        batch = self.data_collator(samples, length=self.max_seq_length if self.pad_to_max_length else length)
        return {name: a.reshape(accumulation, -1, rows, a.shape[-1]).swapaxes(0, 1) for name, a in batch.items()}

    def needed_slots(self, batch, epoch=0):
        """Return the K that the labels of this process's part of a batch fit in; 0 for a dense head."""
        return label_slots(batch["labels"], self.data_collator.probability(epoch)) if self.sparse_head else 0

    def exchange(self, notice):
        """Return the largest of each value of the notices of all processes, int32 [D, 2], without waiting for them."""
        notices = np.tile(np.array(notice, np.int32), (jax.local_device_count(), 1))
        return self.largest(notices) if jax.process_count() > 1 else notices

    def batches(self, signals):
        """Yield (batch, notice) for each step to come.

        All processes compile the same step, so they need the same K, the largest one. A notice is [a signal that this
        process has received, the K that it needs for the batch after the next one]: the notices are exchanged while
        the devices compute, and a step later, `read_steps` reads the largest. So no step waits for an exchange.
        """
        sizes = self.args.train_batch_size, self.args.gradient_accumulation_steps
        made = (self.batch(self.train_dataset, keys, *sizes) for keys in self.plan.steps())
        ahead = collections.deque(itertools.islice(made, 2))
        self.slots.extend(largest_of_processes(*map(self.needed_slots, ahead)))
        while ahead:
            batch, notice = ahead.popleft(), [signals.number, 0]
            for later in itertools.islice(made, 1):
                ahead.append(later)
                notice[1] = self.needed_slots(later)
            yield select_slots(batch, self.slots.popleft()), notice

    def train(self, checkpoint, signals):
        """Train, save the model and its results, and return the metrics.

        Exits with 128 + signal, checkpoint saved, if SIGTERM or SIGINT reaches any of the processes.
        """
        args, start = self.args, time.time()
        self.resume(checkpoint)
        dropout_rngs = self.create_state(checkpoint)
        step_fn = functools.partial(training_step, label_smoothing=args.label_smoothing_factor)
        step_fn = jax.pmap(step_fn, "batch", donate_argnums=(0, 2))
        with signals.defer():
            self.make_up_evaluation()
            self.timer = self.step, time.perf_counter()
            bar = self.progress_bar(self.batches(signals), "Training", total=self.plan.num_steps, initial=self.step)
            for batch, notice in bar:
                loss, self.state, dropout_rngs = step_fn(self.state, batch, dropout_rngs)
                self.read_steps()  # The step before, while the devices compute this one.
                self.step += 1
                self.unread.append((loss, self.exchange(notice)))
                self.end_step(signals)
            replace_old_run(args, trained=self.step > self.plan.first_step)
            self.save_model(args.output_dir)
            (stop_signal,) = largest_of_processes(signals.number)
            if stop_signal:
                signals.stop(stop_signal, " after the last step; the model is saved")
        metrics = speed_metrics("train", start, self.plan.num_samples(self.step), self.step - self.plan.first_step)
        metrics = {"train_loss": self.losses.mean(), **metrics, **self.epoch, "train_samples": len(self.train_dataset)}
        metrics = training_results(args, metrics)
        self.log({name: value for name, value in metrics.items() if name != "train_samples"})
        self.save_metrics("train", metrics)
        return metrics

    def resume(self, checkpoint):
        """Set plan, history and learning rate of a new run, or of one that continues from a checkpoint."""
        self.plan, self.losses = resume_run(self.train_dataset, self.args, self.settings, checkpoint)
        self.step, num_steps = self.plan.first_step, self.plan.num_steps
        if self.step > num_steps:
            raise UserError(f"checkpoint-{self.step} is already past the {num_steps} steps asked for")
        if checkpoint:
            self.log_history = read_state(checkpoint)["log_history"]
        logger.info(f"Resuming from {checkpoint}." if checkpoint else f"Starting a new run in {self.args.output_dir}.")
        self.schedule = create_schedule(self.args, num_steps)
        warmup = self.args.warmup_steps if self.args.warmup_steps >= 1 else self.args.warmup_steps * num_steps
        places = [*np.linspace(0, num_steps - 1, 10_000), *(warmup + place for place in (-1, 0, 1))]
        peak = float(jax.vmap(self.schedule)(np.clip(np.round(places), 0, num_steps - 1).astype(int)).max())
        num_parameters = sum(value.size for value in jax.tree.leaves(self.params))
        log_training(self.args, num_parameters, self.step, num_steps, peak)

    def create_state(self, checkpoint):
        """Set the state on every device, new or as in a checkpoint, which every process reads; return dropout keys."""
        optimizer = create_optimizer(self.args, self.schedule)
        opt_state = optimizer.init(self.params)
        if checkpoint:
            path = os.path.join(checkpoint, "optimizer.msgpack")
            with user_errors(f"the optimizer state in {checkpoint}"), open(path, "rb") as file:
                opt_state = serialization.from_bytes(opt_state, file.read())
        values = {"params": self.params, "opt_state": opt_state, "grad_norm": jnp.zeros(())}
        state = TrainState(step=self.step, apply_fn=self.apply_fn, tx=optimizer, **values)
        self.state = jax_utils.replicate(state, axis_name="batch")
        keys = jax.random.split(jax.random.key(self.args.seed, impl="rbg"), jax.device_count())
        first = jax.process_index() * jax.local_device_count()
        # Same sharding as the step's outputs; otherwise the second call recompiles.
        return jax.device_put(keys[first : first + jax.local_device_count()], self.state.step.sharding)

    def is_due(self, strategy, interval):
        """Return whether a strategy evaluates or saves at this step."""
        if strategy == "epoch":
            return self.plan.ends_epoch(self.step)
        return strategy == "steps" and (self.step % interval == 0 or self.step == self.plan.num_steps)

    def evaluation_is_due(self):
        """Return whether to evaluate at this step; the evaluation of the last step follows the training."""
        due = self.args.do_eval and self.is_due(self.args.eval_strategy, self.args.eval_steps)
        return due and self.step < self.plan.num_steps

    def make_up_evaluation(self):
        """Evaluate if a signal stopped the run before the evaluation that was due at this step."""
        evaluated = [entry["step"] for entry in self.log_history if "eval_loss" in entry]
        if self.step > 0 and self.evaluation_is_due() and self.step not in evaluated:
            self.evaluate()

    def end_step(self, signals):
        """Report, evaluate and save what is due; after a signal, save before an evaluation, and exit."""
        args, stop_signal = self.args, self.stop_signal if jax.process_count() > 1 else signals.number
        if self.plan.is_stream:
            self.train_dataset.forget_blocks_before(self.plan.position(self.step).sample)
        if self.step % args.logging_steps == 0 or self.step == self.plan.num_steps:
            self.log_losses()
        if self.evaluation_is_due() and not stop_signal:
            self.evaluate()
        if stop_signal or self.is_due(args.save_strategy, args.save_steps):
            self.read_steps()
            self.save_checkpoint()
        if stop_signal:
            multihost_utils.sync_global_devices("saved")
            signals.stop(stop_signal, f"; checkpoint-{self.step} is saved")

    def read_steps(self):
        """Wait for the latest steps; count their losses and note what was exchanged with them."""
        first = self.step - len(self.unread) + 1
        for step, (loss, notice) in enumerate(jax.device_get(self.unread), first):
            self.losses.add(float(loss[0]), step)
            self.stop_signal, slots = notice[0].tolist()
            self.slots.append(slots)
        self.unread = []

    def log_losses(self):
        """Log mean loss and speed since the last report, and the last rate and gradient norm."""
        self.read_steps()
        step, start = self.timer
        samples, seconds = self.plan.num_samples(self.step) - self.plan.num_samples(step), time.perf_counter() - start
        logs = {"loss": self.losses.report(), "grad_norm": float(self.state.grad_norm[0])}
        logs["learning_rate"] = float(self.schedule(self.step - 1))
        logs["tokens_per_second"] = round(self.train_dataset.lengths.mean() * samples / seconds)
        self.log(logs, seconds / max(1, self.step - step))
        self.timer = self.step, time.perf_counter()

    def evaluate(self):
        """Evaluate on all validation samples; log and return the metrics."""
        dataset, rows, start, params = self.eval_dataset, self.args.eval_batch_size, time.time(), self.device_params
        keys = [SampleKey(index) for index in range(len(dataset))]
        batches = generate_batch_splits(keys, rows * jax.device_count(), drop_last=False)
        batches = [fill_up(batch, rows * jax.device_count()) for batch in batches]
        if jax.process_count() > 1 and not self.eval_slots:  # The masks are the same in each evaluation.
            needed = (self.needed_slots(self.batch(dataset, keys, rows), EVAL_EPOCH) for keys in batches)
            self.eval_slots = largest_of_processes(*needed)
        parts = []
        for i, keys in enumerate(self.progress_bar(batches, "Evaluating", leave=False)):
            batch = self.batch(dataset, keys, rows)
            slots = self.eval_slots[i] if self.eval_slots else self.needed_slots(batch, EVAL_EPOCH)
            batch = {name: array[:, 0] for name, array in select_slots(batch, slots).items()}
            part = self.eval_step(params, batch)
            parts.append({name: array.addressable_data(0) for name, array in part.items()})
        parts = jax.device_get(parts)
        sums = {name: sum(np.sum(part[name], dtype=np.float64) for part in parts) for name in parts[0]}
        metrics = mean_metrics(sums["loss"], sums["accuracy"], sums["normalizer"])
        metrics["masked_share"] = float(sums["normalizer"] / dataset.lengths.sum())
        metrics = {name if name == "perplexity" else f"eval_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics("eval", start, len(dataset), len(batches))
        self.log(metrics)
        self.timer = self.step, time.perf_counter()
        return {**metrics, **self.epoch, "eval_samples": len(dataset)}

    def save_model(self, folder):
        """Have the main process write model and tokenizer, as a Transformers folder that both scripts load."""
        if not self.args.should_log:
            return
        config = copy.deepcopy(self.model.config)
        config.dtype = "float32"  # That of the weights, whatever the model was loaded from.
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForMaskedLM"]
        with write_errors(self.args.output_dir, "the model"):
            config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            weights = pytorch_weights(jax_utils.unreplicate(self.state.params), config)
            save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
            follow_umask(folder)

    def save_checkpoint(self):
        """Have the main process write `checkpoint-N`; `trainer_state.json` comes last and makes it complete."""
        args, folder = self.args, os.path.join(self.args.output_dir, f"checkpoint-{self.step}")
        replace_old_run(args)
        self.save_model(folder)
        if args.should_log:
            with write_errors(args.output_dir, "a checkpoint"):
                opt_state = jax.device_get(jax_utils.unreplicate(self.state.opt_state))
                with open(os.path.join(folder, "optimizer.msgpack"), "wb") as file:
                    file.write(serialization.to_bytes(opt_state))
                self.save_state(folder)
                rotate_checkpoints(args, args.save_total_limit, self.step)
            logger.info(f"Saved {folder}.")
        self.timer = self.step, time.perf_counter()

    def save_state(self, folder):
        """Write what the Trainer writes to `trainer_state.json`, as far as this loop has it."""
        state = {**self.epoch, "global_step": self.step, "max_steps": self.plan.num_steps}
        for name in ("num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size"):
            state[name] = getattr(self.args, name)
        run = run_state(self.plan, self.losses, self.settings, self.step)
        state |= {"log_history": self.log_history, "stateful_callbacks": {"run": run}}
        write_json(os.path.join(folder, "trainer_state.json"), state)

    def save_metrics(self, split, metrics):
        """Have the main process log the metrics of a split and write them as the Trainer does."""
        folder = self.args.output_dir
        if not self.args.should_log:
            return
        log_metrics(split, metrics)
        save_results(folder, split, metrics)
        if self.args.do_train:
            with write_errors(folder, "the results"):
                self.save_state(folder)

    def show_predictions(self):
        """Log the predictions for a few samples of the validation data."""
        predict = functools.partial(jax.jit(self.apply_fn), jax_utils.unreplicate(self.device_params))
        log_predictions(self.eval_dataset, self.data_collator, predict)

    def publish(self, metrics):
        """Have the main process write the model card and, with `--push_to_hub`, upload the files of the model.

        The card of a finished run stays as it is: nothing was trained with the flags of this command.
        """
        args, trained = self.args, self.step > self.plan.first_step
        if not args.should_log:
            return
        if trained or not os.path.exists(os.path.join(args.output_dir, "README.md")):
            write_card(self, self.groups, self.log_history, metrics)
        if args.push_to_hub:
            with user_errors(f"--push_to_hub failed; the model is saved in {args.output_dir}"):
                HfApi(token=args.hub_token).upload_folder(
                    repo_id=create_repository(args),
                    folder_path=args.output_dir,
                    allow_patterns=[*PUBLISHED, *self.tokenizer.vocab_files_names.values()],
                )


def select_slots(batch, slots):
    """Return a batch whose labels are those at `slots` positions: int32 [..., K] in place of [..., B, L]."""
    return batch | select_labels(batch["labels"], slots) if slots else batch


class CompiledCode(lru_cache.LRUCache):
    """JAX's folder of compiled code; replaces an entry that cannot be read, which JAX would keep forever."""

    def put(self, key, value):
        """Write an entry; called only for one that is missing or could not be read."""
        (self.path / f"{key}-cache").unlink(missing_ok=True)
        super().put(key, value)


def keep_compiled_code(model_args):
    """Keep compiled code for later runs: where JAX was told to, or else in the cache folder."""
    compilation_cache.LRUCache = CompiledCode
    if not jax.config.jax_compilation_cache_dir:
        folder = model_args.cache_dir or datasets.config.HF_CACHE_HOME
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def create_repository(args):
    """Create the hub repository unless it exists and return its full name."""
    name = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    with user_errors(f"--push_to_hub: the repository {name}"):
        return HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


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
    keep_compiled_code(model_args)
    connect_processes(data_args, training_args)
    setup_logging(training_args)
    atexit.register(ignore_signals)
    with StopSignals() as signals, ending_together(), output_lock(training_args), logging_redirect_tqdm():
        checkpoint = find_checkpoint(model_args, data_args, training_args)
        tokenizer = load_tokenizer(model_args)
        new_tokens = add_new_tokens(tokenizer, model_args.new_tokens)
        config = load_config(model_args, tokenizer)
        max_seq_length = choose_max_seq_length(data_args, tokenizer, config)
        if not training_args.should_log:
            data_args.overwrite_cache = False  # The main process overwrites it, before the others read it.
        with main_process_first("tokenizing"):
            raw_datasets = needed_splits(load_raw_datasets(model_args, data_args), data_args, training_args)
            tokenized = tokenize_datasets(raw_datasets, tokenizer, data_args, max_seq_length, training_args)
        check_samples(tokenized, training_args)
        log_new_tokens(new_tokens, tokenized.get("train"))
        if not (training_args.do_train or training_args.do_eval):
            logger.info("The data, unless streamed, is tokenized and cached. Give --do_train or --do_eval to use it.")
            return {}

        model, params = load_model(model_args, config, tokenizer, training_args, new_tokens, checkpoint)
        groups = model_args, data_args, training_args
        trainer = MaskedLMTrainer(groups, model, params, tokenizer, tokenized, max_seq_length)
        metrics = {}
        if training_args.do_train:
            metrics |= trainer.train(checkpoint, signals)
        if training_args.do_eval:
            eval_metrics = trainer.evaluate()
            trainer.save_metrics("eval", eval_metrics)
            trainer.show_predictions()
            metrics |= eval_metrics
        with main_process_first("publishing"):  # When one process exits, JAX stops the others, which may still write.
            if training_args.do_train:
                trainer.publish(metrics)
        return metrics


if __name__ == "__main__":
    main()
