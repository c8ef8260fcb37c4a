"""No code from files runs, no token is written, and two runs never write to one folder."""

import fcntl
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from conftest import SCRIPTS, flags, make_model, make_tokenizer, run_script, write_lines
from test_errors import check_message

import run_mlm
import run_mlm_flax

SECRETS = {"token": "hf_firstsecret", "hub_token": "hf_secondsecret", "push_to_hub_token": "hf_thirdsecret"}
# Locks a folder as another run does, says so, and waits.
HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print(1, flush=True)
input()
"""


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def short_run(model_folder, text_files, output, **changes):
    """Return the command line of a run of two steps."""
    settings = {"model_name_or_path": model_folder, "output_dir": output, "do_train": True, "max_steps": 2}
    settings |= {"max_seq_length": 16, "line_by_line": "true", "save_steps": 1, **text_files}
    return flags(**settings | changes)


def error_line(script, arguments, capfd):
    """Run `main`, check that it ends with status 2, and return the error line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main(arguments)
    assert exit_.value.code == 2
    return next(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))


def test_a_pickle_in_a_model_folder_is_not_run(script, model_folder, text_files, tmp_path, capfd):
    os.remove(f"{model_folder}/model.safetensors")
    torch.save({"bert.embeddings.word_embeddings.weight": Bomb(tmp_path / "bomb")}, f"{model_folder}/pytorch_model.bin")
    assert model_folder in error_line(script, short_run(model_folder, text_files, tmp_path / "output"), capfd)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(model_folder, text_files, tmp_path, capfd, name):
    output = tmp_path / "output"
    run_mlm.main(short_run(model_folder, text_files, output))
    shutil.rmtree(output / "checkpoint-2")
    os.remove(output / "checkpoint-1" / "checksums.json")
    torch.save(Bomb(tmp_path / "bomb"), output / "checkpoint-1" / name)
    if name == "training_args.bin":
        run_mlm.main(short_run(model_folder, text_files, output))  # It is never read.
    else:
        line = error_line(run_mlm, short_run(model_folder, text_files, output), capfd)
        assert "checkpoint-1" in line
        assert "another checkpoint" in line
    assert not (tmp_path / "bomb").exists()


def test_the_flax_script_resumes_without_pickles(model_folder, text_files, tmp_path, monkeypatch, caplog):
    output = tmp_path / "output"
    run_mlm_flax.main(short_run(model_folder, text_files, output))
    shutil.rmtree(output / "checkpoint-2")
    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, mock.Mock(side_effect=AssertionError(name)))
    run_mlm_flax.main(short_run(model_folder, text_files, output))
    assert f"Resuming from {output / 'checkpoint-1'}" in caplog.text


def test_a_corrupt_optimizer_of_a_flax_checkpoint(model_folder, text_files, tmp_path, capfd):
    output = tmp_path / "output"
    run_mlm_flax.main(short_run(model_folder, text_files, output))
    checkpoint = output / "checkpoint-2"
    os.remove(checkpoint / "checksums.json")
    (checkpoint / "optimizer.msgpack").write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    assert str(checkpoint) in error_line(run_mlm_flax, short_run(model_folder, text_files, output, max_steps=3), capfd)
    assert not (tmp_path / "bomb").exists()


def test_code_in_a_model_folder_is_not_run(script, model_folder, text_files, tmp_path, capfd):
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    own = ["import os", f"os.mkdir({str(tmp_path / 'bomb')!r})", "from transformers import BertConfig as Own"]
    write_lines(tmp_path / "model" / "own.py", own)
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert model_folder in error_line(script, short_run(model_folder, text_files, tmp_path / "output"), capfd)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_no_token_is_written(script, model_folder, text_files, tmp_path, capfd, monkeypatch):
    secrets = {name: secret for name, secret in SECRETS.items() if name in script.argument_names()}
    assert "token" in secrets
    monkeypatch.setenv("HF_TOKEN", "hf_fourthsecret")
    report = {"report_to": "tensorboard"} if script is run_mlm else {}
    output = tmp_path / "output"
    script.main(short_run(model_folder, text_files, output, do_eval=True, logging_steps=1, **secrets, **report))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("events" in path.name for path in written)
    assert any(path.name == "README.md" for path in written)
    printed = capfd.readouterr()
    contents = [path.read_bytes() for path in written] + [printed.out.encode(), printed.err.encode()]
    for secret in [*secrets.values(), "hf_fourthsecret"]:
        assert not any(secret.encode() in content for content in contents)


