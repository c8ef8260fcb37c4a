"""The two scripts are one program in two copies: what has the same name has the same source."""

import ast
import re

import pytest
from conftest import ROOT, SCRIPTS

SHARED_SECTIONS = ("3. Arguments", "4. Data", "5. Masking")
# Names of both scripts that stand for different code in each: the framework's part.
DIFFERENT = {
    *("MODEL_TYPES", "LIBRARIES", "LINE_BY_LINE_DEFAULT", "FOREIGN_FILE"),
    *("TrainingArguments", "foreign_argument_names"),
    *("load_model", "resize_vocabulary"),
    *("epoch_permutation", "labelled_logits"),
    *(
        "find_selection",
        "setup_logging",
        "train",
        "evaluate",
        "save_model",
        "batch_padding",
        "save_results",
        "guess",
        "summarize",
        "main",
    ),
}
COLLATORS = {"MaskedLMCollator", "FlaxDataCollatorForLanguageModeling"}
CLOSURES = {
    *("read_json_config.unique", "exit_on_user_error.wrapped", "labelled_positions_only.select_inputs"),
    *("labelled_positions_only.select_outputs", "labelled_logits.intercept"),
    *("labelled_logits.keep_labelled", "training_step.micro_loss", "training_step.accumulate"),
    *(f"negative_log_likelihood.{name}" for name in ("likelihood", "forward", "backward")),
    *("create_learning_rate_scheduler.cosine", "create_learning_rate_scheduler.schedule", "resize_vocabulary.fit"),
    "clip_by_global_norm.update",
}
BANNER = re.compile(r"^# -+\n# (\d+\. .+)\n# -+$", re.MULTILINE)


@pytest.fixture(scope="module")
def sources():
    """The text of each script."""
    return {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}


def definitions(source):
    """Return {name: (section, source)} of the functions, classes and constants at the top of a script, in order."""
    banners = [(source.count("\n", 0, match.start()) + 1, match[1]) for match in BANNER.finditer(source)]
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        else:
            continue
        first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
        section = [title for line, title in banners if line < first][-1]
        found[name] = section, "\n".join(lines[first - 1 : node.end_lineno])
    return found


def drifted(one, other):
    """Return the names that two scripts share although their sources differ, without those meant to differ."""
    one, other = definitions(one), definitions(other)
    return {name for name in one.keys() & other.keys() if one[name][1] != other[name][1]} - DIFFERENT


def functions(source):
    """Return {qualified name: node} of all functions of a script, methods and nested ones included."""
    found = {}

    def collect(node, prefix):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            name = f"{prefix}.{child.name}".lstrip(".") if named else prefix
            if named and not isinstance(child, ast.ClassDef):
                found[name] = child
            collect(child, name)

    collect(ast.parse(source), "")
    return found


def import_effects(source):
    """Return the lines at the top of a script that do more at import than define, import and check versions."""
    effects = []
    for node in ast.parse(source).body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        if isinstance(node, ast.Try) and all(isinstance(item, ast.Import | ast.ImportFrom) for item in node.body):
            continue  # An optional package.
        calls = {ast.unparse(item.func) for item in ast.walk(node) if isinstance(item, ast.Call)}
        allowed = {"logging.getLogger", "re.compile", "tuple", "sorted"} if isinstance(node, ast.Assign) else set()
        if isinstance(node, ast.Expr):
            allowed = {"check_min_version", "require_version"}
        if not isinstance(node, ast.Assign | ast.Expr) or not calls <= allowed:
            effects.append(ast.unparse(node))
    return effects


def test_same_sections_in_the_same_order(sources):
    one, other = (BANNER.findall(source) for source in sources.values())
    assert one == other
    assert [int(title.split(".")[0]) for title in one] == list(range(2, 11))
    assert set(SHARED_SECTIONS) < set(one)


def test_shared_names_have_the_same_source(sources):
    assert drifted(*sources.values()) == set()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("return token_ids[:full].reshape(-1, max_seq_length)", "return token_ids[:full].reshape( -1, max_seq_length)"),
        ("Cut a stream of tokens into full rows", "Cut a stream of tokens into rows"),
        ("IGNORED_LABEL = -100", "IGNORED_LABEL = -1"),
    ],
)
def test_a_changed_copy_is_found(sources, before, after):
    for source in sources.values():
        assert source.count(before) == 1
        expected = {"IGNORED_LABEL"} if "IGNORED" in before else {"group_texts"}
        assert drifted(source, source.replace(before, after)) == expected


def test_what_is_listed_as_different_is(sources):
    one, other = (definitions(source) for source in sources.values())
    assert {name for name in DIFFERENT if name in one and name in other and one[name][1] == other[name][1]} == set()


def test_sections_3_to_5_have_the_same_names(sources):
    one, other = (
        {name for name, (section, _) in definitions(source).items() if section in SHARED_SECTIONS} - COLLATORS
        for source in sources.values()
    )
    assert one == other
    assert len(one) > 20


def test_shared_names_are_in_the_same_order_and_sections(sources):
    one, other = (definitions(source) for source in sources.values())
    ordered = [
        [(name, section) for name, (section, _) in part.items() if name in one and name in other and section[0] != "2"]
        for part in (one, other)
    ]
    assert ordered[0] == ordered[1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_are_short(sources, name):
    found = functions(sources[name])
    lengths = {function: node.end_lineno - node.lineno + 1 for function, node in found.items()}
    assert {function: length for function, length in lengths.items() if length > 60} == {}
    assert lengths["main"] <= 40


@pytest.mark.parametrize("name", SCRIPTS)
def test_only_closures_are_nested(sources, name):
    found = functions(sources[name])
    nested = {function for function in found if any(function.startswith(f"{other}.") for other in found)}
    assert nested <= CLOSURES


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_only_defines(sources, name):
    assert import_effects(sources[name]) == []
    for statement in ("print(1)", "X = open('x')", "for i in (): pass", "logging.basicConfig()", "X: int = f()"):
        assert import_effects(f"{sources[name]}\n{statement}\n") != []
