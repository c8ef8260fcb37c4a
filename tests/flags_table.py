"""Print the tables of flags of both scripts; with --write, put them into configs/README.md, and write flags.json.

python tests/flags_table.py --write
"""

import argparse
import enum
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_mlm  # noqa: E402
import run_mlm_flax  # noqa: E402

FLAGS = ROOT / "tests" / "flags.json"
BEGIN, END = "<!-- flags: made by tests/flags_table.py -->", "<!-- end of flags -->"
GROUPS = ("ModelArguments", "DataTrainingArguments", "TrainingArguments")
# The Trainer has some 130 arguments, described in the Transformers documentation: here are the most used.
TRAINER_FLAGS = {
    "fp16": "Mixed precision in float16 (GPU only).",
    "gradient_checkpointing": "Less memory for more computation.",
    "torch_compile": "Compile the model with `torch.compile`.",
    "optim": "Optimizer.",
    "dataloader_num_workers": "Processes that make batches (default: up to 4 with an NVIDIA or AMD GPU, else none).",
    "load_best_model_at_end": "Save the best checkpoint's model, not the last one.",
    "metric_for_best_model": "What is best: `loss`, `accuracy` or `perplexity` of the evaluation.",
    "report_to": "Where to log: `tensorboard`, `wandb`, `none`, … (default: all that are installed).",
    "run_name": "Name of the run in those logs.",
    "hub_strategy": "When to upload with `--push_to_hub`: `end`, `every_save`, `checkpoint` or `all_checkpoints`.",
}
# What the help of one script cannot say about the other.
NOTES = {"lr_scheduler_type": "Factors are for Flax alone; PyTorch takes all schedules of the Trainer."}


def read_fields(script):
    """Return {flag: (group, all names, default, help)} of a script's three argument groups."""
    found = {}
    for group in GROUPS:
        for item in fields(getattr(script, group)):
            aliases = [alias.lstrip("-") for alias in item.metadata.get("aliases", [])]
            default = item.default if item.default is not MISSING else None
            found[item.name] = group, [item.name, *aliases], default, item.metadata.get("help", "")
    return found


def show_default(value):
    """Return a default value as README writes it."""
    if value is None:
        return "not set"
    if isinstance(value, enum.Enum):
        value = value.value
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def show_names(names):
    """Return the names of one flag as README writes them."""
    return ", ".join(f"`--{name}`" for name in names)


def show_help(name, text):
    """Return the help as README writes it: one line, without the architectures, which are other ones in each script."""
    if name == "model_type":
        text = text.split(":")[0] + "; `--help` lists them."
    return " ".join([*text.replace("|", "\\|").split(), *NOTES.get(name, "").split()])


def make_table(rows):
    """Return the lines of a Markdown table of (names, default, help)."""
    return ["| flag | default | what it does |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]


def make_tables():
    """Return the Markdown of all tables, markers included."""
    torch_flags, flax_flags = read_fields(run_mlm), read_fields(run_mlm_flax)
    by_alias = {alias: name for name, (_, names, _, _) in torch_flags.items() for alias in names}
    shared = {group: [] for group in GROUPS}
    flax_only = []
    for name, (group, names, default, text) in flax_flags.items():
        row = [show_names(names), show_default(default), show_help(name, text)]
        if name not in by_alias:
            flax_only.append(row)
            continue
        torch_default = torch_flags[by_alias[name]][2]
        if torch_default != default:
            row[1] = f"{show_default(torch_default)}; Flax: {row[1]}"
        shared[group].append(row)
    torch_only = [
        [show_names([name]), show_default(torch_flags[name][2]), text] for name, text in TRAINER_FLAGS.items()
    ]
    lines = [BEGIN, "", "### Both scripts: model", "", *make_table(shared["ModelArguments"])]
    lines += ["", "### Both scripts: data", "", *make_table(shared["DataTrainingArguments"])]
    lines += ["", "### Both scripts: training", "", *make_table(shared["TrainingArguments"])]
    lines += ["", "### `run_mlm.py` alone", ""]
    lines += ["The other arguments of `transformers.TrainingArguments` work too, except a few that an error names."]
    lines += ["The Transformers documentation describes them. The most used:", ""]
    lines += make_table(torch_only)
    if flax_only:
        lines += ["", "### `run_mlm_flax.py` alone", "", *make_table(flax_only)]
    else:
        lines += ["", "### `run_mlm_flax.py` alone", "", "None: it takes the flags of the first three tables."]
    return "\n".join([*lines, "", END])


def replace_tables(readme):
    """Return the text of the file with fresh tables between the markers."""
    before, rest = readme.split(BEGIN)
    return before + make_tables() + rest.split(END)[1]


def own_flags(script):
    """Return {name: [type, default]} of the flags that a script declares itself, without those of the Trainer."""
    groups = [getattr(script, group) for group in GROUPS]
    return {
        name: [str(kind), getattr(group, name)]
        for group in groups
        for name, kind in vars(group)["__annotations__"].items()
    }


def list_flags():
    """Return the content of flags.json: a change of a flag is a change of this file, which a reader of it sees."""
    flags = {script.__name__: own_flags(script) for script in (run_mlm, run_mlm_flax)}
    return json.dumps(flags, indent=1) + "\n"


def main():
    """Print the tables, or write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write both files")
    if not parser.parse_args().write:
        print(make_tables())
        return
    path = ROOT / "configs" / "README.md"
    path.write_text(replace_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    FLAGS.write_text(list_flags(), encoding="utf-8")


if __name__ == "__main__":
    main()
