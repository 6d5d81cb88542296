"""Serve the S3 protocol on this machine: moto's server, which counts requests and can be made to fail."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class QuietHandler(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        """Write nothing."""


class S3Server:
    """A server with the bucket ``bucket``, which holds its objects in memory.

    Attributes:
        requests: the number of requests by method.
        sent, received: bytes in the bodies of answers and requests since the server started.
        on_request: is called with the method and the path before each answer. If it returns True, the server answers
            with status 503.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.sent = self.received = 0
        self.on_request: Callable[[str, str], bool | None] = lambda method, path: False
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=QuietHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables with which a client finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests[method] += 1
        self.received += int(environ.get("CONTENT_LENGTH") or 0)
        if self.on_request(method, path):
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        return self._counted(self._app(environ, start_response))

    def _counted(self, content: Iterable[bytes]) -> Iterator[bytes]:
        for block in content:
            self.sent += len(block)
            yield block


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Return a context manager that gives a running server. Its bucket is empty."""
    server = S3Server()
    try:
        urlopen(Request(f"{server.url}/bucket", method="PUT")).close()
        yield server
    finally:
        server.close()
