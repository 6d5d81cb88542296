"""Add pages to the site that are not in ``docs``: README, CONTRIBUTING, CHANGELOG and the source files in links.

All these files have relative links that work in a checkout. MkDocs knows only files in ``docs``. Therefore, the hooks
replace each link by the path that its target has in the site. The build reports links without a target.
"""

import ast
import posixpath
import re
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = "docs/"
SOURCE = "source/"

#: Path in the repository -> path in the site.
MORE_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

HOME_PAGE = "README.md"  # it is a navigation by itself

LINK = re.compile(r"\]\(([^)\s#:]+)((?:#[^)\s]*)?)\)")
DEFINITION = re.compile(r'<a href="([^"#]*source/([^"#]+\.py)\.html)"><code>([\w.]+)</code></a>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in ``docs``."""
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for path, uri in MORE_PAGES.items():
        hidden = "---\nhide:\n  - navigation\n---\n" if path == HOME_PAGE else ""
        texts[uri] = hidden + (REPOSITORY / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=texts[uri]))
    targets = {_target(uri, link) for uri, text in texts.items() for link, _ in LINK.findall(text)}
    for path in sorted(filter(_is_source, targets)):
        files.append(File.generated(config, f"{SOURCE}{path}.md", content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the repository by links to pages of the site."""

    def replace(link: re.Match[str]) -> str:
        path = _target(page.file.src_uri, link[1])
        uri = f"{SOURCE}{path}.md" if _is_source(path) else MORE_PAGES.get(path, path.removeprefix(DOCS))
        if files.get_file_from_path(uri) is None:
            return link[0]
        return f"]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{link[2]})"

    return LINK.sub(replace, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a link from the name of a function or class to its file lead to the line of the definition."""

    def add_line(link: re.Match[str]) -> str:
        line = _definitions(link[2]).get(link[3])
        return link[0].replace(link[1], f"{link[1]}#__codelineno-0-{line}") if line else link[0]

    return DEFINITION.sub(add_line, html)


def _target(uri: str, link: str) -> str:
    """Return the path in the repository to which a link of a page leads."""
    of_page = {site: path for path, site in MORE_PAGES.items()}.get(uri, DOCS + uri)
    return posixpath.normpath(posixpath.join(posixpath.dirname(of_page), link))


def _is_source(path: str) -> bool:
    is_page = path in MORE_PAGES or path.startswith(DOCS)
    return not is_page and not path.startswith("..") and (REPOSITORY / path).is_file()


def _source_page(path: str) -> str:
    """Return a page with the contents of a source file. The search does not find such pages."""
    language = {".py": "python", ".sbatch": "bash"}.get(Path(path).suffix, Path(path).suffix[1:] or "text")
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    fence = "`" * 5
    return f'---\nsearch:\n  exclude: true\n---\n# {path}\n\n{fence}{{.{language} linenums="1"}}\n{text}{fence}\n'


@cache
def _definitions(path: str) -> dict[str, int]:
    """Return the line of each class, function and method of a source file, as ``Class.method``."""
    lines: dict[str, int] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                lines[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse((REPOSITORY / path).read_text(encoding="utf-8")).body, "")
    return lines
