"""One HTML page that needs nothing else: no script, no font, no picture from elsewhere.

All text goes through :func:`escaped`: names of files, classes and sources come from data that
nobody has checked.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from chestxray_covid.datasets.report import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Forbids everything that a page could load or run, even if an escape were forgotten.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
#: Letters of a cell beyond which it is prose.
_LONG = 40
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --card: #f5f7f9;
  --line: #d5dae0; --link: #0b5cad; --fail: #a40e26; --warn: #8a4b00; --pass: #0a6c3c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaef; --soft: #9aa5b1; --paper: #14181d;
  --card: #1d232a; --line: #38414b; --link: #7ab7ff; --fail: #ff8b98; --warn: #f3b05a;
  --pass: #62d196; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p, ul { margin: .4rem 0; max-width: 46rem; } ul { padding-left: 1.2rem; }
a { color: var(--link); }
.soft { color: var(--soft); font-size: .9rem; }
.note { background: var(--card); border-left: 4px solid var(--warn); padding: .6rem .9rem;
  margin: 1rem 0; }
.verdict { display: inline-block; padding: 0 .5rem; border: 1.5px solid currentColor;
  border-radius: .3rem; font-size: .85rem; font-weight: 600; white-space: nowrap;
  color: var(--soft); }
.fail { color: var(--fail); } .warn { color: var(--warn); } .pass { color: var(--pass); }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; overflow-wrap: break-word; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.long { white-space: normal; min-width: 15rem; }
th { font-weight: 600; } thead th { border-bottom-width: 2px; }
th[scope="row"] { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 40rem) { th[scope="row"] { white-space: normal; max-width: 9rem;
  min-width: 8rem; } }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
figure { margin: 0; flex: 1 1 20rem; min-width: 0; max-width: 100%; }
figure.wide { flex-basis: 100%; }
img { display: block; width: 100%; max-width: 30rem; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .4rem; padding: .4rem; }
figure.wide img { max-width: 100%; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
details { margin: .8rem 0; } summary { cursor: pointer; }
@media print { .scroll { overflow: visible; } table { font-size: .7rem; }
  th, td { white-space: normal; padding: .2rem .4rem; } .long { min-width: 0; }
  th[scope="row"] { position: static; } tr, figure { break-inside: avoid; } }
"""


def escaped(text: object) -> str:
    r"""Return text as HTML shows it; characters without a shape, such as direction marks, as codes.

    >>> escaped("<script>\u202e'")
    '&lt;script&gt;\\u202e&#x27;'
    """
    shown = printable(str(text))
    return html.escape(shown)


def element(tag: str, text: object, kind: str = "") -> str:
    """Return an element that holds text.

    >>> element("p", "a < b", "soft")
    '<p class="soft">a &lt; b</p>'
    """
    return f"<{tag}{_class(kind)}>{escaped(text)}</{tag}>"


def table(heading: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of text, the first column of which names the rows."""
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in heading)
    body = "\n".join(f"<tr>{_row(row)}</tr>" for row in rows)
    # Focusable, so that a keyboard can scroll what a narrow window cuts off.
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _row(cells: Sequence[object]) -> str:
    # Prose may wrap, numbers and their intervals never.
    kinds = [_class("long") if len(str(cell)) > _LONG else "" for cell in cells]
    first = f'<th scope="row"{kinds[0]}>{escaped(cells[0])}</th>'
    rest = zip(cells[1:], kinds[1:], strict=True)
    return first + "".join(f"<td{kind}>{escaped(cell)}</td>" for cell, kind in rest)


def listed(entries: Iterable[tuple[str, str]]) -> str:
    """Return a list of names and what is said of each."""
    items = (f"<li><b>{escaped(name)}:</b> {escaped(text)}</li>" for name, text in entries)
    return f"<ul>{_lines(items)}</ul>"


def details(summary: str, *parts: str) -> str:
    """Return parts that open on demand."""
    return f"<details><summary>{escaped(summary)}</summary>\n{_lines(parts)}</details>"


def figures(drawn: Mapping[str, Figure]) -> str:
    """Return figures side by side where there is room; the keys are their captions."""
    parts = []
    for caption, figure in drawn.items():
        wide = _class("wide") if figure.get_figwidth() > 5 else ""
        parts.append(
            f'<figure{wide}><img src="{picture(figure)}" alt="{escaped(caption)}">'
            f"{element('figcaption', caption)}</figure>"
        )
    return f'<div class="figures">{_lines(parts)}</div>'


def picture(figure: Figure) -> str:
    """Return a figure as a ``data:`` address: drawings as SVG, radiographs as PNG."""
    from matplotlib.image import AxesImage

    drawn = not figure.findobj(AxesImage)
    buffer = io.BytesIO()
    if drawn:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    data = _named_in_order(buffer.getvalue()) if drawn else buffer.getvalue()
    kind = "svg+xml" if drawn else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _named_in_order(svg: bytes) -> bytes:
    """Return an SVG whose ids are numbers: matplotlib draws them anew for every file."""
    names = dict.fromkeys(re.findall(rb' id="([A-Za-z_]+[0-9a-f]{10,})"', svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, b"i%d_" % number)
    return svg


def document(title: str, parts: Iterable[str]) -> str:
    """Return the page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{_lines(parts)}</main>\n</body>\n</html>\n"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _lines(parts: Iterable[str]) -> str:
    return "".join(f"{part}\n" for part in parts if part)
