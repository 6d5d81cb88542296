"""The HTML page: one file without scripts that needs no network, in light and dark, on a telephone and a desktop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from pipeline.report.colours import RUNS, css_variable, css_variables
from pipeline.report.runs import Run
from pipeline.report.tables import Table, evaluation_table, settings_table, summary_table

STYLE = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.4rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p { margin: 0.3rem 0; color: var(--muted); }
.charts { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%%, 24rem), 1fr)); }
.charts figure { margin: 0; min-width: 0; }
.charts svg { display: block; width: 100%%; height: auto; }
.charts svg text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: 600; }
td { min-width: 7rem; max-width: 26rem; overflow-wrap: anywhere; white-space: pre-line; }
.swatch { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.4em; }
"""


def render_page(runs: Sequence[Run], svgs: Sequence[str], written_at: str) -> str:
    """The whole page.

    Args:
        svgs: ``<svg>`` elements of the charts.
        written_at: the date for the page's head.
    """
    return "\n".join(_lines(runs, svgs, written_at)) + "\n"


def _lines(runs: Sequence[Run], svgs: Sequence[str], written_at: str) -> Iterator[str]:
    title = escape(", ".join(run.label for run in runs))
    colours = {"light": " ".join(css_variables(dark=False)), "dark": " ".join(css_variables(dark=True))}
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<link rel="icon" href="data:,">'  # else a browser asks for one
    yield f"<title>{title}</title>\n<style>{STYLE % colours}</style>\n</head>\n<body>"
    yield f"<h1>{title}</h1>\n<p>Written {escape(written_at)}.</p>"
    yield from _section("Runs", summary_table(runs), runs)
    yield "<h2>Curves</h2>"
    yield '<div class="charts">'
    yield from (f"<figure>{svg}</figure>" for svg in svgs)
    yield "</div>"
    if not svgs:
        yield "<p>Nothing has been logged yet.</p>"
    yield from _section("Evaluation", evaluation_table(runs), runs, empty="No results yet: launch/evaluate.py.")
    if len(runs) > 1:
        yield from _section("Settings that differ", settings_table(runs), runs, empty="None.")
    else:
        yield from _section("Settings that are not the default", settings_table(runs), runs, empty="None.")
    yield "</body>\n</html>"


def _section(heading: str, table: Table, runs: Sequence[Run], empty: str = "") -> Iterator[str]:
    yield f"<h2>{heading}</h2>"
    if not table.rows:
        yield f"<p>{empty}</p>"
        return
    yield '<div class="scroll"><table>'
    swatches = {run.label: css_variable(RUNS[i % len(RUNS)]) for i, run in enumerate(runs)}
    yield "<tr><th></th>" + "".join(f"<th>{_column_head(name, swatches)}</th>" for name in table.columns) + "</tr>"
    for name, cells in table.rows.items():
        yield f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


def _column_head(name: str, swatches: dict[str, str]) -> str:
    swatch = f'<span class="swatch" style="background: {swatches[name]}"></span>' if name in swatches else ""
    return swatch + escape(name)
