"""Try each flag with values at and beyond its edges, or a bug in each function, on a tiny model in forked runs.

    python tests/mistakes.py flags --script run_mlm --only data_seed --only optim
    python tests/mistakes.py bugs --script run_mlm_flax

With a flag, the script runs, or ends with status 2 and one error line that names the flag, before the first step. With
a bug, it ends with a traceback, whatever the function was called for. Each case that ends in another way is printed,
and the exit status is 1.
"""

import argparse
import ast
import contextlib
import dataclasses
import enum
import importlib
import importlib.util
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
import typing
import warnings
from pathlib import Path
from unittest import mock

from conftest import ROOT, SCRIPTS, flags, make_model, sentences, write_lines

TIMEOUT = 600  # Seconds of a run that hangs.
# Values at and beyond the edges of each type. The number is the first one above the limit of integers.
VALUES = {
    bool: ["true", "false"],
    int: ["-1", "0", "1", str(2**31)],
    float: ["nan", "inf", "-1", "0", "1e308"],
    str: ["", "nonsense"],
    dict: ["{", "[]", "{}", "null", '{"x": 1}'],
}
TASKS = {
    "parse": {},
    "train and evaluate": {"do_train": True, "do_eval": True, "eval_strategy": "steps", "eval_steps": 1},
    "train": {"do_train": True},
    "evaluate": {"do_eval": True},
}
ADAPTED = {"do_train": True, "do_eval": True, "whole_word_mask": True, "preprocessing_num_workers": 2}
BEGUN = "global batch size:"  # Logged right before the first step.
BUG = "np.zeros(2) + np.zeros(3)  # A ValueError that this line raises."
BUG_SHOWN = "ValueError: operands could not be broadcast together with shapes (2,) (3,)"


def leaves(kind):
    """Return the simple types, enumerations and literals that a type hint is made of."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal or not typing.get_args(kind):
        return [kind]
    if origin is dict:
        return [dict]
    return [leaf for part in typing.get_args(kind) for leaf in leaves(part)]


def edge_values(kind):
    """Return values at and beyond the edges of a type, as on a command line."""
    values = []
    for leaf in leaves(kind):
        if typing.get_origin(leaf) is typing.Literal:
            values += [*typing.get_args(leaf), "nonsense"]
        elif isinstance(leaf, enum.EnumMeta):
            values += [item.value for item in leaf]
        else:
            values += VALUES.get(leaf, [])
    return list(dict.fromkeys(values))


def edge_cases(script, only):
    """Return [(names of a flag, value)] for all flags of a script."""
    groups = script.ModelArguments, script.DataTrainingArguments, script.TrainingArguments
    cases = []
    for group in groups:
        hints = typing.get_type_hints(group)
        for item in dataclasses.fields(group):
            names = [item.name, *(alias.lstrip("-") for alias in item.metadata.get("aliases", ()))]
            values = edge_values(hints[item.name])
            if item.metadata.get("help", "").startswith("JSON"):
                values += VALUES[dict]
            if item.init and (not only or item.name in only):
                cases += [(names, value) for value in values]
    return cases


def fork(call, folder):
    """Call a function in a child, in a new folder of its own, and return (exit status, what it has printed)."""
    folder.mkdir()
    sys.stdout.flush()
    if not (child := os.fork()):
        status = 1
        try:
            signal.alarm(TIMEOUT)
            os.chdir(folder)
            output = os.open("printed", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout.reconfigure(line_buffering=True)
            call()
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), (folder / "printed").read_text(errors="replace")


def judge(status, printed, names, value):
    """Return what is wrong with the end of a run with a flag, or None."""
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if status == 0 and not errors:
        return None
    if status != 2 or len(errors) != 1 or "Traceback" in printed:
        return f"status {status}: {printed.strip().splitlines()[-1:]}"
    if "the loss is" in errors[0]:  # Only a step can show that.
        return None
    if not any(f"--{name}" in errors[0] for name in names) and not (value and value in errors[0]):
        return f"the flag is not named: {errors[0]}"
    return f"too late: {errors[0]}" if BEGUN in printed else None


def make_files(folder):
    """Write a model, texts and references, and return the settings of a run of two steps."""
    lines = sentences(12)
    files = {
        "model_name_or_path": make_model(folder / "model", num_hidden_layers=1),
        "train_file": write_lines(folder / "train.txt", lines),
        "validation_file": write_lines(folder / "validation.txt", sentences(6, seed=1)),
    }
    write_lines(folder / "references.txt", ["[2]"] * len(lines))
    write_lines(folder / "tokens.txt", ["zigzag", "yawn"])
    small = {"max_steps": 2, "max_seq_length": 8, "train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    return {**files, **small, "output_dir": "output", "line_by_line": "true", "learning_rate": 1e-3}


def try_flags(script, tasks, only, folder):
    """Yield what is wrong with each flag at its edges, or None, for some tasks."""
    settings = make_files(folder)
    if script.__name__ == "run_mlm":
        settings["report_to"] = "none"  # TensorBoard, but as the flag says.
    for task in tasks:
        for number, (names, value) in enumerate(edge_cases(script, only)):
            given = {name: setting for name, setting in {**settings, **TASKS[task]}.items() if name not in names}
            line = [*flags(**given), f"--{names[0]}={value}"]
            if task == "parse":
                wrong = judge(*parse(script, line), names, value)
            else:
                wrong = judge(*fork(lambda line=line: script.main(line), folder / f"{task} {number}"), names, value)
                shutil.rmtree(folder / f"{task} {number}")
            yield wrong and f"{task}: --{names[0]}={value}: {wrong}"


def parse(script, line):
    """Parse a command line in this process; return (exit status, what is printed)."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), mock.patch.dict(os.environ):
        try:
            with script.exit_on_user_error():
                script.parse_args(line)
        except SystemExit as error:
            return error.code, errors.getvalue()
        except Exception:
            return 1, traceback.format_exc()
    return 0, ""


