"""HTTP servers on loopback that keep what they are sent: a receiver of webhooks, and a stand-in for the Hub."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(kw_only=True)
class Listener:
    """A server that keeps every request, in order."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Answers to give to the next requests before 200s."""

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """What to answer: status, headers, body."""
        return (self.statuses.pop(0) if self.statuses else 200), {}, b"{}"


@dataclass(kw_only=True)
class HubStandIn(Listener):
    """Speaks the part of the Hub's API that publishing needs, and checks each request: token, order, digests, sizes."""

    token: str = "hf_secret"
    repositories: dict[str, bool] = field(default_factory=dict)
    """Whether private, by name."""
    large_files: dict[str, bytes] = field(default_factory=dict)
    """By sha256."""
    commits: list[dict[str, bytes]] = field(default_factory=list)
    """Files of each commit, by path."""
    messages: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        """See Listener."""
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return status, {}, b"{}"
        if not request.path.startswith("/upload/") and request.headers["Authorization"] != f"Bearer {self.token}":
            return 401, {}, b'{"error": "Invalid credentials"}'
        for pattern, handle in self._ROUTES:
            match = re.fullmatch(pattern, f"{request.method} {request.path}")
            if match is not None:
                return (
                    200,
                    {"Content-Type": "application/json"},
                    json.dumps(handle(self, request, *match.groups())).encode(),
                )
        self.problems.append(f"unexpected {request.method} {request.path}")
        return 404, {}, b"{}"

    def _create(self, request: Request) -> Any:
        name = (
            f"{request.json['organization']}/{request.json['name']}"
            if "organization" in request.json
            else request.json["name"]
        )
        self.repositories[name] = bool(request.json.get("private", request.json.get("visibility") == "private"))
        return {"url": f"{self.url}/{name}", "id": name, "name": name}

    def _preupload(self, request: Request, name: str) -> Any:
        self._require_repository(name)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in request.json["files"]
            ]
        }

    def _validate(self, request: Request) -> Any:
        """The Hub's check of a model card's front matter."""
        matter = yaml.safe_load(request.json["content"].split("---")[1])
        errors = [] if {"license", "base_model", "tags"} <= matter.keys() else [{"message": "a key is missing"}]
        return {"errors": errors, "warnings": []}

    def _batch(self, request: Request, name: str) -> Any:
        self._require_repository(name)
        objects = []
        for wanted in request.json["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.large_files:
                entry["actions"] = {
                    "upload": {"href": f"{self.url}/upload/{wanted['oid']}/{wanted['size']}", "header": {}}
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _upload(self, request: Request, digest: str, size: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != digest or len(request.body) != int(size):
            self.problems.append(f"upload {digest} has other bytes")
        self.large_files[digest] = request.body
        return {}

    def _commit(self, request: Request, name: str) -> Any:
        self._require_repository(name)
        files: dict[str, bytes] = {}
        for line in request.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            else:
                self.problems.append(f"unexpected {entry['key']}")
        self.commits.append(files)
        return {"commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "pullRequestUrl": None}

    def _require_repository(self, name: str) -> None:
        if name not in self.repositories:
            self.problems.append(f"{name} was used before it was created")

    _ROUTES = (
        (r"POST /api/repos/create", _create),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/main(?:\?.*)?", _preupload),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
        (r"POST /api/validate-yaml", _validate),
        (r"PUT /upload/([0-9a-f]{64})/(\d+)", _upload),
        (r"POST /api/models/([^/]+/[^/]+)/commit/main(?:\?.*)?", _commit),
    )


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Serve a listener on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
            request = Request(method=self.command, path=self.path, headers=self.headers, body=body)
            listener.requests.append(request)
            status, headers, answer = listener.answer(request)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815 - the base class names them

        def _chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    """A receiver of webhooks."""
    receiver = Listener()
    with listening(receiver):
        yield receiver


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in for the Hugging Face Hub; it takes large files by LFS, as a Hub without Xet does."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    stand_in = HubStandIn()
    with listening(stand_in):
        yield stand_in