@pytest.mark.parametrize("wrong", [{"use_auth_token": "hf_secret"}, {"use_auth_token": True, "token": "hf_secret"}])
def test_no_token_is_in_an_error(script, model_folder, text_files, tmp_path, capfd, wrong):
    line = error_line(script, short_run(model_folder, text_files, tmp_path, **wrong, learning_rate="x"), capfd)
    assert "hf_secret" not in line


def test_a_folder_that_another_run_writes_to(script, model_folder, text_files, tmp_path, capfd):
    output = tmp_path / "output"
    output.mkdir()
    arguments = short_run(model_folder, text_files, output)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"1\n"
        line = error_line(script, arguments, capfd)
        assert f"--output_dir {output}: another run is writing there" in line
        assert list(output.iterdir()) == []
        holder.kill()
    script.main(arguments)
    assert (output / "model.safetensors").exists()


def test_a_folder_that_is_not_writable(script, model_folder, text_files, tmp_path, capfd, monkeypatch):
    output = tmp_path / "output"
    output.mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(output))  # Root may write anywhere.
    line = error_line(script, short_run(model_folder, text_files, output), capfd)
    assert f"--output_dir {output} is not writable" in line
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("ending", [None, RuntimeError])
def test_a_run_locks_its_folder_to_the_end(script, model_folder, text_files, tmp_path, monkeypatch, ending):
    output, save_results = tmp_path / "output", script.save_results

    def lock():
        descriptor = os.open(output, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)

    def save(*args):
        with pytest.raises(BlockingIOError):
            lock()
        if ending:
            raise ending
        save_results(*args)

    monkeypatch.setattr(script, "save_results", save)
    if ending:
        with pytest.raises(ending):
            script.main(short_run(model_folder, text_files, output))
    else:
        script.main(short_run(model_folder, text_files, output))
    lock()


def test_a_file_system_without_locks_is_a_warning(script, model_folder, text_files, tmp_path, monkeypatch, caplog):
    flock = mock.Mock(side_effect=OSError(38, "Function not implemented"))
    monkeypatch.setattr(script, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    script.main(short_run(model_folder, text_files, tmp_path / "output"))
    assert "cannot be locked" in caplog.text


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_hub_that_cannot_be_reached_is_asked_twice(name, text_files, tmp_path):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                asked.append(1)
                connection.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        arguments = short_run("some/model", text_files, tmp_path / "output")
        done = run_script(name, arguments, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "home"))
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert done.returncode == 2
    check_message(done.stderr, ["--model_name_or_path some/model", "local folder"])
    assert len(asked) == 2


def larger_tokenizer(folder):
    """Write a tokenizer with more tokens than the tiny models have and return its folder."""
    folder.mkdir()
    make_tokenizer(folder, extra=["harbourmaster"])
    return folder


class WiderHead:
    """A stand-in for a Flax model whose head has more rows than the vocabulary has tokens."""

    dtype = np.float32

    def __init__(self, config, dtype=None):
        self.config = config
        self.params = {"head": np.zeros((config.vocab_size + 8, 4))}