def with_bug(source, name):
    """Return the source of a script with a bug at the beginning of the function of a qualified name."""
    tree = ast.parse(source)
    nodes = dict(functions(tree))
    nodes[name].body.insert(0, ast.parse(BUG).body[0])
    return ast.unparse(tree)


def functions(tree, prefix=""):
    """Yield (qualified name, node) of all functions in a syntax tree."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef):
            yield name, node
        is_scope = isinstance(node, ast.FunctionDef | ast.ClassDef)
        yield from functions(node, f"{name}." if is_scope else prefix)


def try_bugs(script, only, folder):
    """Yield what is wrong with a bug in each function, or None; at the end, the functions that no run calls."""
    settings, source, name = make_files(folder), Path(script.__file__).read_text(encoding="utf-8"), script.__name__
    tiny = {**settings, "do_train": True, "do_eval": True, "model_name_or_path": None, "dropout_rate": 0.1}
    tiny["eval_mlm_probability"] = 0.5  # Its validation data is a single text.
    tiny |= {"config_name": settings["model_name_or_path"], "tokenizer_name": settings["model_name_or_path"]}
    runs = [  # Together, they call almost every function.
        {**settings, **ADAPTED, "new_tokens": folder / "tokens.txt"},
        {**tiny, "train_ref_file": folder / "references.txt", "group_by_length": True, "validation_file": None},
        {**settings, "do_train": True, "line_by_line": "false", "streaming": True, "max_steps": 4},
    ]
    lines = [flags(**{flag: value for flag, value in run.items() if value is not None}) for run in runs]
    done = folder / "stopped"  # The last run resumes.
    status, printed = fork(lambda: script.main([*lines[2], "--max_steps", "2", "--save_strategy", "steps"]), done)
    assert status == 0, printed
    reached = 0
    names = [found for found, _ in functions(ast.parse(source)) if not only or found in only]
    for number, function in enumerate(names):
        path = folder / str(number) / f"{name}.py"
        path.parent.mkdir()
        path.write_text(with_bug(source, function), encoding="utf-8")
        for line in lines:
            run = path.parent / f"run {lines.index(line)}"

            def call(path=path, line=line):
                if line is lines[-1]:
                    shutil.copytree(done / "output", "output")
                import_path(name, path).main(line)

            status, printed = fork(call, run)
            if status:
                reached += 1
                shown = status == 1 and BUG_SHOWN in printed and "error: " not in printed
                yield None if shown else f"{function}: status {status}: {printed.strip().splitlines()[-1:]}"
                break
        shutil.rmtree(path.parent)
    print(f"{reached} of {len(names)} functions reached")


def import_path(name, path):
    """Import a file under the name of a script."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    """Try all cases; exit with status 1 if one ends in another way than it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("flags", "bugs"))
    parser.add_argument("--script", choices=SCRIPTS, default=SCRIPTS[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--only", action="append", help="name of a flag or a function; default: all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    script, tried, wrong = importlib.import_module(args.script), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "flags": lambda: try_flags(script, args.task or TASKS, args.only, Path(folder)),
            "bugs": lambda: try_bugs(script, args.only, Path(folder)),
        }
        for complaint in cases[args.kind]():
            tried += 1
            if complaint:
                wrong += 1
                print(complaint, flush=True)
    print(f"{args.script}, {args.kind}: {tried} cases, {wrong} wrong")
    sys.exit(wrong > 0 or not tried)


if __name__ == "__main__":
    main()
