from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny_weights import plain

import personvit
from personvit.errors import CheckpointError
from personvit.models import load_backbone
from personvit.models.hub import fetch, is_reference, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STORED = "folder.vits.256x128/transformer_120.pth"


class _Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for one file of one repository at one revision."""

    content = b""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        error = self.error()
        self.send_response(404 if error else 200)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"weights-1"')
        self.send_header("Content-Length", "0" if error else str(len(self.content)))
        self.end_headers()
        if body and not error:
            self.wfile.write(self.content)

    def error(self) -> str | None:
        _, owner, name, _, revision, *file = self.path.split("/")
        if (owner, name) != ("lakeAGI", "PersonViT"):
            return "RepoNotFound"
        if revision not in ("main", "v1", COMMIT):
            return "RevisionNotFound"
        return None if "/".join(file) == STORED else "EntryNotFound"

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine that holds one weight file, and an empty cache."""
    torch.save(plain(), tmp_path / "w.pth")
    _Hub.content = (tmp_path / "w.pth").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch, endpoint, cache) -> None:
    """As HF_ENDPOINT and HF_HOME would; the library has read them already."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def reference(revision=""):
    return f"hf://lakeAGI/PersonViT/{STORED}{revision}"


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_reference_is_downloaded_and_kept(hub, tmp_path, revision):
    state, info = load_backbone(reference(revision))
    assert torch.equal(state["norm.weight"], torch.load(tmp_path / "w.pth", weights_only=True)["norm.weight"])
    assert info.path == reference(revision)
    local = fetch(reference(revision))
    assert local.is_relative_to(tmp_path / "cache")
    assert local.as_posix().endswith(STORED)


def test_reference_is_accepted_wherever_a_path_is(hub):
    assert personvit.load(Path(reference()), device="cpu").info.depth == 2  # a Path keeps one slash of two


def test_cached_file_needs_no_network(hub, tmp_path, monkeypatch):
    load_backbone(reference())
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert load_backbone(reference())[1].depth == 2


def test_unknown_reference_without_network(tmp_path, monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library tries again and again, with growing pauses
    with pytest.raises(CheckpointError, match=r"hf://lakeAGI.*127\.0\.0\.1:9 cannot be reached.*HF_ENDPOINT.*browser"):
        load_backbone(reference())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"not in the cache.*HF_HUB_OFFLINE"):
        load_backbone(reference())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("hf://lakeAGI/Elsewhere/w.pth", "there is no lakeAGI/Elsewhere.*spelling"),
        ("hf://lakeAGI/PersonViT/other.pth", "has no file 'other.pth'"),
        (reference("@v7"), "no revision 'v7'.*default branch"),
    ],
)
def test_what_the_hub_does_not_have(hub, wrong, message):
    with pytest.raises(CheckpointError, match=message):
        load_backbone(wrong)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'personvit\[hub\]'"):
        load_backbone(reference())


@pytest.mark.parametrize(
    "wrong",
    [
        "hf://",
        "hf://owner",
        "hf://owner/name",
        "hf://owner/name/",
        "hf://owner/name/../../etc/passwd",
        "hf://../name/file",
        "hf://owner/name/a//b",
        "hf://owner/name/a\\..\\b",
        "hf://owner/name/file@",
        "hf://own er/name/file",
        "hf:owner/name/file",
    ],
)
def test_malformed_references(wrong):
    assert is_reference(wrong)
    with pytest.raises(CheckpointError, match="hf://owner/name/path/to/file"):
        load_backbone(wrong)


def test_parts_of_a_reference():
    assert parse_reference("hf://a/b.c/d/e.pth") == ("a/b.c", "d/e.pth", None)
    assert parse_reference("hf:/a/b/e.pth@refs/pr/1") == ("a/b", "e.pth", "refs/pr/1")
    assert not is_reference("runs/hf/x.pth")