@pytest.mark.parametrize("fault", [NotImplementedError, None])
def test_a_model_that_cannot_take_more_tokens(script, model_folder, text_files, tmp_path, capfd, monkeypatch, fault):
    if fault:
        monkeypatch.setattr(script, "resize_vocabulary", mock.Mock(side_effect=fault))
    elif script is run_mlm:
        monkeypatch.setattr(transformers.BertForMaskedLM, "get_output_embeddings", lambda model: None)
    else:
        with pytest.raises(ValueError, match="vocabulary of its own"):
            script.resize_vocabulary(WiderHead(transformers.BertConfig(vocab_size=10)), 12)
        return
    larger = larger_tokenizer(tmp_path / "larger")
    line = error_line(script, short_run(model_folder, text_files, tmp_path / "o", tokenizer_name=larger), capfd)
    assert f"--model_name_or_path {model_folder} cannot take a tokenizer of" in line
    assert "--tokenizer_name" in line


def test_a_device_that_is_not_there(script, model_folder, text_files, tmp_path, capfd, monkeypatch):
    if script is run_mlm:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert "--fp16 needs a GPU" in error_line(
            script, short_run(model_folder, text_files, tmp_path, fp16=True), capfd
        )
        return
    missing = RuntimeError("Unknown backend: 'cuda'")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(run_mlm_flax.jax, "devices", mock.Mock(side_effect=missing))
    line = error_line(script, short_run(model_folder, text_files, tmp_path / "output"), capfd)
    assert "JAX_PLATFORMS cuda: Unknown backend" in line
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("asked", [["--debug"], ["--debug", "true"], ["--debug=True"]], ids=str)
def test_debugging_shows_the_traceback(script, tmp_path, monkeypatch, asked):
    with pytest.raises(script.UserError, match="--output_dir"):
        script.main([*asked, "--seed", "1"])
    (tmp_path / "a.json").write_text('{"debug": true}')
    with pytest.raises(script.UserError, match="--output_dir"):
        script.main([str(tmp_path / "a.json")])
    monkeypatch.setattr(sys, "argv", ["script", "nowhere.json", *asked])
    with pytest.raises(script.UserError, match=r"nowhere\.json"):
        script.main()


@pytest.mark.parametrize("asked", [[], ["--debug", "false"], ["--seed", "1"]], ids=str)
def test_there_is_no_traceback_unasked(script, asked):
    with pytest.raises(SystemExit, match="2"):
        script.main(asked)


def test_the_names_of_arguments_are_those_of_the_parser(script):
    actions = script.build_parser()._actions
    options = {option.lstrip("-").replace("-", "_") for action in actions for option in action.option_strings}
    assert set(script.argument_names()) == options - {"h", "help"}


def test_the_arguments_of_the_other_script_are_known():
    torch_names, flax_names = set(run_mlm.argument_names()), set(run_mlm_flax.argument_names())
    assert set(run_mlm_flax.foreign_argument_names()) == torch_names - flax_names
    # A switch that is on by default in one script can be turned off there by a name of its own.
    only_flax = {name for name in flax_names - torch_names if name.removeprefix("no_") not in torch_names}
    assert set(run_mlm.foreign_argument_names()) == only_flax


def test_an_optimizer_that_is_not_installed(model_folder, text_files, tmp_path, capfd):
    arguments = short_run(model_folder, text_files, tmp_path / "output", optim="adamw_bnb_8bit")
    line = error_line(run_mlm, arguments, capfd)
    assert "--optim adamw_bnb_8bit" in line
    assert "bitsandbytes" in line or "bnb" in line


def test_an_empty_list_reports_nowhere(model_folder, text_files, tmp_path):
    path = tmp_path / "a.json"
    settings = {"model_name_or_path": model_folder, "output_dir": "o", "train_file": text_files["train_file"]}
    for given, expected in (([], []), (["tensorboard"], ["tensorboard"]), ("none", []), (["wandb", "mlflow"],) * 2):
        path.write_text(json.dumps(settings | {"report_to": given}))
        assert run_mlm.parse_args([str(path)])[2].report_to == expected


def test_nothing_is_logged_of_a_start_that_does_not_come(script, text_files, tmp_path, capfd, caplog):
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    os.remove(f"{folder}/model.safetensors")
    error_line(script, short_run(folder, text_files, tmp_path / "output"), capfd)
    assert "Starting" not in caplog.text
