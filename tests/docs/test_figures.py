"""The figures of the docs: valid SVG, used by a page, and the figure of the rooms says what the imports say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY
from tests.test_imports import ROOMS

FIGURES = sorted((REPOSITORY / "docs" / "figures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_is_self_contained_and_used(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title") is not None
    style = root.find(f"{SVG}style")
    assert style is not None and "prefers-color-scheme: dark" in str(style.text)
    assert not re.search(r'href="[^#]', path.read_text()), "a figure loads nothing"
    pages = [page.read_text(encoding="utf-8") for page in (REPOSITORY / "docs").glob("*.md")]
    assert any(f"](figures/{path.name})" in page for page in pages)


def test_rooms_import_only_from_rooms_below() -> None:
    root = ElementTree.parse(REPOSITORY / "docs" / "figures" / "rooms.svg").getroot()
    names = [text for text in root.iter(f"{SVG}text") if "name" in text.get("class", "")]
    height = {str(text.text): float(text.get("y", "")) for text in names}
    rooms = {room.removeprefix("pipeline."): below for room, below in ROOMS.items() if room.startswith("pipeline.")}
    assert set(height) == {*rooms, "launch", "data_tools"}
    for room, below in rooms.items():
        assert all(height[room] < height[other] for other in below.split()), room
        assert height["launch"] < height[room] < height["data_tools"]
