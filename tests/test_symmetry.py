"""The two scripts are one program in two copies, each short enough to be read and changed."""

import ast

import pytest
from conftest import ROOT, SCRIPTS

# Names of both scripts that stand for different code in each: the framework's part.
DIFFERENT = {
    *("MODEL_TYPES", "LINE_BY_LINE_DEFAULT", "FOREIGN_FILE", "TrainingArguments", "load_model", "epoch_permutation"),
    *("find_sparse_start", "train", "evaluate", "publish", "main"),
}
LINES = {"run_mlm": 1400, "run_mlm_flax": 1700}
DEFINITIONS = {"run_mlm": 70, "run_mlm_flax": 95}


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


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_keeps_its_budget(name):
    tree = ast.parse(source(name))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert len(source(name).splitlines()) <= LINES[name]
    assert sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body) <= DEFINITIONS[name]
    assert lengths["main"] <= 40
    assert {function: length for function, length in lengths.items() if length > 50} == {}
