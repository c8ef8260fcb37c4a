"""Both scripts upload what they made to a stand-in of the hub, through the real client; a mistake loses nothing."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode

import pytest
from conftest import BOTH, ROOT, error_line, flags, optional_module, run_script

run_mlm = optional_module("run_mlm")

TOKEN = "hf_uploadsecret"


class Hub(http.server.ThreadingHTTPServer):
    """A hub of one user: keeps files of repositories, the tokens it was shown, and refuses what `refused` matches."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files, self.large, self.created = {}, {}, []
        self.tokens, self.messages = set(), []
        self.refused = self.silent = None
        self.ended = threading.Event()


class Answer(http.server.BaseHTTPRequestHandler):
    """One answer of the hub."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Log nothing."""

    def reply(self, content, status=200):
        """Send JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def do_HEAD(self):
        self.reply({})

    def do_GET(self):
        self.reply({"name": "me"})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.reply({})

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        hub.tokens.add(self.headers["Authorization"])
        if hub.silent and re.search(hub.silent, path):
            hub.ended.wait(60)
        elif hub.refused and re.search(hub.refused, path):
            self.reply({"error": "You have no right to write here"}, 403)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            owner = hub.created[-1].get("organization") or "me"
            self.reply({"url": f"{hub.endpoint}/{owner}/{hub.created[-1]['name']}"})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            sort = {True: "lfs", False: "regular"}
            files = [(item["path"], item["path"].endswith(".safetensors")) for item in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": sort[large], "shouldIgnore": False} for name, large in files]
            self.reply({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            links = [
                {**item, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": links})
        elif "/commit/" in path:
            repository = path.split("/api/models/")[1].split("/commit/")[0]
            self.commit(repository, [json.loads(line) for line in body.splitlines()])
            self.reply({"commitUrl": f"{hub.endpoint}/{repository}/commit/1", "commitOid": "1", "pullRequestUrl": None})
        else:
            self.reply({"error": path}, 404)

    def commit(self, repository, lines):
        """Keep the files of a commit."""
        files = self.server.files.setdefault(repository, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]


@pytest.fixture
def hub():
    """A running stand-in."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def push(hub, model_folder, text_files, tmp_path):
    """Run a script that pushes, as a program: `push(name, **flags)` returns the process."""

    def run(name, environment=(), impatient=False, **changes):
        settings = {"model_name_or_path": model_folder, "output_dir": tmp_path / "my-model", "do_train": True}
        settings |= {"max_steps": 2, "save_steps": 1, "max_seq_length": 16, "line_by_line": "true", **text_files}
        settings |= {"push_to_hub": True, "hub_token": TOKEN, "logging_steps": 1}
        settings = {name: value for name, value in (settings | changes).items() if value is not None}
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "", **dict(environment)}
        if not impatient:
            return run_script(name, flags(**settings), **variables)
        program = f"import sys, {name} as script; script.HUB_TIMEOUT = 1; script.main(sys.argv[1:])"
        command = [sys.executable, "-c", program, *flags(**settings)]
        variables = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)

    return run


def check_error(done, words):
    """Check that a process ended with the status of a mistake, and its error is one line, the last, with the words."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line


def written_files(folder):
    """Return {path: bytes} of the files that belong on the hub."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    private = ("checkpoint-", "arguments.json")  # The second one holds the places of files on this machine.
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith(private)}


