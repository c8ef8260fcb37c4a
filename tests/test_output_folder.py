"""A run deletes only what it replaces, and only once it has something to put in its place; results fit the model."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import error_line, finished_run, history, make_model, optional_module, read_json, training_flags, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run_mlm = optional_module("run_mlm")
RESULTS = ("train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", "README.md")
SHORT = {"max_steps": 3, "save_steps": 1, "eval_strategy": "no"}
OVERWRITE = {"overwrite_output_dir": True}


@pytest.fixture
def output(script, tmp_path):
    """A folder of one's own with a finished run, whose checkpoints are 3, 6, 9 and 12."""
    return Path(shutil.copytree(finished_run(script), tmp_path / "output"))


def snapshot(folder):
    """Return {path: content} of all files and links below a folder but the lock and TensorBoard's events."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != "_lock" and "tfevents" not in path.name and (path.is_file() or path.is_symlink()):
            found[str(path)] = os.readlink(path) if path.is_symlink() else path.read_bytes()
    return found


def steps(output):
    """Return the numbers of all checkpoint folders with a number."""
    return sorted(int(path.name[11:]) for path in output.glob("checkpoint-*") if path.name[11:].isdigit())


def edit_state(checkpoint, **changes):
    """Change the state of a checkpoint."""
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def optimizer_file(checkpoint):
    """Return the file of the optimizer state."""
    (path,) = checkpoint.glob("optimizer.*")
    return path


def put_users_files(output, elsewhere):
    """Put into a folder what a user may keep there, under names that begin like those of checkpoints."""
    output.mkdir(exist_ok=True)
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (output / "checkpoint-best").mkdir()
    (output / "checkpoint-best" / "model.safetensors").write_text("mine")
    (output / "checkpoint-3-old").mkdir()
    (output / "checkpoint-3-old" / "trainer_state.json").write_text('{"global_step": 3, "log_history": []}')
    (output / "checkpoint-notes.txt").write_text("mine")
    (output / "checkpoint-link").symlink_to(elsewhere)


def test_what_the_user_keeps_in_the_folder_survives(script, model_folder, text_files, tmp_path, output):
    put_users_files(tmp_path / "expected", tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "expected", output, symlinks=True, dirs_exist_ok=True)
    arguments = training_flags(model_folder, text_files, output, **SHORT, **OVERWRITE, save_total_limit=1)
    script.main(arguments)
    assert steps(output) == [3]
    found, expected = snapshot(output), snapshot(tmp_path / "expected")
    for path, content in expected.items():
        assert found[path.replace(str(tmp_path / "expected"), str(output))] == content
    assert len(list(tmp_path.glob("elsewhere/*"))) == 1


USERS = {
    "folder": lambda path: (path / "checkpoint-best").mkdir(),
    "file": lambda path: (path / "checkpoint-notes.txt").write_text("mine"),
    "link": lambda path: (path / "checkpoint-link").symlink_to(path.parent / "model"),
    "state of another program": lambda path: write_state(path / "checkpoint-3", '{"step": 3}'),
    "only a model": lambda path: write_state(path / "checkpoint-3", '{"global_step": 3, "log_history": []}'),
}


def write_state(checkpoint, text):
    """Make a checkpoint folder with a model and this state."""
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_text("mine")
    (checkpoint / "trainer_state.json").write_text(text)


@pytest.mark.parametrize("kind", USERS)
def test_a_folder_with_something_of_the_user_is_not_empty(script, model_folder, text_files, tmp_path, capfd, kind):
    output = tmp_path / "output"
    output.mkdir()
    USERS[kind](output)
    before = snapshot(output)
    line = error_line(script, training_flags(model_folder, text_files, output), capfd)
    assert f"--output_dir {output} is not empty" in line
    assert snapshot(output) == before


def test_a_new_run_deletes_nothing(script, model_folder, text_files, tmp_path):
    output = tmp_path / "output"
    make_model(output / "checkpoint-100")
    charts = [output / path / "events.out.tfevents.mine" for path in ("runs", "runs/mine", "logs")]
    for path in charts:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    before = snapshot(output)
    script.main(training_flags(model_folder, text_files, output, **SHORT))
    assert before.items() <= snapshot(output).items()
    assert all(path.exists() for path in charts)


@pytest.mark.parametrize("changes", [{}, OVERWRITE], ids=["new", "overwrite"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_in_the_place_of_a_checkpoint(script, model_folder, text_files, tmp_path, capfd, kind, changes):
    output = tmp_path / "output"
    output.mkdir()
    if kind == "link":
        (output / "checkpoint-7").symlink_to(model_folder)
    else:
        (output / "checkpoint-7").write_text("mine")
    before = snapshot(tmp_path)
    line = error_line(script, training_flags(model_folder, text_files, output, **changes), capfd)
    assert f"--output_dir {output}: checkpoint-7 is a link or a file" in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("changes", [{}, OVERWRITE], ids=["resume", "overwrite"])
def test_a_numbered_folder_that_is_no_checkpoint(script, model_folder, text_files, output, capfd, changes):
    write_state(output / "checkpoint-7", '{"step": 3}')
    before = snapshot(output)
    line = error_line(script, training_flags(model_folder, text_files, output, **changes), capfd)
    assert f"--output_dir {output}: checkpoint-7 is not a checkpoint of these scripts" in line
    assert snapshot(output) == before


STATES = ["{}", "[]", "null", "NaN", '"words"', "7", "", '{"global_step": 3', '{"global_step": 3}']
STATES += [f'{{"global_step": {step}, "log_history": []}}' for step in ("-1", "true", "3.5", "null", '"3"')]
STATES += [f'{{"global_step": 3, "log_history": {entries}}}' for entries in ("{}", "null", '["words"]', "[3]")]
STATES += ['{"global_step": 3, "log_history": [], "best_model_checkpoint": 3}']


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_is_none(script, tmp_path, caplog, state):
    write_state(tmp_path / "checkpoint-3", state)
    for name in ("optimizer.pt", "optimizer.msgpack"):
        (tmp_path / "checkpoint-3" / name).write_text("")
    assert script.list_checkpoints(str(tmp_path)) == []
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path / 'checkpoint-3'} is ignored: it is not a complete checkpoint."


def test_the_optimizer_state_makes_a_checkpoint(script, tmp_path, caplog):
    write_state(tmp_path / "checkpoint-3", '{"global_step": 3, "log_history": []}')
    assert script.list_checkpoints(str(tmp_path)) == []
    (record,) = caplog.records
    assert "no optimizer state" in record.getMessage()
    files = {"run_mlm": ["optimizer.pt", "optimizer.bin", "optimizer_0", "global_step3"]}
    for name in files.get(script.__name__, ["optimizer.msgpack"]):
        (tmp_path / "checkpoint-3" / name).mkdir()
        assert script.list_checkpoints(str(tmp_path)) == [(3, str(tmp_path / "checkpoint-3"))]
        (tmp_path / "checkpoint-3" / name).rmdir()


def test_a_checkpoint_without_optimizer_is_neither_resumed_nor_deleted(
    script, model_folder, text_files, output, capfd, caplog
):
    for step in (3, 12):
        optimizer_file(output / f"checkpoint-{step}").unlink()
    named = {"resume_from_checkpoint": output / "checkpoint-12"}
    line = error_line(script, training_flags(model_folder, text_files, output, **named), capfd)
    assert f"--resume_from_checkpoint {output / 'checkpoint-12'}: no complete checkpoint" in line
    caplog.clear()
    script.main(training_flags(model_folder, text_files, output, save_total_limit=1))
    assert f"Resuming from {output / 'checkpoint-9'}" in caplog.text
    assert caplog.text.count(f"{output / 'checkpoint-3'} is ignored") == 1
    assert steps(output) == [3, 12]
    assert weights(output) == weights(finished_run(script))


@pytest.mark.pytorch
@pytest.mark.parametrize("name", ["scheduler.pt", "optimizer.pt"])
def test_a_checkpoint_with_a_part_of_the_optimizer_is_an_error(model_folder, text_files, tmp_path, capfd, name):
    """The Trainer would begin with a new optimizer."""
    output = Path(shutil.copytree(finished_run(run_mlm), tmp_path / "output"))
    (output / "checkpoint-12" / name).unlink()
    (output / "checkpoint-12" / "global_step12").mkdir()  # As DeepSpeed writes it.
    before = snapshot(output)
    line = error_line(run_mlm, training_flags(model_folder, text_files, output, max_steps=13), capfd)
    assert f"{output / 'checkpoint-12'} cannot be resumed: it has no file" in line and name[:9] in line
    assert snapshot(output) == before


def test_an_overwriting_run_may_read_from_folders_that_are_not_its_own(script, text_files, tmp_path, output):
    model = Path(make_model(output / "checkpoint-base"))
    (output / "checkpoint-texts").mkdir()
    files = {name: shutil.copy(path, output / "checkpoint-texts") for name, path in text_files.items()}
    before = snapshot(model), snapshot(output / "checkpoint-texts")
    script.main(training_flags(model, files, output, **SHORT, **OVERWRITE))
    assert (snapshot(model), snapshot(output / "checkpoint-texts")) == before
    assert steps(output) == [1, 2, 3]


@pytest.mark.parametrize("flag", ["model_name_or_path", "tokenizer_name", "train_file", "validation_file"])
def test_a_flag_reads_what_the_run_would_replace(script, model_folder, text_files, tmp_path, output, capfd, flag):
    (tmp_path / "link").symlink_to(output)
    read = tmp_path / "link" / "checkpoint-6"
    if flag.endswith("file"):
        shutil.copy(text_files[flag], read / "text.txt")
        read = tmp_path / "link" / "checkpoint-*" / "t*.txt"
    before = snapshot(output)
    arguments = training_flags(model_folder, text_files, output, **OVERWRITE)
    line = error_line(script, [*arguments, f"--{flag}", str(read)], capfd)
    assert f"--output_dir {output}: " in line and f"replace {output / 'checkpoint-6'}, which --{flag} reads" in line
    assert snapshot(output) == before


def test_a_model_without_state_that_a_new_run_reads(script, text_files, tmp_path, capfd):
    model = Path(make_model(tmp_path / "output" / "checkpoint-100"))
    before = snapshot(model)
    line = error_line(script, training_flags(model, text_files, tmp_path / "output"), capfd)
    assert f"replace {model}, which --model_name_or_path reads" in line
    assert snapshot(model) == before


@pytest.mark.parametrize("failure", ["optimizer", "loss"])
def test_an_overwriting_run_that_fails_early_leaves_the_old_run(
    script, model_folder, text_files, output, capfd, failure
):
    named = {"resume_from_checkpoint": output / "checkpoint-6"} if failure == "optimizer" else {}
    if named:
        path = optimizer_file(output / "checkpoint-6")
        path.write_bytes(path.read_bytes()[:100])
    before = snapshot(output), set(output.rglob("*tfevents*"))
    settings = {"learning_rate": 1e30, "save_steps": 12, "eval_strategy": "no", **named, **OVERWRITE}
    line = error_line(script, training_flags(model_folder, text_files, output, **settings), capfd)
    assert ("checkpoint-6" if named else "the loss is nan") in line
    assert snapshot(output) == before[0]
    assert before[1] <= set(output.rglob("*tfevents*"))


@pytest.mark.parametrize("best", ["moved/output/checkpoint-3", None])
def test_going_back_keeps_the_best_checkpoint(script, model_folder, text_files, output, best):
    edit_state(output / "checkpoint-6", best_model_checkpoint=best)
    settings = {"resume_from_checkpoint": output / "checkpoint-6", **OVERWRITE}
    script.main(training_flags(model_folder, text_files, output, **settings))
    assert steps(output) == ([3, 6, 9, 12] if best else [6, 9, 12])
    assert weights(output) == weights(finished_run(script))


def test_the_limit_counts_the_best_and_named_checkpoints_and_keeps_them(script, model_folder, text_files, output):
    edit_state(output / "checkpoint-12", best_model_checkpoint=str(output / "checkpoint-3"))
    named = training_flags(model_folder, text_files, output, tokenizer_name=output / "checkpoint-6")
    for arguments, kept in ((named, [3, 6, 12]), (training_flags(model_folder, text_files, output), [3, 12])):
        groups = script.parse_args(arguments)
        assert script.find_checkpoint(*groups) == str(output / "checkpoint-12")
        for limit in (None, 4, 1):
            script.rotate_checkpoints(groups[2], limit, 12)
            assert limit == 1 or steps(output) in ([3, 6, 9, 12], [3, 6, 12])
        assert steps(output) == kept


def test_what_cannot_be_deleted_costs_no_step(script, model_folder, text_files, output, monkeypatch, caplog):
    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(script.shutil, "rmtree", refuse)
    settings = {**SHORT, **OVERWRITE, "save_total_limit": 1}
    script.main(training_flags(model_folder, text_files, output, **settings))
    assert f"{output / 'checkpoint-12'} cannot be deleted: Permission denied" in caplog.text  # Of the old run.
    assert f"{output / 'checkpoint-1'} cannot be deleted: Permission denied" in caplog.text  # Above the limit.
    assert read_json(output, "trainer_state.json")["global_step"] == 3


def test_results_that_cannot_be_written_are_one_line(script, text_files, output, capfd):
    (output / "eval_results.json.tmp").mkdir()
    line = error_line(script, training_flags(output, text_files, output, do_train="false"), capfd)
    assert f"--output_dir {output}: the results cannot be written" in line


def test_results_are_complete_or_those_of_before(script, text_files, output, monkeypatch):
    before, replace = (output / "all_results.json").read_bytes(), os.replace

    def kill(source, target):
        if target.endswith("all_results.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(script.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        script.main(training_flags(output, text_files, output, do_train="false"))
    assert (output / "all_results.json").read_bytes() == before


def test_a_deletion_that_is_killed_leaves_no_complete_checkpoint(script, output, monkeypatch):
    def kill(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        script.delete(str(output / "checkpoint-12"))
    assert [step for step, _ in script.list_checkpoints(str(output))] == [3, 6, 9]


def test_a_named_checkpoint_is_resumed_or_an_error(script, model_folder, text_files, tmp_path, output, capfd, caplog):
    named = {"resume_from_checkpoint": output / "checkpoint-6", "max_steps": 7}
    branch = tmp_path / "branch"
    script.main(training_flags(model_folder, text_files, branch, **named))
    before = snapshot(branch)
    line = error_line(script, training_flags(model_folder, text_files, branch, **named), capfd)
    assert f"--resume_from_checkpoint {output / 'checkpoint-6'}" in line and str(branch / "checkpoint-7") in line
    assert snapshot(branch) == before
    script.main(training_flags(model_folder, text_files, branch, max_steps=8))
    assert f"Resuming from {branch / 'checkpoint-7'}" in caplog.text


@pytest.mark.parametrize("part", ["", "checkpoint-6"])
def test_an_evaluation_alone_adds_its_results(script, text_files, output, part):
    folder = output / part
    (output / "eval_results.json").unlink()
    changed = {str(folder / name) for name in ("eval_results.json", "all_results.json")}
    before = snapshot(output)
    script.main(training_flags(folder, text_files, folder, do_train="false"))
    after = snapshot(output)
    assert {path: after[path] for path in after if path not in changed} == {
        path: before[path] for path in before if path not in changed
    }
    results = read_json(folder, "eval_results.json")
    assert "train_loss" in read_json(output, "all_results.json")
    assert results.items() <= read_json(folder, "all_results.json").items()
    if not part:
        expected = read_json(finished_run(script), "eval_results.json")["eval_loss"]
        assert results["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert [step for step, _ in script.list_checkpoints(str(output))] == [3, 6, 9, 12]


@pytest.mark.parametrize("part", [None, "checkpoint-6"])
def test_an_evaluation_alone_of_another_model(script, model_folder, text_files, output, capfd, part):
    model, before = output / part if part else model_folder, snapshot(output)
    line = error_line(script, training_flags(model, text_files, output, do_train="false"), capfd)
    assert f"--output_dir {output} holds another model than {model}" in line
    assert snapshot(output) == before


def test_an_overwriting_run_leaves_no_result_of_the_old_one(script, model_folder, text_files, output):
    (output / "all_results.json").write_text("no JSON")
    script.main(training_flags(model_folder, text_files, output, **SHORT, **OVERWRITE, do_eval="false"))
    assert not (output / "eval_results.json").exists()
    results = read_json(output, "all_results.json")
    assert results == read_json(output, "train_results.json") and not any("eval" in name for name in results)
    assert not any("eval_loss" in entry for entry in history(output))
    card = (output / "README.md").read_text(encoding="utf-8").lower()
    assert "accuracy" not in card and "perplexity" not in card


def test_a_longer_run_leaves_no_result_of_the_shorter_one(script, model_folder, text_files, output):
    script.main(training_flags(model_folder, text_files, output, max_steps=13, do_eval="false", eval_strategy="no"))
    assert not (output / "eval_results.json").exists()
    assert read_json(output, "all_results.json") == read_json(output, "train_results.json")
    assert read_json(output, "trainer_state.json")["global_step"] == 13


def test_a_finished_run_keeps_its_training_results(script, model_folder, text_files, output):
    before = {name: read_json(output, name) for name in RESULTS if name.endswith(".json")}
    for name in ("eval_results.json", "all_results.json"):  # The run was killed before it wrote them.
        (output / name).unlink()
    script.main(training_flags(model_folder, text_files, output))
    after = {name: read_json(output, name) for name in before}
    assert after["train_results.json"] == before["train_results.json"]
    for found in (before, after):
        log = [entry for entry in found["trainer_state.json"]["log_history"] if "train_loss" in entry]
        found["trained"] = log, [found["all_results.json"][name] for name in before["train_results.json"]]
    assert after["trained"] == before["trained"]
    assert after["eval_results.json"]["eval_loss"] == pytest.approx(before["eval_results.json"]["eval_loss"], rel=1e-6)
    # Killed before it had written its results, it writes them.
    for name in RESULTS:
        (output / name).unlink()
    script.main(training_flags(model_folder, text_files, output))
    assert all((output / name).exists() for name in RESULTS)


@pytest.mark.parametrize("changes", [{}, {"max_steps": 13}, {"do_train": "false"}], ids=["finished", "longer", "eval"])
@pytest.mark.parametrize("content", ["no JSON", "[]"])
def test_results_that_cannot_be_added_to(script, model_folder, text_files, output, capfd, content, changes):
    (output / "all_results.json").write_text(content)
    before = snapshot(output)
    line = error_line(script, training_flags(output, text_files, output, **changes), capfd)
    assert f"error: {output / 'all_results.json'}" in line and "JSON" in line
    assert snapshot(output) == before


def charts(output):
    """Return {folder: its steps of the training loss} of the TensorBoard events below a folder."""
    folders = {path.parent for path in output.rglob("*tfevents*")}
    events = {folder: EventAccumulator(str(folder)).Reload() for folder in folders}
    return [
        sorted(point.step for point in drawn.Scalars("train/loss"))
        for drawn in events.values()
        if "train/loss" in drawn.Tags()["scalars"]
    ]


def test_charts_are_those_of_the_run(script, model_folder, text_files, tmp_path):
    output, settings = tmp_path / "output", {"save_strategy": "no", "eval_strategy": "no"}
    script.main(training_flags(model_folder, text_files, output, **settings, max_steps=5))
    script.main(training_flags(model_folder, text_files, output, **settings, **OVERWRITE, max_steps=2))
    assert charts(output) == [[1, 2]]
    (output / "logs" / "mine").mkdir(parents=True)
    (output / "logs" / "mine" / "events.out.tfevents.mine").write_bytes(b"")
    script.main(training_flags(model_folder, text_files, output, **SHORT, **OVERWRITE))
    assert charts(output) == [[1, 2, 3]]
    assert (output / "logs" / "mine" / "events.out.tfevents.mine").exists()
    script.main(training_flags(model_folder, text_files, output, **SHORT | {"max_steps": 5}))
    assert sorted(itertools.chain.from_iterable(charts(output))) == [1, 2, 3, 4, 5]
