"""Downloads from a real local server: whole or not at all, whatever the server does."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

import downloads
from downloads import fetch, open_zip, read_member
from errors import UserError

CONTENT = os.urandom(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; ``failures`` counts down."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.requests = 0, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.path == "/missing":
            self.send_error(404)
        elif self.path == "/flaky" and self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(503)
        else:
            self.send_response(200)
            if self.path == "/chunked":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(CONTENT) + CONTENT[:1000])  # and the connection closes
                return
            if self.path != "/endless":
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that has read enough goes away
                self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut" else CONTENT)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    with Server() as running:
        yield running
        running.shutdown()


def test_a_file_is_fetched_once(server, tmp_path):
    target = tmp_path / "deep" / "file.bin"
    for _ in range(2):
        assert fetch(server.url("file"), target, SHA256).read_bytes() == CONTENT
    assert server.requests == 1
    assert os.listdir(target.parent) == ["file.bin"]


def test_what_lies_there_is_used_as_it_is(server, tmp_path):
    target = tmp_path / "file.bin"
    target.write_text("the user's own")
    assert fetch(server.url("file"), target, SHA256).read_text() == "the user's own"
    assert server.requests == 0


def test_a_server_that_recovers_is_asked_again(server, tmp_path):
    server.failures = 2
    assert fetch(server.url("flaky"), tmp_path / "file.bin", SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "digest", "message", "requests"),
    [
        ("missing", None, "Not Found", 1),
        ("flaky", None, "Service Unavailable", 3),
        ("cut", None, "connection closed after", 3),
        ("chunked", None, "IncompleteRead", 3),
        ("endless", None, "does not say how long", 1),
        ("file", "0" * 64, "expected 000", 1),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(server, tmp_path, name, digest, message, requests):
    server.failures = 100
    with pytest.raises(UserError, match=message) as caught:
        fetch(server.url(name), tmp_path / "data" / "file.bin", digest)
    assert str(tmp_path / "data" / "file.bin") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists() or os.listdir(tmp_path / "data") == []
    assert server.requests == requests


def test_a_data_folder_that_is_a_file_is_told(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"--data_dir: .*file.clinc150 cannot be written"):
        fetch(server.url("file"), tmp_path / "file" / "clinc150" / "file.bin")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "hub.local", "http://"])
def test_a_hub_that_does_not_answer_is_asked_once(endpoint):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from downloads import hub_is_reachable as ask; import os\n"
    code += "print(ask(), ask(), os.environ['HF_HUB_OFFLINE'])"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "1"], done.stderr


def test_two_processes_fetch_the_same_file_at_once(server, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from downloads import fetch; from pathlib import Path; "
    code += f"fetch({server.url('file')!r}, Path({str(tmp_path / 'file.bin')!r}), {SHA256!r})"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_zip_members_that_point_outside_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("fine", "x")
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="points outside"):
        open_zip(tmp_path / "a.zip")


def test_a_damaged_member_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("paper", "x" * 1000)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[500] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with open_zip(tmp_path / "a.zip") as archive, pytest.raises(UserError, match="paper is damaged"):
        read_member(archive, "paper")


def test_a_cut_zip_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("fine", "x" * 1000)
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match="delete it to download it again"):
        open_zip(tmp_path / "a.zip")
