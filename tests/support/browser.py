"""Measure HTML pages in a real browser, with chromium's command line. The page to measure is in a frame."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PHONE, DESKTOP = 390, 1280  # CSS pixels

_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
]
_DARK = ["--blink-settings=preferredColorScheme=0"]

# The page is measured in a frame because a window has a minimum width.
_MEASURING_PAGE = """<!doctype html><body><iframe id="frame" style="border: 0; width: {width}px; height: 900px"
srcdoc="{page}"></iframe><pre id="measured"></pre><script>
frame.onload = () => {{
  const inside = frame.contentDocument, size = (element) => element.getBoundingClientRect();
  measured.textContent = JSON.stringify({{
    width: inside.documentElement.scrollWidth,
    background: frame.contentWindow.getComputedStyle(inside.body).backgroundColor,
    ink: frame.contentWindow.getComputedStyle(inside.body).color,
    tables: [...inside.querySelectorAll("table")].map((table) => ({{
      left: size(table).left, right: size(table).right,
      inner: table.scrollWidth, shown: table.parentElement.clientWidth,
    }})),
    smallest_text: Math.min(...[...inside.querySelectorAll("svg text")].map((text) => size(text).height)),
    pictures: [...inside.querySelectorAll("svg")].map((svg) => ({{
      width: size(svg).width, height: size(svg).height, right: size(svg).right,
      lines: [...svg.querySelectorAll("[id^=line2d] > path")].filter((p) => p.getTotalLength() > 0).length,
      stroke: frame.contentWindow.getComputedStyle(svg.querySelector("[id^=line2d] > path")).stroke,
    }})),
  }});
}};
</script></body>"""


@dataclass(frozen=True)
class Seen:
    width: float  # of the page; if it is larger than the window's, the page scrolls sideways
    background: str
    ink: str
    smallest_text: float  # height of a line in a picture, in CSS pixels
    tables: list[dict[str, Any]]
    pictures: list[dict[str, Any]]
    console: list[str]  # messages of the page and the browser


def look_at(page: str, width: int, *, dark: bool = False) -> Seen:
    """Open an HTML page in a window of the given width and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measure.html"
        file.write_text(_MEASURING_PAGE.format(width=width, page=escape(page)), encoding="utf-8")
        measured, console = measured_by(file.as_uri(), *(_DARK if dark else []))
    return Seen(**measured, console=console)


def measured_by(address: str, *options: str) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON that a page wrote into its ``<pre id="measured">``, and the lines of its console."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "--dump-dom", *options, address]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    measured = result.stdout.partition('<pre id="measured">')[2].partition("</pre>")[0]
    assert measured, result.stdout[-2000:] + result.stderr
    return json.loads(unescape(measured)), [line for line in result.stderr.splitlines() if "CONSOLE" in line]
