"""Write the HTML page of a report: one file without scripts, which needs no network."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from data_tools.errors import install_command, one_line_write_errors
from data_tools.storage.atomic import write_bytes_durably
from data_tools.storage.files import require_writable
from pipeline.errors import ReportError
from pipeline.report import colours
from pipeline.report.curves import charts_of
from pipeline.report.runs import Run, read_runs
from pipeline.report.tables import Table, evaluation_table, settings_table, summary_table
from pipeline.run_folder.layout import REPORT_PAGE
from pipeline.run_folder.metrics import SAMPLE_KEY

PAGE_FILE = Path(REPORT_PAGE).name
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
.texts { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%%, 30rem), 1fr)); }
.texts figure { margin: 0; min-width: 0; }
.texts figcaption { color: var(--muted); overflow-wrap: anywhere; }
pre { margin: 0.3rem 0; padding-left: 0.8rem; border-left: 2px solid var(--rule); max-height: 20rem; overflow-y: auto;
  font-size: 0.85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { width: 100%%; min-width: calc(12rem + var(--runs) * 9rem); table-layout: fixed; border-collapse: collapse;
  font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 600; }
tr:first-child th { word-break: break-all; }
th:first-child { width: 14rem; }
td { white-space: pre-line; }
@media (max-width: 40rem) {
  table, tbody { display: block; min-width: 0; }
  tr { display: grid; grid-template-columns: repeat(var(--runs), minmax(7rem, 1fr)); padding: 0.3rem 0;
    border-bottom: 1px solid var(--rule); }
  th, td { border: 0; padding: 0 0.9rem 0 0; }
  th:first-child { grid-column: 1 / -1; width: auto; color: var(--muted); font-weight: normal; }
  th:first-child:empty { display: none; }
}
.swatch { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px; margin-right: 0.4em; }
"""


def write_report(run_folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the HTML page and the PNG files of a report. Return their paths, the HTML page first.

    Raises:
        ReportError: matplotlib is not installed, or a run folder cannot be used.
        DataError: the report cannot be written to ``out``.
    """
    try:
        from pipeline.report.drawing import draw  # imports matplotlib, which is optional
    except ImportError as error:
        raise ReportError(f"a report needs matplotlib ({error}): {install_command('plots')}") from error
    require_writable(out, "--out")
    runs = read_runs(run_folders)
    pictures = [draw(chart, names_runs=len(runs) > 1) for chart in charts_of(runs)]
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = "\n".join(_page_lines(runs, [picture.svg for picture in pictures], now)) + "\n"
    contents = {PAGE_FILE: page.encode(), **{f"{picture.name}.png": picture.png for picture in pictures}}
    with one_line_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_bytes_durably(out / name, content)
    return [out / name for name in contents]


def _page_lines(runs: Sequence[Run], svgs: Sequence[str], written_at: str) -> Iterator[str]:
    title = escape(", ".join(run.label for run in runs))
    variables = {
        "light": " ".join(f"--{colour.name}: {colour.light};" for colour in colours.ALL),
        "dark": " ".join(f"--{colour.name}: {colour.dark};" for colour in colours.ALL),
    }
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<link rel="icon" href="data:,">'  # without this line, browsers request an icon
    yield f"<title>{title}</title>\n<style>{STYLE % variables}</style>\n</head>\n<body>"
    yield f"<h1>{title}</h1>\n<p>Written {escape(written_at)}.</p>"
    yield from _section("Runs", summary_table(runs), runs)
    yield from _generated_texts(runs)
    yield "<h2>Curves</h2>"
    yield '<div class="charts">'
    yield from (f"<figure>{svg}</figure>" for svg in svgs)
    yield "</div>"
    if not svgs:
        yield "<p>Nothing has been logged yet.</p>"
    yield from _section("Evaluation", evaluation_table(runs), runs, empty="No results yet. Run gpt2-pipeline evaluate.")
    heading = "Settings that differ" if len(runs) > 1 else "Settings that are not the default"
    yield from _section(heading, settings_table(runs), runs, empty="None.")
    yield "</body>\n</html>"


def _generated_texts(runs: Sequence[Run]) -> Iterator[str]:
    figures = []
    for i, run in enumerate(runs):
        rows = [row for row in run.rows if SAMPLE_KEY in row]
        if rows:
            caption = f"{_swatch(i)}{escape(run.label)}, step {rows[-1]['step']:,}"
            text = escape(rows[-1][SAMPLE_KEY])
            figures.append(f"<figure><figcaption>{caption}</figcaption><pre>{text}</pre></figure>")
    if figures:
        yield from ("<h2>Generated text</h2>", '<div class="texts">', *figures, "</div>")


def _swatch(run: int) -> str:
    return f'<span class="swatch" style="background: {colours.RUNS[run % len(colours.RUNS)].css}"></span>'


def _section(heading: str, table: Table, runs: Sequence[Run], empty: str = "") -> Iterator[str]:
    yield f"<h2>{heading}</h2>"
    if not table.rows:
        yield f"<p>{empty}</p>"
        return
    yield f'<div class="scroll"><table style="--runs: {len(table.columns)}">'
    swatches = {run.label: _swatch(i) for i, run in enumerate(runs)}
    heads = (swatches.get(name, "") + escape(name) for name in table.columns)
    yield "<tr><th></th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    for name, cells in table.rows.items():
        yield f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"
