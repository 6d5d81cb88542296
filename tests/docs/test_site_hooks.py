"""Check the links that the hooks of the site write. ``make lint`` builds the whole site."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tests.support.runs import REPOSITORY

HOOKS = runpy.run_path(str(REPOSITORY / "docs" / "site_hooks.py"))


@pytest.fixture(scope="module")
def config() -> MkDocsConfig:
    config = MkDocsConfig()
    config.load_dict({"site_name": "test", "docs_dir": str(REPOSITORY / "docs"), "use_directory_urls": False})
    config.validate()
    config.plugins._current_plugin = "hooks"
    return config


@pytest.fixture(scope="module")
def files(config: MkDocsConfig) -> Files:
    pages = [File(uri, config.docs_dir, config.site_dir, False) for uri in ("code-tour.md", "benchmarks/README.md")]
    return HOOKS["on_files"](Files(pages), config)


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("index.md", "[tour](docs/code-tour.md#one-batch)", "[tour](code-tour.md#one-batch)"),
        ("code-tour.md", "[readme](../README.md)", "[readme](index.md)"),
        ("code-tour.md", "[x](../pipeline/training/trainer.py)", "[x](source/pipeline/training/trainer.py.md)"),
        ("benchmarks/README.md", "[x](../code-tour.md)", "[x](../code-tour.md)"),
        ("benchmarks/README.md", "[x](../../CONTRIBUTING.md)", "[x](../contributing.md)"),
        ("code-tour.md", "[x](https://example.com/y) [x](#y) [x](missing.md)", None),
    ],
)
def test_links_lead_to_pages_of_the_site(
    uri: str, link: str, expected: str | None, files: Files, config: MkDocsConfig
) -> None:
    file = files.get_file_from_path(uri)
    assert file is not None
    page = Page(None, file, config)
    assert HOOKS["on_page_markdown"](link, page=page, config=config, files=files) == (expected or link)


def test_a_source_page_has_the_source_and_stays_out_of_the_search(files: Files) -> None:
    path = "pipeline/training/trainer.py"
    file = files.get_file_from_path(f"source/{path}.md")
    assert file is not None
    assert Path(REPOSITORY, path).read_text() in file.content_string
    assert file.content_string.startswith("---\nsearch:\n  exclude: true\n---\n")


def test_a_link_to_a_definition_leads_to_its_line(files: Files, config: MkDocsConfig) -> None:
    add_lines = HOOKS["on_page_content"]
    html = '<a href="source/pipeline/training/trainer.py.html"><code>{}</code></a>'
    linked = add_lines(html.format("Trainer.fit"), page=None, config=config, files=files)
    line = int(linked.partition("#__codelineno-0-")[2].partition('"')[0])
    source = Path(REPOSITORY, "pipeline/training/trainer.py").read_text().splitlines()
    assert source[line - 1].strip().startswith("def fit(")
    assert add_lines(html.format("missing"), page=None, config=config, files=files) == html.format("missing")
