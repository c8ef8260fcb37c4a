"""README and the pages beside it tell the truth; the two scripts are one program in two copies."""

import ast
import importlib
import re
import shlex
from dataclasses import fields

import flags_table
import pytest
from conftest import ROOT, SCRIPTS, read_json

PAGES = [ROOT / path for path in ("README.md", "configs/README.md", "tests/README.md", "tests/benchmarks/README.md")]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
FLAGS = TEXTS[ROOT / "configs" / "README.md"]
README = TEXTS[ROOT / "README.md"] + FLAGS
# Flags of other programs that README shows.
FOREIGN_FLAGS = {
    "shape",
    "previous",
    "rounds",
    "nproc_per_node",
    "num_cores",
    "config_file",
    "logdir",
    "nodes",
    "ntasks",
    "help",
    "write",
}
FOREIGN_FLAGS |= {"xla_force_host_platform_device_count"}
# The usage examples of the documented scripts, and the files that hold the same settings.
DOCUMENTED = {
    "bert_wikitext": (
        "run_mlm",
        "--model_name_or_path bert-base-uncased --dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 "
        "--do_train --do_eval --output_dir ./output/mlm-bert --per_device_train_batch_size 8 --num_train_epochs 3",
    ),
    "roberta_line_by_line": (
        "run_mlm",
        "--model_name_or_path roberta-base --train_file ./data/train.txt --validation_file ./data/valid.txt "
        "--do_train --do_eval --line_by_line --max_seq_length 128 --mlm_probability 0.15 "
        "--output_dir ./output/mlm-roberta --overwrite_output_dir",
    ),
    "bert_flax_wikitext": (
        "run_mlm_flax",
        "--model_name_or_path bert-base-cased --dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 "
        "--do_train --do_eval --output_dir ./output/mlm-flax-bert --train_batch_size 32 --num_train_epochs 3 "
        "--learning_rate 5e-5",
    ),
    "bert_flax_files": (
        "run_mlm_flax",
        "--model_name_or_path bert-base-cased --train_file ./data/train.txt --validation_file ./data/valid.txt "
        "--do_train --do_eval --max_seq_length 128 --mlm_probability 0.15 --output_dir ./output/mlm-flax-custom "
        "--overwrite_output_dir",
    ),
}


# The files of the user in the commands.
FILES = "my.txt my.jsonl my_ref.txt valid.txt valid.jsonl valid_ref.txt words.txt texts/a.txt texts/a.jsonl.zst"
FILES += " test.txt data/train.txt data/valid.txt"


@pytest.fixture
def folder_of_a_user(tmp_path, monkeypatch):
    """The working directory: the configurations of the project, and files of the user."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in FILES.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the baker")
    monkeypatch.chdir(tmp_path)


def readme_commands():
    """Return (script, arguments) of every call of a script in README's code blocks and tables."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [part for line in lines for part in line.split("&&")]
    lines += [code for line in README.splitlines() if line.startswith("|") for code in re.findall(r"`([^`]+)`", line)]
    calls = [re.search(r"\bpython (run_mlm|run_mlm_flax)\.py\b(.*)", line) for line in lines]
    return [(call[1], shlex.split(call[2], comments=True)) for call in calls if call]


def settings(script, argv):
    """Return all settings of a command line in one dictionary."""
    groups = importlib.import_module(script).parse_args(argv)
    values = {item.name: getattr(group, item.name) for group in groups for item in fields(group)}
    values.pop("logging_dir", None)  # Holds the time of day.
    values["dataloader_drop_last"] = groups[2].drop_last_step  # The Trainer's own is always off.
    return values


def known_flags():
    """Return every flag that one of the scripts takes."""
    found = set()
    for script in map(importlib.import_module, SCRIPTS):
        parser = script.ArgumentParser((script.ModelArguments, script.DataTrainingArguments, script.TrainingArguments))
        found |= set(re.findall(r"(?<![\w-])--(\w+)", parser.format_help()))
    return found


def test_the_tables_and_the_list_of_flags_are_fresh():
    """A flag comes, goes or changes only on purpose: the change is then in `flags.json`."""
    assert flags_table.replace_tables(FLAGS) == FLAGS, "run: python tests/flags_table.py --write"
    assert flags_table.list_flags() == flags_table.FLAGS.read_text(), "run: python tests/flags_table.py --write"


def test_every_flag_in_readme_exists():
    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", README))
    assert named - known_flags() <= FOREIGN_FLAGS


def anchors(text):
    """Return the anchors of the headings of a Markdown text, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_every_file_in_readme_exists():
    named = set(re.findall(r"(?:\bconfigs|\btests|\.ci)/[\w./-]*\w", README))
    named |= set(re.findall(r"`(\w+\.(?:py|toml|md)|requirements\.txt)`", README))
    assert {"configs/quickstart.json", "run_mlm.py", "run_mlm_flax.py", ".ci/run"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_command_in_readme_parses(folder_of_a_user, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    commands = readme_commands()
    assert len(commands) > 10
    for script, argv in commands:
        assert settings(script, argv)["output_dir"]


@pytest.mark.parametrize("name", ["quickstart", "from_scratch"])
def test_one_config_means_the_same_to_both_scripts(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = f"configs/{name}.json"
    assert {script for script, argv in readme_commands() if argv[:1] == [path]} == set(SCRIPTS)
    per_script = [settings(script, [path]) for script in SCRIPTS]
    for values in per_script:
        values["train_batch_size"] = values.get("per_device_train_batch_size", values.get("train_batch_size"))
        values["eval_batch_size"] = values.get("per_device_eval_batch_size", values.get("eval_batch_size"))
    for key in read_json(ROOT, path):
        assert per_script[0][key] == per_script[1][key], key


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documented_examples_are_the_configs_of_the_same_settings(name, folder_of_a_user):
    script, command = DOCUMENTED[name]
    assert settings(script, [str(ROOT / "configs" / f"{name}.json")]) == settings(script, shlex.split(command))


# Names of both scripts that stand for different code in each: the framework's part.
DIFFERENT = {
    *("MODEL_TYPES", "LINE_BY_LINE_DEFAULT", "OPTIMIZER_FILES", "TrainingArguments", "load_model", "epoch_permutation"),
    *("OTHER_MODELS", "add_rows", "fill_new_rows", "main"),
    *("main_process_first", "ending_together", "MaskedLMTrainer"),
}


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def definitions(name):
    """Return {name: source} of the functions, classes and constants at the top of a script."""
    lines, found = source(name).splitlines(), {}
    for node in ast.parse(source(name)).body:
        if isinstance(node, ast.Assign | ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
            key = node.targets[0].id if isinstance(node, ast.Assign) else node.name
            found[key] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_shared_names_have_the_same_source():
    one, other = map(definitions, SCRIPTS)
    shared = one.keys() & other.keys()
    assert {name for name in shared if one[name] != other[name]} == DIFFERENT
    assert len(shared) > 50
