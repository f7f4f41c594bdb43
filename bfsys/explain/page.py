"""An explanation as one self-contained HTML page: no network, no script, no font."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from html import escape

import numpy as np

from bfsys.explain.explanation import Explanation
from bfsys.explain.overlay import Picture, Waveform, overlay_uri, picture_of, waveform_of
from bfsys.explain.ranges import KINDS
from bfsys.explain.style import LEVELS, document

ROW = 16  # bytes in a line of the hex view
SHOWN = 4096  # bytes in the hex view
BEGINNING = 256  # of these, bytes at the beginning of the file
MOST_PARTS = 40  # rows of the table
SMALL_PICTURE = 128  # pixels, up to which a picture is shown as squares
FOR, AGAINST = (230, 97, 0), (93, 58, 155)


def html(explanation: Explanation, origin: str = "") -> str:
    """The page. Whatever comes from the file or from class names is escaped. `origin` is that of `style.document`."""
    e = explanation
    sections = (
        _answer(e),
        *(f'<p class="note">{escape(note)}</p>' for note in e.notes),
        _classes(e),
        _seen(e),
        _along(e),
        _what_if(e),
        _hex(e),
        _how(e),
    )
    return document(
        f"{escape(e.name)}: {escape(e.predictions[0].class_name)}", "\n".join(filter(None, sections)), origin
    )


def _answer(e: Explanation) -> str:
    size = f"{len(e.data):,} bytes"
    what = escape(e.format if e.format != "unknown" else "unknown format")
    best = e.predictions[0]
    answer = f"<b>{escape(best.class_name)}</b> with {_percent(best.probability)}"
    if e.explained.index != best.index:
        name = escape(e.explained.class_name)
        answer += f"; the evidence below is for <b>{name}</b>, which has {_percent(e.explained.probability)}"
    return (
        f'<h1>{escape(e.name)}</h1><p class="faint">{what}, {size}</p>'
        f'<p class="answer">{answer}; {escape(e.summary())}.</p>'
    )


def _classes(e: Explanation) -> str:
    bars = "".join(
        f"<span>{escape(one.class_name)}</span>"
        f'<span class="track"><b style="width:{100 * one.probability:.2f}%"></b></span>'
        f"<span>{_percent(one.probability)}</span>"
        for one in e.predictions
    )
    return f'<h2>Likeliest classes</h2><div class="bars">{bars}</div>'


def _seen(e: Explanation) -> str:
    """The picture or the waveform, overlaid with the evidence if bytes are pixels or samples."""
    at_their_places = len(e.stored) == len(e.data) and e.format != "transformed"
    picture = picture_of(e.format, e.stored, e.gradients if at_their_places else None)
    if picture:
        return f"<h2>The picture</h2>{_picture(e, picture)}"
    ranges = tuple(part.range for part in e.parts)
    wave = waveform_of(e.format, e.stored, e.gradients, ranges) if at_their_places else None
    return f"<h2>The sound</h2>{_waveform(e, wave)}" if wave else ""


def _picture(e: Explanation, picture: Picture) -> str:
    small = " small" if max(picture.width, picture.height) <= SMALL_PICTURE else ""
    plain = f'<img class="{small}" src="{picture.uri}" alt="the picture">'
    size = f"{picture.width:,} × {picture.height:,} pixels"
    figures = f'<figure><div class="stack">{plain}</div><figcaption>{size}</figcaption></figure>'
    if picture.evidence is None:
        figures += '<p class="faint">The picture is compressed, so its bytes are not pixels.</p>'
    else:
        dimmed = f'<img class="dim{small}" src="{picture.uri}" alt="">'
        over = f'<img class="{small}" src="{overlay_uri(_colours(picture.evidence))}" alt="evidence by pixel">'
        figures += (
            f'<figure><div class="stack">{dimmed}{over}</div><figcaption>Pixels that are evidence {_key("for")} for '
            f"{escape(e.explained.class_name)} and {_key('against')} against it</figcaption></figure>"
        )
    return f'<div class="pictures">{figures}</div>'


def _colours(evidence: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 4]: the more evidence, the less transparent."""
    strength = np.abs(evidence) / (_strongest(evidence) or 1)
    colours = np.empty((*evidence.shape, 4), np.uint8)
    colours[..., :3] = np.where(evidence[..., None] > 0, FOR, AGAINST)
    colours[..., 3] = 235 * strength.clip(max=1)
    return colours


