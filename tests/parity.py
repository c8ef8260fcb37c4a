"""Compare the models of `run_mlm_flax.py` with those of Transformers in PyTorch, in float32.

    python tests/parity.py [--only bert --only modernbert]

Prints a table of the largest differences, relative to the largest value, for each family: logits, loss and gradients of
tiny random models with padding left and right, the loss of an evaluation, and the losses of 50 steps without dropout
with both scripts. The exit status is 1 if one is above 1e-5, or 1e-3 in the training.
"""

import argparse
import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from conftest import ROOT, flags, make_tokenizer, pytest_unconfigure, read_json, sentences, write_lines

sys.path.insert(0, str(ROOT))
import run_mlm
import run_mlm_flax

VOCABULARY, LENGTH = 160, 21
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
CHANGES = {  # Every setting that a family has and that the others have not is at an unusual value.
    "bert": {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    "distilbert": {"n_layers": 3, "dim": 24, "n_heads": 3, "hidden_dim": 40, "activation": "relu"},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, "attention_bias": True, "norm_bias": True},
}
CHANGES["modernbert"] |= {"mlp_bias": True, "classifier_bias": True, "classifier_activation": "silu"}
CHANGES["modernbert"] |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)


def make_config(family, **changes):
    """Return a tiny configuration without dropout."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 3}
    sizes |= (SIZES if family != "distilbert" else {}) | CHANGES.get(family, {}) | changes
    config = transformers.CONFIG_MAPPING[family](**sizes)
    for name, value in config.to_dict().items():
        if "dropout" in name and value:
            setattr(config, name, 0.0)
    return config


def make_model(config):
    """Return the PyTorch model; no parameter is at a special value such as 0 or 1, that of the padding included."""
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_batch(config, length=LENGTH):
    """Return int [B, L] arrays: a full row, rows padded right and left; some visible tokens are padding tokens."""
    rng = np.random.default_rng(0)
    batch = {"input_ids": rng.integers(0, config.vocab_size, (3, length)), "attention_mask": np.ones((3, length), int)}
    for row, padded in ((1, slice(length - 5, None)), (2, slice(5))):
        batch["attention_mask"][row, padded] = 0
        batch["input_ids"][row, padded] = config.pad_token_id
    labelled = (rng.random((3, length)) < 0.3) & (batch["attention_mask"] == 1)
    batch["labels"] = np.where(labelled, rng.integers(0, config.vocab_size, (3, length)), -100)
    return batch


def create(config, model, **settings):
    """Return (own model, its parameters) with the weights of a PyTorch model."""
    own = run_mlm_flax.create_model(config, run_mlm_flax.TrainingArguments(**settings))
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return own, run_mlm_flax.create_parameters(own, run_mlm_flax.match_weights(weights, own, "the model"), 0)


def mean_loss(params, batch, model):
    """Return the loss over the labels."""
    labels = batch["labels"]
    total, count = run_mlm_flax.cross_entropy(
        run_mlm_flax.masked_logits(params, batch, model=model), jnp.maximum(labels, 0), labels >= 0
    )
    return total / count


def relative(found, expected, least=0.0):
    """Return the largest difference relative to the largest value."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), least, 1e-30))


def differences(config):
    """Return {"logits", "loss", "gradients"}: relative differences between both models, at all and at K positions."""
    model, batch = make_model(config).train(), make_batch(config)
    output = model(**{name: torch.tensor(array) for name, array in batch.items()})
    output.loss.backward()
    named = model.named_parameters(remove_duplicate=False)  # Tied ones have several names.
    gradients = {name: value.grad.numpy() for name, value in named if value.grad is not None}
    least = 1e-3 * max(np.abs(gradient).max() for gradient in gradients.values())  # Those of key biases are zero.
    own, params = create(config, model)
    visible = batch["attention_mask"] == 1
    logits = run_mlm_flax.masked_logits(params, batch, model=own)
    found = {"logits": relative(logits[visible], output.logits.detach().numpy()[visible]), "loss": 0, "gradients": 0}
    slots = int((batch["labels"] >= 0).sum()) + 3  # Some are filled up.
    for inputs in (batch, batch | run_mlm_flax.select_labels(batch["labels"], slots)):
        loss, tree = jax.jit(jax.value_and_grad(functools.partial(mean_loss, model=own)))(params, inputs)
        ours = run_mlm_flax.pytorch_weights(tree, config)
        found["loss"] = max(found["loss"], relative(loss, output.loss.item()))
        for name in ours.keys() if config.tie_word_embeddings else gradients.keys():
            found["gradients"] = max(found["gradients"], relative(ours[name], gradients[name], least))
    return found


def train(family, folder):
    """Return (loss of an evaluation, losses of 50 steps) of each script."""
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    config = make_config(family, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    make_model(config).save_pretrained(folder)
    settings = {"model_name_or_path": folder, "train_file": write_lines(folder / "train.txt", sentences(120))}
    settings |= {"validation_file": write_lines(folder / "validation.txt", sentences(30, seed=1)), "do_eval": True}
    settings |= {"max_seq_length": 16, "line_by_line": "true", "logging_steps": 1, "dropout_rate": 0}
    training = {"do_train": True, "max_steps": 50, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    results = []
    for script in (run_mlm, run_mlm_flax):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            evaluated = script.main(flags(output_dir=folder / f"{script.__name__}-eval", **settings))
            script.main(flags(output_dir=folder / script.__name__, **settings, **training))
        history = read_json(folder, script.__name__, "trainer_state.json")["log_history"]
        results.append((evaluated["eval_loss"], np.array([entry["loss"] for entry in history if "loss" in entry])))
    return results


def main():
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=run_mlm_flax.MODEL_TYPES, help="default: all")
    status = 0
    print(f"Transformers {transformers.__version__}, JAX {jax.__version__}, PyTorch {torch.__version__}\n")
    print("| family | logits | loss | gradients | evaluation | 50 steps |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        for family in parser.parse_args().only or run_mlm_flax.MODEL_TYPES:
            found = [differences(make_config(family, tie_word_embeddings=tied)) for tied in (True, False)]
            row = [max(each[name] for each in found) for name in ("logits", "loss", "gradients")]
            (evaluated, losses), (own_evaluated, own_losses) = train(family, Path(work) / family)
            row += [relative(own_evaluated, evaluated), relative(own_losses, losses)]
            print(f"| {family} | {' | '.join(f'{value:.1e}' for value in row)} |", flush=True)
            status |= max(row[:4]) > 1e-5 or row[4] > 1e-3
    pytest_unconfigure()
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