@pytest.mark.parametrize("name", BOTH)
def test_the_hub_gets_what_the_run_wrote(hub, push, name, tmp_path):
    folder, named = tmp_path / "my-model", {"hub_model_id": "group/named", "hub_private_repo": "true", "do_eval": True}
    named |= {"bf16_full_eval": True} if name == "run_mlm" else {}  # It converts the model in memory.
    hub.refused, private = "/commit/", {"_lock"}
    first = push(name, **named)
    check_error(first, ["--push_to_hub", str(folder)])
    weights = (folder / "model.safetensors").read_bytes()
    assert {"config.json", "README.md", "all_results.json"} <= written_files(folder).keys()
    assert hub.files == {}
    for path in (".env", "data/customers.txt", "other/checkpoint-1/optimizer.pt", "notes.json", "model/x.safetensors"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("private")
        private.add(path)
    # The same command again, with nothing left to train; this time the token is in the environment.
    hub.refused = None
    again = push(name, {"HF_TOKEN": TOKEN}, hub_token=None, **named)
    assert again.returncode == 0, again.stderr
    (files,) = hub.files.values()
    assert set(hub.files) == {"group/named"}
    assert files == {path: content for path, content in written_files(folder).items() if path not in private}
    assert files["model.safetensors"] == weights
    assert b'"F32"' in weights and b"BF16" not in weights
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json", "all_results.json"} <= files.keys()
    assert any("events" in path for path in files)
    assert set(hub.large.values()) == {weights}
    assert b"# named\n" in files["README.md"]
    (name,) = hub.created[0].keys() & {"private", "visibility"}  # In older and newer releases of the client.
    assert hub.created[0][name] in (True, "private")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    everything += [text.encode() for done in (first, again) for text in (done.stdout, done.stderr)]
    assert not any(TOKEN.encode() in content for content in everything)


@pytest.mark.parametrize("silent", ["/repos/create", "/commit/"])
@pytest.mark.parametrize("name", BOTH)
def test_a_hub_that_does_not_answer_is_one_line(hub, push, name, tmp_path, silent):
    hub.silent = silent
    check_error(push(name, impatient=True), ["--push_to_hub", "timed out"])
    assert (tmp_path / "my-model" / "model.safetensors").exists() == (silent == "/commit/")


@pytest.mark.parametrize("name", BOTH)
def test_a_card_names_no_local_path(hub, push, name, tmp_path, text_files):
    shutil.copytree(tmp_path / "model", tmp_path / "customers" / "base")
    (tmp_path / "customers" / "data").mkdir()
    shutil.copy(text_files["train_file"], tmp_path / "customers" / "data" / "train.txt")
    named = {"dataset_name": tmp_path / "customers" / "data", "train_file": None, "validation_file": None}
    done = push(name, model_name_or_path=tmp_path / "customers" / "base", **named)
    assert done.returncode == 0, done.stderr
    assert b"customers" not in hub.files["me/my-model"]["README.md"]


@pytest.mark.parametrize("name", BOTH)
def test_a_refused_repository_is_found_before_training(hub, push, name, tmp_path):
    hub.refused = "/repos/create"
    check_error(push(name), ["error: --push_to_hub"])
    assert not (tmp_path / "my-model" / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{}, {"hub_model_id": "two words"}], ids=["offline", "name"])
def test_a_repository_that_cannot_be_is_found_before_training(
    script, model_folder, text_files, tmp_path, capfd, changes
):
    arguments = push_flags(tmp_path, model_name_or_path=model_folder, hub_token=TOKEN, **text_files | changes)
    line = error_line(script, [*arguments, "--line_by_line", "true"], capfd)
    assert "error: --push_to_hub" in line and changes.get("hub_model_id", "offline") in line
    assert not (tmp_path / "o" / "model.safetensors").exists()


def push_flags(tmp_path, **changes):
    """Return flags of an upload, of files that are never read."""
    settings = {"model_name_or_path": "m", "train_file": "t.txt", "output_dir": tmp_path / "o", "do_train": True}
    return flags(**settings | {"push_to_hub": True} | changes)


def test_an_upload_needs_a_training(script, tmp_path, capfd):
    line = error_line(script, push_flags(tmp_path, hub_token=TOKEN, do_train="false", do_eval=True), capfd)
    assert "--do_train" in line


@pytest.mark.pytorch
def test_an_unknown_strategy_is_one_line(tmp_path, capfd):
    line = error_line(run_mlm, push_flags(tmp_path, hub_token=TOKEN, hub_strategy="never"), capfd)
    assert "never" in line and "every_save" in line


def test_a_mistyped_folder_is_named_before_the_hub_is_asked(script, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "model").mkdir(parents=True)
    with pytest.raises(script.UserError, match="output/modle"):
        script.load_tokenizer(script.ModelArguments(model_name_or_path="output/modle"))
    assert "There is no folder output/modle; looking for it on the hub." in caplog.messages