def _waveform(e: Explanation, wave: Waveform) -> str:
    most = _strongest(wave.evidence) or 1
    loudest = max(float(np.abs(wave.lowest).max()), float(np.abs(wave.highest).max())) or 1
    bars = []
    for x, (low, high, worth) in enumerate(zip(wave.lowest, wave.highest, wave.evidence, strict=True)):
        strength = min(1.0, abs(worth) / most)
        side = "for" if worth > 0 else "against"
        bars.append(
            f'<rect class="{side}" x="{x}" y="0" width="1.05" height="100" fill-opacity="{0.75 * strength:.2f}"/>'
        )
        top, bottom = 50 - 48 * high / loudest, 50 - 48 * low / loudest
        bars.append(f'<rect class="wave" x="{x}" y="{top:.1f}" width="0.9" height="{max(0.6, bottom - top):.1f}"/>')
    return (
        f'<svg viewBox="0 0 {len(wave.evidence)} 100" height="140" preserveAspectRatio="none" role="img" '
        f'aria-label="waveform with evidence">{"".join(bars)}</svg>'
        f'<p class="faint">Samples that are evidence {_key("for")} for {escape(e.explained.class_name)} and '
        f"{_key('against')} against it.</p>"
    )


def _along(e: Explanation) -> str:
    """Evidence by window above the structure of the file, on one scale, and the structure as a table."""
    length = len(e.data)
    most = max((abs(w.evidence) for w in e.windows), default=0) or 1
    lowest = min(0.0, min(w.evidence for w in e.windows) / most)
    highest = max(0.0, max(w.evidence for w in e.windows) / most)
    zero, scale = 80 * highest / ((highest - lowest) or 1), 80 / ((highest - lowest) or 1)
    bars = []
    for w in e.windows:
        height = abs(w.evidence) / most * scale
        side, top = ("for", zero - height) if w.evidence > 0 else ("against", zero)
        bars.append(
            f'<rect class="{side}" x="{1000 * w.first / length:.2f}" y="{top:.2f}" '
            f'width="{1000 * (w.end - w.first) / length * 0.92:.2f}" height="{height:.2f}">'
            f"<title>bytes {w.first:,} to {w.end - 1:,}: {w.evidence:+.3f}</title></rect>"
        )
    bars.append(f'<line class="axis" x1="0" x2="1000" y1="{zero:.2f}" y2="{zero:.2f}"/>')
    for part in e.parts:
        r = part.range
        bars.append(
            f'<rect class="{r.kind}" x="{1000 * r.first / length:.2f}" y="86" '
            f'width="{max(1.5, 1000 * (r.end - r.first) / length - 1):.2f}" height="14">'
            f"<title>{escape(r.name)}</title></rect>"
        )
    kinds = " &nbsp; ".join(f'<span class="key {kind}"></span>{kind}' for kind in KINDS)
    return (
        "<h2>Evidence along the file</h2>"
        f'<svg viewBox="0 0 1000 100" height="180" preserveAspectRatio="none" role="img" '
        f'aria-label="evidence along the file">{"".join(bars)}</svg>'
        f'<p class="faint ends"><span>byte 0</span><span>byte {length - 1:,}</span></p>'
        f'<p class="faint">Above: how much the log-probability of {escape(e.explained.class_name)} changes when '
        f"bytes of other files replace a window ({_key('for')} it falls, {_key('against')} it rises); the "
        f"largest bar is a change of {most:.2g}. Below: the structure: {kinds}.</p>{_parts(e)}"
    )


def _parts(e: Explanation) -> str:
    chosen = sorted(e.parts, key=lambda part: -part.share)[:MOST_PARTS]
    rows = [
        f'<tr><td><span class="key {p.range.kind}"></span>{escape(p.range.name)}</td>'
        f'<td class="wide">{p.range.kind}</td>'
        f'<td class="n wide">{p.range.first:,}</td><td class="n">{p.range.end - p.range.first:,}</td>'
        f'<td class="n">{_percent(p.share)}</td></tr>'
        for p in sorted(chosen, key=lambda part: part.range.first)
    ]
    if left := len(e.parts) - len(chosen):
        rows.append(f'<tr><td colspan="5" class="faint">and {left:,} parts with less evidence</td></tr>')
    head = (
        '<tr><th>part</th><th class="wide">kind</th><th class="n wide">first byte</th><th class="n">bytes</th>'
        '<th class="n">evidence</th></tr>'
    )
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _what_if(e: Explanation) -> str:
    w, name = e.without, escape(e.explained.class_name)
    now = w.predictions[0]
    change = "stays" if now.index == e.predictions[0].index else "becomes"
    return (
        f"<h2>What if</h2><p>Without <b>{escape(w.name)}</b>, the prediction {change} <b>{escape(now.class_name)}</b> "
        f"({_percent(now.probability)}); {name} has {_percent(w.probability)}, and "
        f"{_percent(e.explained.probability)} with it.</p>"
    )


