"""Repositories of the hub arrive as folders, and what stands in the way is one line. Against a small hub of our own."""
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The three addresses a download asks for: the list of files, and HEAD and GET of each."""
    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if ("/gated" in path and "/resolve/" in path) or path.startswith("/api/models/org/gated"):
            return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model org/gated is restricted.")
        if not path.startswith(("/api/models/org/small", "/org/small/resolve/")):
            return self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()]
            body = json.dumps(tree if "/tree/" in path else {"id": "org/small", "sha": COMMIT, "siblings": siblings})
            return self.reply(200, body.encode(), Content_Type="application/json")
        name = path.rpartition("/")[2]
        if self.command == "GET":
            self.fetched.append(name)
        etag = f'"{hashlib.sha1(self.files[name]).hexdigest()}"'
        self.reply(200, self.files[name], ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(folder):
    """(its address, the names of the files it was asked for); its one repository is org/small."""
    path = Path(folder.write())
    Hub.files = {p.name: p.read_bytes() for p in path.iterdir()}
    Hub.files |= {"pytorch_model.bin": b"pickle", "model.onnx": b"onnx", "photo.png": b"png",
                  "chat_template.jinja": b"{{ messages }}", "consolidated.safetensors": b"again",
                  "original/params.json": b"{}", "original/model.safetensors": b"and again"}
    Hub.fetched = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub.fetched
    server.shutdown()


def call(address: str, cache: Path, *command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= dict(HF_ENDPOINT=address, HF_HOME=str(cache), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
                        XDG_CACHE_HOME=str(cache), PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_download_takes_what_a_run_reads_and_nothing_else(hub, tmp_path):
    address, fetched = hub
    target = tmp_path / "got"
    run = call(address, tmp_path, "-m", "scripts.download", "org/small", "--output", str(target))
    assert run.returncode == 0, run.stderr
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
              "chat_template.jinja"}
    assert {p.name for p in target.iterdir() if p.is_file()} == set(fetched) == wanted
    assert all((target / name).read_bytes() == Hub.files[name] for name in wanted)
    assert str(target) in run.stdout
    (target / "config.json").unlink()
    fetched.clear()
    assert call(address, tmp_path, "-m", "scripts.download", "org/small", "--output", str(target)).returncode == 0
    assert fetched == ["config.json"]  # what is there already is not fetched again


def test_generate_takes_a_repository_and_then_its_cache(hub, tmp_path):
    address, fetched = hub
    command = ("generate.py", "--checkpoint_path", "org/small", "--max_new_tokens", "3", "--prompt", "a")
    first = call(address, tmp_path, *command)
    assert first.returncode == 0 and fetched, first.stderr
    fetched.clear()
    weights = next(tmp_path.glob("hub/**/model.safetensors"))  # as if the first download had been cut short
    weights.resolve().unlink()
    weights.unlink()
    assert call(address, tmp_path, *command).returncode == 0 and fetched == ["model.safetensors"]
    fetched.clear()
    second = call("http://127.0.0.1:9", tmp_path, *command)  # nobody listens there
    assert second.returncode == 0 and not fetched, second.stderr
    assert first.stdout == second.stdout


@pytest.mark.parametrize("repo, words", [
    ("org/gated", ["org/gated is gated", "accept its licence", "hf auth login"]),
    ("org/nothing", ["no repository org/nothing", "check the name"]),
    ("not a name", ["'not a name'", "ORG/NAME"]),
])
def test_what_stands_in_the_way_is_one_line(repo, words, hub, tmp_path):
    run = call(hub[0], tmp_path, "-m", "scripts.download", repo, "--output", str(tmp_path / "got"))
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "Traceback" not in run.stderr, run.stderr
    assert all(word in run.stderr for word in words), run.stderr


def test_no_network_is_one_line(tmp_path):
    run = call("http://127.0.0.1:9", tmp_path, "generate.py", "--checkpoint_path", "org/small")
    assert run.returncode == 2 and "could not be downloaded" in run.stderr, run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in run.stderr
