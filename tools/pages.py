"""Write what a reader opens in a browser: an executed notebook as one HTML file, and executed/index.html.

Every page works offline: no script or font is fetched, formulas become MathML, figures stand in the file.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?! )([^$\n]+?)(?<! )\$(?![\w$])", re.DOTALL)
# nbconvert's template drops the alternative text that a figure brings with it.
WITH_ALT = """{%- extends 'index.html.j2' -%}
{%- block data_png -%}
{%- set alt = output | get_metadata('alt', 'image/png') -%}
{{ super() | replace('<img ', '<img alt="' ~ (alt | escape_html) ~ '" ', 1) if alt else super() }}
{%- endblock data_png -%}
"""
REMOTE_IMAGE = re.compile(r"\[!\[([^\]]*)\]\(https?://[^)]*\)\]")


def write_page(notebook: Path, page: Path) -> None:
    """Write an executed notebook as one HTML file that opens offline."""
    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = _offline_markdown(cell.source)
    exporter = HTMLExporter(
        template_name="lab",
        template_file="with_alt.html.j2",
        extra_loaders=[DictLoader({"with_alt.html.j2": WITH_ALT})],
        mathjax_url="",
        require_js_url="",
        jquery_url="",
        mermaid_js_url="",
        widget_renderer_url="",
        jupyter_widgets_base_url="",
    )
    title = next((cell.source for cell in content.cells if cell.source.startswith("# ")), "# Notebook").splitlines()[0][
        2:
    ]
    body, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": title}})
    # What is left of the template's loaders would ask for an empty address.
    body = re.sub(r'<script[^>]*src=""[^>]*></script>', "", body)
    body = re.sub(
        r"<script[^>]*>(?:(?!</script>).)*(?:mermaid|MathJax)(?:(?!</script>).)*</script>", "", body, flags=re.DOTALL
    )
    page.write_text(body, encoding="utf-8")


def _offline_markdown(source: str) -> str:
    parts = re.split(r"(```.*?```|`[^`\n]+`)", source, flags=re.DOTALL)  # code is left alone
    for number in range(0, len(parts), 2):
        text = REMOTE_IMAGE.sub(r"[\1]", parts[number])
        parts[number] = MATH.sub(
            lambda match: convert(match[1] or match[2], display="block" if match[1] else "inline"), text
        )
    return "".join(parts)


def write_index(folder: Path) -> Path:
    """Write index.html over all results in a folder of executed notebooks and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for path in sorted(folder.glob("week*/*.json")):
        results.append((path, json.loads(path.read_text(encoding="utf-8"))))
    rows = "".join(_row(folder, path, result) for path, result in results)
    versions = results[-1][1]["versions"] if results else {}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    page = PAGE.format(
        rows=rows or "<tr><td colspan=7>nothing has been run yet: make run</td></tr>", versions=html.escape(shown)
    )
    index = folder / "index.html"
    index.write_text(page, encoding="utf-8")
    return index


def _row(folder: Path, path: Path, result: dict) -> str:
    link = path.with_suffix(".html").relative_to(folder).as_posix()
    name = html.escape(result["title"]) + (
        f"<br><small>{html.escape(result['variant'])}</small>" if result["variant"] else ""
    )
    values = result["values"]
    metric = html.escape(str(values.get("metric", "")))
    before, after = (f"{values[key]:.3f}" if isinstance(values.get(key), float) else "-" for key in ("before", "after"))
    slow = "".join(f"<li>{seconds:.1f} s <code>{html.escape(line)}</code></li>" for seconds, line in result["slowest"])
    status = "" if result["status"] == "ok" else f"<p class=failed>failed: {html.escape(result['error'])}</p>"
    return (
        f"<tr><td><a href='{html.escape(link)}'>{name}</a><br>"
        f"<small>{html.escape(result['lesson'])}, {result['copy']}, {result['profile']}</small>{status}</td>"
        f"<td>{metric}</td><td class=n>{before}</td><td class=n><b>{after}</b></td><td class=n>{result['time_s'] / 60:.1f}</td>"
        f"<td class=n>{result['peak_bytes'] / 1e9:.1f}</td><td><ul>{slow}</ul></td></tr>"
        f"{_preview(path.with_suffix('.ipynb'))}"
    )


def _preview(notebook: Path) -> str:
    """Return a table row with the first figure of the cell tagged preview, if there is one."""
    if not notebook.is_file():
        return ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "preview" in cell["metadata"].get("tags", []):
            for output in cell.get("outputs", []):
                if image := output.get("data", {}).get("image/png"):
                    alt = output.get("metadata", {}).get("image/png", {}).get("alt", "before and after")
                    image = f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{image.strip()}'>"
                    return f"<tr><td colspan=7>{image}</td></tr>"
    return ""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Executed lessons</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .5em .7em; border-bottom: 1px solid #ddd; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
ul {{ margin: 0; padding-left: 1em; font-size: 85%; }} img {{ max-width: 100%; height: auto; }}
small {{ color: #666; }} .failed {{ color: #b00020; }}
</style></head><body>
<h1>Executed lessons</h1>
<p>Each lesson as it ran on this machine: its main score before and after fine-tuning, the time of the whole notebook,
the kernel's peak memory, and its three slowest cells.</p>
<table><tr><th>lesson</th><th>score</th><th class=n>before</th><th class=n>after</th>
<th class=n>minutes</th><th class=n>peak GB</th><th>slowest cells</th></tr>
{rows}</table>
<p><small>{versions}</small></p>
</body></html>
"""
