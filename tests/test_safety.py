"""No code from files runs, no token is written, and two runs never write to one folder."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, error_line, flags, make_model, optional_module, write_lines
from safetensors.torch import save_file

import run_mlm

run_mlm_flax = optional_module("run_mlm_flax")

SECRETS = {"token": "hf_firstsecret", "hub_token": "hf_secondsecret", "push_to_hub_token": "hf_thirdsecret"}
# Files of a checkpoint that a run on a CPU does not read; the scale of the loss is that of --fp16 on a GPU.
NEVER_READ = ["rng_state.pth", "scaler.pt", "training_args.bin"]
# Trains as another run does, says so where it has the folder, and waits.
HOLD = """
import sys
import run_mlm

run_mlm.find_checkpoint = lambda *args: print(1, flush=True) or input()
run_mlm.main(sys.argv[1:])
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


def test_a_pickle_in_a_model_folder_is_not_run(script, model_folder, text_files, tmp_path, capfd):
    os.remove(f"{model_folder}/model.safetensors")
    torch.save({"bert.embeddings.word_embeddings.weight": Bomb(tmp_path / "bomb")}, f"{model_folder}/pytorch_model.bin")
    assert model_folder in error_line(script, short_run(model_folder, text_files, tmp_path / "output"), capfd)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", *NEVER_READ])
def test_a_pickle_in_a_checkpoint_is_not_run(model_folder, text_files, tmp_path, capfd, name):
    output = tmp_path / "output"
    run_mlm.main(short_run(model_folder, text_files, output))
    shutil.rmtree(output / "checkpoint-2")
    torch.save(Bomb(tmp_path / "bomb"), output / "checkpoint-1" / name)
    if name in NEVER_READ:
        run_mlm.main(short_run(model_folder, text_files, output))
    else:
        line = error_line(run_mlm, short_run(model_folder, text_files, output), capfd)
        assert "checkpoint-1" in line
    assert not (tmp_path / "bomb").exists()


@pytest.mark.flax
def test_the_flax_script_resumes_without_pickles(model_folder, text_files, tmp_path, monkeypatch, caplog):
    output = tmp_path / "output"
    run_mlm_flax.main(short_run(model_folder, text_files, output))
    shutil.rmtree(output / "checkpoint-2")
    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, mock.Mock(side_effect=AssertionError(name)))
    run_mlm_flax.main(short_run(model_folder, text_files, output))
    assert f"Resuming from {output / 'checkpoint-1'}" in caplog.text


@pytest.mark.flax
def test_a_corrupt_optimizer_of_a_flax_checkpoint(model_folder, text_files, tmp_path, capfd):
    output = tmp_path / "output"
    run_mlm_flax.main(short_run(model_folder, text_files, output))
    checkpoint = output / "checkpoint-2"
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
    known = script.ArgumentParser((script.ModelArguments, script.TrainingArguments)).format_help()
    secrets = {name: secret for name, secret in SECRETS.items() if f"--{name} " in known}
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


def test_what_looks_like_a_token_is_not_printed(script, capfd):
    token = "hf_" + "aB3" * 11
    for arguments in (["--tokn", token], [f"--tokn={token}"], [token], ["--output_dir", "o", "--model_type", token]):
        assert "aB3" not in error_line(script, arguments, capfd)


@pytest.mark.parametrize("flag", ["new_tokens", "train_ref_file"])
def test_a_file_without_end_is_an_error(script, model_folder, text_files, tmp_path, capfd, flag):
    line = error_line(script, short_run(model_folder, text_files, tmp_path / "o", **{flag: "/dev/zero"}), capfd)
    assert line.endswith("/dev/zero: not a regular file")


def test_weights_without_a_tensor(script, model_folder, text_files, tmp_path, capfd):
    save_file({}, f"{model_folder}/model.safetensors", metadata={"format": "pt"})
    line = error_line(script, short_run(model_folder, text_files, tmp_path / "output"), capfd)
    assert f"the model {model_folder}" in line and "no weight" in line


