"""The shortcut report as a table for the console and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from html import escape

from bfsys.explain.ranges import KINDS
from bfsys.explain.shortcuts import Row, Shortcuts
from bfsys.explain.style import document

MOST_CLASSES = 20  # rows of a table: the classes with the most evidence outside content
NO_WARNING = "the report found no shortcut in these files"
COLUMNS = ("files", "top-1", "−headers", "−content", "length", "header", "metadata", "content")


def table(report: Shortcuts) -> str:
    """The report as a table for the console. Figures are in percent."""
    rows = list(_rows(report))
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{report.split}, {report.all.files} files, in percent. top-1: accuracy on unchanged files;",
        "−headers, −content, length: with the headers and metadata, the content, or all bytes of other classes;",
        "header, metadata, content: shares of the evidence",
        " " * (width + 2) + "".join(f"{name:>10}" for name in COLUMNS),
        *(
            f"  {name:<{width}}{row.files:>10}" + "".join(f"{100 * v:10.1f}" for v in astuple(row)[1:])
            for name, row in rows
        ),
    ]
    if left := len(report.classes) - MOST_CLASSES:
        lines += [f"  and {left} classes with more evidence in content"] if left > 0 else []
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"warning: {warning}" for warning in report.warnings] or [NO_WARNING]
    return "\n".join(lines)


def html(report: Shortcuts) -> str:
    """The page, with all names escaped."""
    verdict = "".join(f'<p class="note">{escape(w[0].upper() + w[1:])}.</p>' for w in report.warnings)
    verdict = verdict or f'<p class="note good">{escape(NO_WARNING[0].upper() + NO_WARNING[1:])}.</p>'
    head = "".join(f'<th class="n">{name}</th>' for name in COLUMNS)
    body = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{row.files:,}</td>'
        + "".join(f'<td class="n">{100 * v:.1f}</td>' for v in astuple(row)[1:])
        + "</tr>"
        for name, row in _rows(report)
    )
    shares = zip(KINDS, astuple(report.all)[5:], strict=True)
    bars = "".join(
        f'<span>{kind}</span><span class="track"><b class="{kind}" style="width:{100 * share:.1f}%"></b></span>'
        f"<span>{100 * share:.1f} %</span>"
        for kind, share in shares
    )
    notes = "".join(f'<p class="faint">{escape(note)}.</p>' for note in report.notes)
    return document(
        f"Shortcuts on {escape(report.split)}",
        f"<h1>Does the model read the content?</h1>"
        f'<p class="faint">{report.all.files:,} files of {escape(report.split)}; '
        f"chance is {100 * report.chance:.1f} %</p>"
        f'{verdict}{notes}<h2>Where the evidence is</h2><div class="bars">{bars}</div>'
        "<h2>Accuracy with parts of other files</h2>"
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
        '<p class="faint">In percent. top-1: unchanged files. −headers: headers and metadata come from files of '
        "other classes; a model that reads content loses nothing. −content: the content comes from them; a model that "
        "reads content loses everything. length: all bytes come from them, and only the length stays. The "
        "last columns are the shares of the evidence by kind of range.</p>",
    )


def _rows(report: Shortcuts) -> Iterator[tuple[str, Row]]:
    yield "all", report.all
    if len(report.sources) > 1:
        yield from report.sources.items()
    worst = sorted(report.classes.items(), key=lambda item: item[1].content_share)
    yield from worst[:MOST_CLASSES]
