"""TensorBoard pages of two runs in a real browser: layout, curves, generated text, hyperparameters."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.distributed.rendezvous import free_port
from pipeline.training.run_record import RunRecord
from tests.pipeline.conftest import tiny_config
from tests.support.browser import DESKTOP, PHONE, measured_by, needs_browser
from tests.support.runs import child_environment

PAGE = "/look"
STARTS_WITHIN_S = 60.0

# A browser does not print TensorBoard's shadow roots, but a page of the same origin can read them.
LOOKING_PAGE = """<!doctype html><body><iframe id="frame" style="border: 0; width: {width}px; height: 2000px"
src="/#{tab}"></iframe><pre id="measured"></pre><script>
const everything = (node, found = []) => {{
  found.push(node);
  if (node.shadowRoot) everything(node.shadowRoot, found);
  for (const child of node.childNodes) everything(child, found);
  return found;
}};
setTimeout(() => {{
  const nodes = everything(frame.contentDocument.body);
  measured.textContent = JSON.stringify({{
    text: nodes.filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).filter((t) => t).join("\\n"),
    curves: nodes.filter((n) => n.matches?.("path.line") && n.getTotalLength() > 0).length,
  }});
}}, 10000);
</script></body>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, learning_rate in (("small", 1e-4), ("large", 1e-3)):
        (folder / name).mkdir()
        config = tiny_config(folder / name, optimizer={"learning_rate": learning_rate}, run={"name": name})
        record = RunRecord(config)
        record.start(0)
        started = {"backend": "FSDP2 with AdamW", "world_size": 2, "device": "cpu"}
        record.write({"step": 0, "started": started})
        for step in range(1, 6):
            row = {"step": step, "loss": 5.0 / step, "lr": learning_rate, "grad_norm": 1.0 + step, "tokens": step * 64}
            record.write({**row, "tokens_per_s": 100.0 + step, "mfu": 0.5, "step_ms": 10.0})
        record.write({"step": 5, "val_loss": 2.0, "val_perplexity": 7.4, "tokens": 320})
        record.write({"step": 5, "sample": f"Once upon a time a {name} run"})
        record.close(0, "finished", {"loss": 1.0, "validation_loss": 2.0})
    return folder


class Relay(BaseHTTPRequestHandler):
    """Forwards to TensorBoard on another port, and serves one more page."""

    def __init__(self, *arguments: Any, port: int, page: str) -> None:
        self.tensorboard, self.page = f"http://127.0.0.1:{port}", page
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if self.path == PAGE:
            self._send(200, "text/html", self.page.encode())
        else:
            self._forward(None)

    def do_POST(self) -> None:
        self._forward(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _forward(self, body: bytes | None) -> None:
        headers = {"Content-Type": self.headers["Content-Type"]} if body is not None else {}
        request = urllib.request.Request(self.tensorboard + self.path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                self._send(answer.status, answer.headers["Content-Type"], answer.read())
        except urllib.error.HTTPError as refusal:
            self._send(refusal.code, "text/plain", refusal.read())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def tensorboard_port(runs: Path) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=child_environment())
    try:
        _wait_for_runs(port)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for_runs(port: int) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs") as answer:
                if len(json.load(answer)) == 2:
                    return
        except OSError:
            pass  # it is not listening yet
        assert time.monotonic() < deadline, "TensorBoard has not found the runs"
        time.sleep(0.2)


def look(port: int, tab: str, width: int) -> dict[str, Any]:
    """Return the text and curves of a tab at a window width; check that no script failed."""
    page = LOOKING_PAGE.format(tab=tab, width=width)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Relay, port=port, page=page))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}{PAGE}"
        seen, console = measured_by(address, "--virtual-time-budget=20000")
    finally:
        server.shutdown()
        server.server_close()
    assert not [line for line in console if "Uncaught" in line or "Failed to load" in line], console
    return seen


@needs_browser
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_layout_shows_both_runs(tensorboard_port: int, width: int) -> None:
    seen = look(tensorboard_port, "custom_scalars", width)
    for title in ("training and validation", "learning rate", "gradient norm before clipping", "tokens per second"):
        assert title in seen["text"]
    assert seen["curves"] >= 8, "two runs in each of four charts"


@needs_browser
def test_generated_text_is_on_the_text_page(tensorboard_port: int) -> None:
    text = look(tensorboard_port, "text", DESKTOP)["text"]
    assert "Once upon a time a small run" in text
    assert "Once upon a time a large run" in text


@needs_browser
def test_hyperparameters_are_beside_final_metrics(tensorboard_port: int) -> None:
    text = look(tensorboard_port, "hparams", DESKTOP)["text"]
    assert "FSDP2 with AdamW, 2 x cpu" in text
    columns = ("1 backends", "2 optimizer.learning_rate", "backend.name", "results/validation_loss", "results/loss")
    assert sorted(columns, key=text.index) == list(columns)


@needs_browser
def test_the_page_opens_at_the_loss(tensorboard_port: int) -> None:
    lines = look(tensorboard_port, "timeseries", DESKTOP)["text"].splitlines()
    groups = {"loss", "optimizer", "results", "speed"}
    assert list(dict.fromkeys(line for line in lines if line in groups)) == sorted(groups)
