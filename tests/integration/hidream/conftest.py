"""A Hub on loopback: the part of the Hugging Face Hub's protocol that downloading a repository needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves directories as repositories, for instance {"org/tiny": Path(...)}.

    `paths` are the files that were sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.paths: list[str] = []

    @property
    def endpoint(self) -> str:
        """URL for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        """Repository description, listing or file."""
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._describe(path.removeprefix("api/models/"))
        else:
            self._file(path)

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def _describe(self, path: str) -> None:
        name = "/".join(path.split("/")[:2])
        directory = self._directory(name)
        if directory is None:
            return
        files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
        names = [file.relative_to(directory).as_posix() for file in files]
        entries = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
            for name, file in zip(names, files, strict=True)
        ]
        description = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        body = json.dumps(entries if "/tree/" in path else description).encode()
        self._answer(200, body, {"Content-Type": "application/json"})

    def _file(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        directory = self._directory(name)
        if directory is None:
            return
        file = directory / rest.partition("/")[2]
        if not file.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.paths.append(file.relative_to(directory).as_posix())
        self._answer(200, file.read_bytes(), {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT})

    def _directory(self, name: str) -> Path | None:
        if name in self.server.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return None
        if name not in self.server.repositories:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        return self.server.repositories.get(name)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _oid(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:40]


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[Hub]:
    """A Hub that has the tiny checkpoint as org/tiny."""
    server = Hub()
    server.repositories["org/tiny"] = tiny_checkpoint
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
