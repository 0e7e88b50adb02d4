"""Hub ids through the real client library, against a small hub of this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from checkpoint_maker import llama_tensors, write_checkpoint
from safetensors.torch import load_file

from converters.manifest import check_manifest

ROOT = Path(__file__).parents[2]
NAME, COMMIT = "acme/tiny-2of4", "0123456789abcdef0123456789abcdef01234567"
# What a repository may hold beside a model; none of it may be asked for.
UNWANTED = ("pytorch_model.bin", "modeling_tiny.py", "setup.sh", "tf_model.h5")


class Hub(ThreadingHTTPServer):
    """Serves one repository, and notes what was fetched."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The three calls of a download: the repository's list of files, a file's facts, the file."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        file = self.server.folder / path.rpartition("/")[2]
        if path.startswith(f"/api/models/{NAME}"):
            self._send(json.dumps(self._listing(path)).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith(f"/{NAME}/resolve/") and file.is_file():
            if body:
                self.server.fetched.append(file.name)
            data = file.read_bytes()
            self._send(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)
        else:
            refusal = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._send(b"{}", refusal, body, 404)

    def _listing(self, path: str) -> Any:
        names = sorted(file.name for file in self.server.folder.iterdir())
        if "/tree/" in path:
            sizes = ((name, (self.server.folder / name).stat().st_size) for name in names)
            return [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes]
        return {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}

    def _send(self, data: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_checkpoint(tmp_path / "repository", llama_tensors(), shards=2)
    for name in UNWANTED:
        (folder / name).write_bytes(b"unwanted")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def command(hub: Hub, tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``vllm-sparse`` in a process that knows no other hub and has an empty cache."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "converters.cli", *words],
        cwd=tmp_path,
        env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_hub_id_is_fetched_and_converted(hub: Hub, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "convert", NAME, "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packed"] == 14
    assert check_manifest(tmp_path / "out") == []
    assert not set(UNWANTED) & set(hub.fetched)
    assert {"config.json", "model-00001-of-00002.safetensors", "tokenizer.json"} <= set(hub.fetched)
    written = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    kept = llama_tensors()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(written["model.layers.0.mlp.up_proj.compressed"].flatten(), kept[kept != 0])
    card = (tmp_path / "out/README.md").read_text()
    assert f"vllm-sparse convert {NAME} out" in card
    assert f"Converted from `{NAME}`, revision `{COMMIT}`" in card


def test_an_unknown_hub_id_is_one_message(hub: Hub, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "inspect", "acme/nothing-here")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "acme/nothing-here is neither a folder here nor a model that could be fetched" in said
    assert "Traceback" not in said
