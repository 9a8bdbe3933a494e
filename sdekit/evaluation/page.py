"""A page of sections: one HTML file that needs nothing beside itself, for an appendix or a pull request."""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sdekit.evaluation.parts import Figure, Line, Section, made_with

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --pass: #1a7f4b; --warn: #a86200; --fail: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 3rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.5rem; } h2 { margin: 2.2rem 0 .3rem; font-size: 1.2rem; }
p { margin: .2rem 0 .8rem; color: var(--soft); }
table { width: 100%; border-collapse: collapse; margin: .4rem 0 1rem; }
th, td { padding: .38rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { font-weight: 600; white-space: nowrap; }
.badge { display: inline-block; min-width: 3.1rem; padding: 0 .45rem; border-radius: .6rem; color: #fff;
  font-size: .78rem; font-weight: 600; text-align: center; }
.pass { background: var(--pass); } .warn { background: var(--warn); } .fail { background: var(--fail); }
tr.fail-row td { background: #fdf2f1; } tr.warn-row td { background: #fdf7ec; }
.remedy { margin-top: .15rem; color: var(--soft); } .remedy::before { content: "\\2192\\00a0"; }
pre { margin: .3rem 0 0; padding: .45rem .6rem; background: #f6f8fa; border-radius: .3rem; overflow-x: auto;
  font: 12.5px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { flex: 1 1 24rem; max-width: 30rem; margin: 0; }
figure img { width: 100%; } figcaption { color: var(--soft); font-size: .85rem; text-align: center; }
table.settings { width: auto; font-size: .85rem; } table.settings td { padding: .15rem .8rem .15rem 0; border: 0; }
table.settings td:first-child { color: var(--soft); }
@media print { body { max-width: none; padding: 0; } tr, figure, pre { break-inside: avoid; }
  .badge, tr td { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
_COLOURS = "#1f5fa8", "#c2571a", "#2b8a57", "#7b4fa3", "#8a6d1f", "#b0326e", "#3a8f9e", "#6b7280"
_MARKED = 30  # points of a curve, at most, that are shown as points
_NAMED = 8  # and that a logarithmic axis is marked at


def page(sections: Sequence[Section], title: str = "") -> str:
    """The sections as one HTML document: style and figures are in it, nothing is fetched, all text is escaped.

    ``title``: what the window says; that of the one section unless given. Raises ImportError without matplotlib, which
    draws the figures.
    """
    title = title or (sections[0].title if len(sections) == 1 else "sdekit: what was checked")
    body = "\n".join(_section(section, 1 if len(sections) == 1 else 2) for section in sections)
    head = "" if len(sections) == 1 else f"<h1>{escape(title)}</h1>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{head}{body}\n"
        f"<h2>Made with</h2>\n{_settings(made_with())}\n</body>\n</html>\n"
    )


def _section(section: Section, level: int) -> str:
    badge = "" if section.ok is None else _badge("pass" if section.ok else "fail", "ok" if section.ok else "not ok")
    parts = [f"<h{level}>{escape(section.title)}</h{level}>"]
    if section.summary:
        parts.append(f"<p>{badge} {escape(section.summary)}</p>")
    if section.lines:
        rows = "\n".join(map(_line, section.lines))
        head = '<tr><th>verdict</th><th>line</th><th>what was found</th><th class="number">number</th></tr>'
        parts.append(f"<table>\n{head}\n{rows}\n</table>")
    if section.header or section.rows:
        parts.append(_table(section.header, section.rows))
    if section.figures:
        parts.append(f'<div class="figures">\n{"".join(map(_figure, section.figures))}</div>')
    if section.settings:
        parts.append(f"<h{level + 1}>Settings</h{level + 1}>\n{_settings(section.settings)}")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _badge(verdict: str, text: str) -> str:
    return f'<span class="badge {verdict}">{escape(text)}</span>'


def _line(line: Line) -> str:
    first, _, more = line.text.partition("\n")
    said = escape(first) + (f"<pre>{escape(more)}</pre>" if more else "")
    remedy = f'<div class="remedy">{escape(line.remedy)}</div>' if line.remedy else ""
    return (
        f'<tr class="{line.verdict}-row"><td>{_badge(line.verdict, line.verdict)}</td>'
        f'<td class="name">{escape(line.name)}</td><td>{said}{remedy}</td>'
        f'<td class="number">{_shown(line.number)}</td></tr>'
    )


def _table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    def cell(value: Any, tag: str) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return f"<{tag}{' class=' + chr(34) + 'number' + chr(34) if number else ''}>{_shown(value)}</{tag}>"

    head = "".join(f"<th>{escape(str(name))}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(cell(value, 'td') for value in row)}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "\n".join(f"<tr><td>{escape(str(k))}</td><td>{_shown(v)}</td></tr>" for k, v in settings.items())
    return f'<table class="settings">\n{rows}\n</table>'


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "&mdash;" if math.isnan(value) else f"{value:.4g}"
    if value is None:
        return "&mdash;"
    return escape(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def _figure(figure: Figure) -> str:
    source, title = f"data:image/svg+xml;base64,{base64.b64encode(draw(figure)).decode()}", escape(figure.title)
    return f'<figure><img alt="{title}" src="{source}"><figcaption>{title}</figcaption></figure>\n'


def draw(figure: Figure, form: str = "svg") -> bytes:
    """The curves as a picture, "svg" or "png". Raises ImportError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError("a page's figures need matplotlib: pip install 'sdekit[benchmarks]'") from error

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "sdekit"}):
        canvas = Canvas(figsize=(5.0, 3.3), layout="constrained")
        axes = canvas.add_subplot()
        for k, (name, (x, y)) in enumerate(figure.curves.items()):
            marker, colour = "o" if len(x) <= _MARKED else None, _COLOURS[k % len(_COLOURS)]
            style = "-" if k < len(_COLOURS) else "--"
            axes.plot(x, y, style, label=name, marker=marker, markersize=3, linewidth=1.3, color=colour)
        if "x" in figure.log:
            axes.set_xscale("log", nonpositive="mask")
            points = sorted({v for x, _ in figure.curves.values() for v in x})
            if len(points) <= _NAMED:
                axes.set_xticks(points, [f"{v:g}" for v in points])
                axes.minorticks_off()
        if "y" in figure.log:
            axes.set_yscale("log", nonpositive="mask")
        axes.set(xlabel=figure.x, ylabel=figure.y)
        axes.grid(True, color="#e3e7ec", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(figure.curves) > 1:
            axes.legend(frameon=False)
        out = io.BytesIO()
        canvas.savefig(out, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()
