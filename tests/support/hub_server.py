"""A stand-in for the Hugging Face hub: an HTTP server on this machine that stores what a client uploads."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER, TOKEN, READ_TOKEN = "me", "hf_writes", "hf_reads"
_TOKENS = {f"Bearer {TOKEN}": "write", f"Bearer {READ_TOKEN}": "read"}


@dataclass
class Model:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """The state of the server. Tests read ``models``, and may add models."""

    endpoint: str
    models: dict[str, Model] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # hash -> a large file, which is sent before its commit
    refused: str = ""  # a path that contains this text is answered with a server error


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub on a free port of the loopback interface until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    _Handler.hubs[server.server_address[1]] = hub
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hubs: dict[int, Hub] = {}

    @property
    def hub(self) -> Hub:
        return self.hubs[self.server.server_address[1]]  # type: ignore[index]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.read_body())

    def do_PUT(self) -> None:
        oid = self.path.removeprefix("/blobs/")
        self.hub.blobs[oid] = self.read_body()
        self.send(200, {})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, body: bytes) -> None:
        rights, path = _TOKENS.get(self.headers.get("Authorization", "")), self.path.partition("?")[0]
        if rights is None:
            self.send(401, {"error": "Invalid credentials in Authorization header"})
        elif self.hub.refused and self.hub.refused in path:
            self.send(507, {"error": "The quota of this account is used up"})
        elif path == "/api/whoami-v2":
            self.send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body), rights)
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/revision/main)?", path):
            self.describe(match[1])
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/preupload/main", path):
            self.choose_modes(json.loads(body))
        elif match := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            self.accept_blobs(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.send(404, {"error": f"no such page: {path}"})

    def create(self, asked: dict[str, Any], rights: str) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        content = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if rights != "write" or not name.startswith(f"{USER}/"):
            self.send(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif name in self.hub.models:
            self.send(409, {**content, "error": "You already created this model repo"})
        else:
            self.hub.models[name] = Model(asked.get("visibility") == "private" or asked.get("private") is True)
            self.send(200, content)

    def describe(self, name: str) -> None:
        if name not in self.hub.models:
            self.send(404, {"error": "Repository not found"})
        else:
            model = self.hub.models[name]
            siblings = [{"rfilename": file} for file in model.files]
            self.send(200, {"id": name, "private": model.private, "sha": "0" * 40, "siblings": siblings})

    def choose_modes(self, asked: dict[str, Any]) -> None:
        """Tell the client to upload large files as LFS blobs, and the other files inside the commit."""
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > 2_000_000 else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in asked["files"]
        ]
        self.send(200, {"files": modes})

    def accept_blobs(self, asked: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.models[name].files
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        url = f"{self.hub.endpoint}/{name}/commit/{'1' * 40}"
        self.send(200, {"success": True, "commitUrl": url, "commitOid": "1" * 40, "hookOutput": ""})
