"""Train each masked-LM architecture of Transformers in `run_mlm.py`, publish it, and evaluate what was published.

    python tests/architectures.py [--only bert --only esm]

Prints a Markdown table. In each variant a tiny pretrained model is trained for three steps and evaluated, and its
output folder is evaluated again, which must give the same loss, and loaded by Transformers, which must find nothing
missing and nothing left over. The variants: the model with a tokenizer of its size; with one whose padding has another
id than the model's; with one that is larger and has new tokens; without tied weights. The exit status is 1 if one of
them is neither equal nor refused in one line.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from conftest import ROOT, flags, make_tokenizer, read_json, sentences, write_lines

sys.path.insert(0, str(ROOT))
from test_architectures import CHANGES, LENGTH, PYTORCH, small_settings

import run_mlm

VARIANTS = ("plain", "other padding", "new tokens", "untied")


def make_folder(folder, model_type, variant):
    """Write a tiny model of an architecture with random weights and biases, and a tokenizer; return its flags."""
    folder.mkdir()
    tokenizer = make_tokenizer(folder, extra=["sunflower", "windmill"] if variant == "new tokens" else ())
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class(**small_settings(config_class(), CHANGES.get(model_type, {})))
    text_config = config.get_text_config()
    text_config.vocab_size = len(tokenizer) - 2 * (variant == "new tokens")
    text_config.pad_token_id = 1 if variant == "other padding" else tokenizer.pad_token_id
    config.tie_word_embeddings = text_config.tie_word_embeddings = variant != "untied"
    torch.manual_seed(0)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    if variant == "new tokens":
        path = write_lines(folder / "new_tokens.txt", ["bakes bread", "harbours"])
        return flags(model_name_or_path=folder, new_tokens=path)
    return flags(model_name_or_path=folder)


def try_variant(folder, model_type, variant):
    """Return "ok", what differs, or the error line that refuses the variant."""
    model = make_folder(folder / "model", model_type, variant)
    texts = {"validation_file": write_lines(folder / "validation.txt", sentences(20, seed=1)), "do_eval": True}
    texts |= {"max_seq_length": LENGTH, "line_by_line": "true", "eval_batch_size": 4}
    training = {"train_file": write_lines(folder / "train.txt", sentences(40)), "do_train": True, "max_steps": 3}
    training |= {"learning_rate": 1e-3, "weight_decay": 0.1}
    output, errors = folder / "output", io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            trained = run_mlm.main([*model, *flags(output_dir=output, **texts, **training)])
            again = run_mlm.main(flags(model_name_or_path=output, output_dir=folder / "again", **texts))
    except SystemExit:
        return next(line for line in errors.getvalue().splitlines() if line.startswith("error: "))
    if abs(trained["eval_loss"] - again["eval_loss"]) > 1e-6 * trained["eval_loss"]:
        return f"loss {trained['eval_loss']:.4f}, published {again['eval_loss']:.4f}"
    with contextlib.redirect_stderr(io.StringIO()):
        _, loading = transformers.AutoModelForMaskedLM.from_pretrained(output, output_loading_info=True)
    if found := {name: sorted(keys) for name, keys in loading.items() if keys}:
        return f"loading: {found}"
    before, after = (read_json(path, "config.json").get("pad_token_id") for path in (folder / "model", output))
    return "ok" if before == after else f"pad_token_id {before} became {after}"


def try_architecture(model_type, work):
    """Return {variant: its result} of an architecture."""
    results = {}
    for variant in VARIANTS:
        folder = Path(tempfile.mkdtemp(dir=work))
        results[variant] = try_variant(folder, model_type, variant)
        shutil.rmtree(folder)
    return results


def main():
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = set().union(*PYTORCH.values())
    parser.add_argument("--only", action="append", choices=sorted(known), help="default: all")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = 0
    print(f"| architecture | {' | '.join(VARIANTS)} |\n| --- {'| --- ' * len(VARIANTS)}|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for model_type in arguments.only or sorted(known):
            results = try_architecture(model_type, work)
            print(f"| {model_type} | {' | '.join(results.values())} |", flush=True)
            failed += sum(not result.startswith(("ok", "error: ")) for result in results.values())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