def _hex(e: Explanation) -> str:
    """Bytes coloured by integrated gradients: a whole small file, or the beginning and the rows with most evidence."""
    most = _strongest(e.gradients)
    levels = np.zeros(len(e.data), np.int64)
    if most:
        levels = np.rint(e.gradients / most * LEVELS).clip(-LEVELS, LEVELS).astype(np.int64)
    lines, last = [], 0
    for row in _rows_shown(e):
        first = row * ROW
        if first > last:
            lines.append(f"<u>… {first - last:,} bytes …</u>")
        last = min(first + ROW, len(e.data))
        lines.append(f"<u>{first:08x}</u>  {_line(e.data[first:last], levels[first:last])}")
    if last < len(e.data):
        lines.append(f"<u>… {len(e.data) - last:,} bytes …</u>")
    steps = [f"n{n}" for n in range(LEVELS, 0, -1)] + [f"p{n}" for n in range(1, LEVELS + 1)]
    scale = "".join(f'<i class="{step}"></i>' for step in steps)
    return (
        f'<h2>The bytes</h2><p class="faint">against {escape(e.explained.class_name)} '
        f'<span class="scale">{scale}</span> '
        f"for it, by integrated gradients</p>"
        f'<div class="scroll"><pre>{chr(10).join(lines)}</pre></div>'
    )


def _rows_shown(e: Explanation) -> list[int]:
    rows = -(-len(e.data) // ROW)
    if rows * ROW <= SHOWN:
        return list(range(rows))
    worth = np.add.reduceat(np.abs(e.gradients), np.arange(0, len(e.data), ROW))
    worth[: BEGINNING // ROW] = np.inf
    return np.sort(np.argsort(-worth, kind="stable")[: SHOWN // ROW]).tolist()


def _line(data: np.ndarray, levels: np.ndarray) -> str:
    """Bytes in hexadecimal and as text; neighbours of one colour share an element."""
    pairs = [f"{byte:02x}" for byte in data.tolist()]
    text = [chr(byte) if 32 <= byte < 127 else "·" for byte in data.tolist()]
    parts = "".join(_coloured(level, " ".join(pairs[a:b])) + " " for a, b, level in _runs(levels))
    padding = " " * (3 * (ROW - len(data)))
    ascii_ = "".join(_coloured(level, escape("".join(text[a:b]))) for a, b, level in _runs(levels))
    return f'{parts}{padding}<span class="ascii"> {ascii_}</span>'


def _runs(levels: np.ndarray) -> Iterator[tuple[int, int, int]]:
    borders = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(levels)]
    yield from ((a, b, int(levels[a])) for a, b in itertools.pairwise(borders))


def _coloured(level: int, text: str) -> str:
    return f'<i class="{"p" if level > 0 else "n"}{abs(level)}">{text}</i>' if level else text


def _how(e: Explanation) -> str:
    return (
        f'<h2>How to read this</h2><p class="faint">Evidence is measured against {escape(e.reference)}. The shares '
        "come from occlusion: how much the log-probability of the class drops when a window’s bytes are replaced. The "
        "colours of single bytes come from integrated gradients. Both show what this model reads, not whether "
        "it should read it. If the same evidence is in two places, replacing one of them changes nothing, so neither "
        "place shows evidence.</p>"
    )


def _strongest(evidence: np.ndarray) -> float:
    """The evidence that gets the full colour: the 99th percentile, so that few outliers do not fade the rest."""
    strengths = np.abs(evidence[evidence != 0])
    return float(np.quantile(strengths, 0.99)) if len(strengths) else 0.0


def _key(side: str) -> str:
    return f'<span class="key k{side}"></span>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.9995 or share == 1 else "over 99.9 %"