@pytest.mark.pytorch
def test_a_service_without_a_login_is_an_error(model_folder, text_files, tmp_path, capfd, monkeypatch):
    (tmp_path / "wandb").mkdir()
    content = "run = None\nclass api: api_key = None\n__version__ = '0.20'\n"
    (tmp_path / "wandb" / "__init__.py").write_text(content)
    (tmp_path / "wandb-0.20.dist-info").mkdir()
    (tmp_path / "wandb-0.20.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 0.20\n")
    command = [sys.executable, str(ROOT / "run_mlm.py"), *short_run(model_folder, text_files, tmp_path / "o")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for more, words in (
        ("wandb", "error: --report_to wandb: not logged in"),
        ("comet_ml", "error: --report_to"),
        ("", ""),
    ):
        given = ["--report_to", more] if more else []
        done = subprocess.run([*command, *given], env=environment, capture_output=True, text=True)
        assert (done.returncode, (tmp_path / "o").exists()) == ((2, False) if more else (0, True)), done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr


WATCH = """
import sys
import {name} as script

def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        local = event == "socket.connect" and not isinstance(args[1], tuple)
        print("CONNECTION", event, args[1:] if not local else "", file=sys.stderr) if not local else None

sys.addaudithook(note)
script.main(sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["files", "folder"])
def test_with_local_inputs_nothing_leaves_the_machine(script, model_folder, text_files, tmp_path, kind):
    given = text_files
    if kind == "folder":
        (tmp_path / "data").mkdir()
        for split in ("train", "validation"):
            shutil.copy(text_files[f"{split}_file"], tmp_path / "data" / f"{split}.txt")
        given = {"dataset_name": tmp_path / "data"}
    arguments = short_run(model_folder, given, tmp_path / "o", do_eval=True)
    online = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", WATCH.format(name=script.__name__), *arguments]
    done = subprocess.run(command, env=online, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "eval_results.json").exists()
    assert [line for line in done.stderr.splitlines() if "CONNECTION" in line] == []


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_local_data_set_names_no_remote_files(script, tmp_path, name):
    card = "configs:\n- config_name: a\n  data_files: http://127.0.0.1:9/train.txt\n"
    (tmp_path / name).write_text(card if name.endswith("yaml") else f"---\n{card}---\nhttps://see.me\n")
    args = script.parse_args(flags(model_name_or_path="m", output_dir="o", dataset_name=tmp_path))
    with pytest.raises(script.UserError, match=f"{tmp_path / name} names remote files"):
        script.load_raw_datasets(*args[:2])
    url = "http://127.0.0.1:9/train.txt"
    args = script.parse_args(flags(model_name_or_path="m", output_dir="o", train_file=url))
    with pytest.raises(script.UserError, match=f"{url}: not a local file"):
        script.load_raw_datasets(*args[:2])


def test_a_folder_that_another_run_writes_to(script, model_folder, text_files, tmp_path, capfd):
    output = tmp_path / "output"
    arguments = short_run(model_folder, text_files, output)
    command, environment = [sys.executable, "-c", HOLD, *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as holder:
        assert holder.stdout.readline() == b"1\n"
        line = error_line(script, arguments, capfd)
        assert f"--output_dir {output}" in line and "another run" in line
        assert [path.name for path in output.iterdir()] == ["_lock"]
        holder.kill()  # The lock ends with the process.
    script.main(arguments)
    assert (output / "model.safetensors").exists()


def test_an_optimizer_that_is_not_installed(model_folder, text_files, tmp_path, capfd):
    arguments = short_run(model_folder, text_files, tmp_path / "output", optim="adamw_bnb_8bit")
    line = error_line(run_mlm, arguments, capfd)
    assert "--optim adamw_bnb_8bit" in line
    assert "bitsandbytes" in line or "bnb" in line


def test_lists_in_a_file_say_where_to_report(model_folder, text_files, tmp_path):
    path = tmp_path / "a.json"
    settings = {"model_name_or_path": model_folder, "output_dir": "o", "train_file": text_files["train_file"]}
    for given, expected in ((["tensorboard"], ["tensorboard"]), ("none", []), (None, ["tensorboard"])):
        path.write_text(json.dumps(settings | {"report_to": given}))
        assert run_mlm.parse_args([str(path)])[2].report_to == expected


def test_nothing_is_logged_of_a_start_that_does_not_come(script, text_files, tmp_path, capfd, caplog):
    folder = make_model(tmp_path / "model", num_hidden_layers=1)
    os.remove(f"{folder}/model.safetensors")
    error_line(script, short_run(folder, text_files, tmp_path / "output"), capfd)
    assert "Starting" not in caplog.text
