"""The look of the pages: one style sheet for light and dark screens, and no script.

Evidence for the class is orange, and evidence against it is purple. People who cannot distinguish red from green can
distinguish these two. Kinds of ranges have colours of Okabe and Ito, and also a pattern or label.
"""

from __future__ import annotations

LEVELS = 4  # shades of evidence on each side

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1c1c22;--faint:#63636e;--line:#d9d9e0;--panel:#f5f5f8;
--for:230,97,0;--against:93,58,155;--header:#56b4e9;--metadata:#cc79a7;--content:#009e73}
@media (prefers-color-scheme:dark){:root{--ground:#15151a;--ink:#ececf1;--faint:#a3a3b0;--line:#3a3a45;--panel:#1f1f27;
--for:255,140,50;--against:170,130,235}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:60rem;background:var(--ground);color:var(--ink);
font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.35rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:1.8rem 0 .5rem}
p{margin:.4rem 0}.faint{color:var(--faint);font-size:.875rem}.answer{font-size:1.1rem}
.note{background:var(--panel);border-left:4px solid var(--metadata);padding:.5rem .8rem;margin:.6rem 0}
.good{border-color:var(--content)}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{padding:.25rem .5rem;text-align:left;
border-bottom:1px solid var(--line)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.scroll{overflow-x:auto}
.bars{display:grid;grid-template-columns:minmax(5rem,max-content) 1fr max-content;gap:.3rem .7rem;align-items:center}
.bars>span:nth-child(3n+1){overflow-wrap:anywhere}
.track{background:var(--panel);height:1rem;border-radius:3px;overflow:hidden}
.track>b{display:block;height:100%;background:rgb(var(--for));border-radius:3px}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em;vertical-align:-.05em}
.header{background:var(--header);fill:var(--header)}.metadata{background:var(--metadata);fill:var(--metadata)}
.content{background:var(--content);fill:var(--content)}
.kfor{background:rgb(var(--for))}.kagainst{background:rgb(var(--against))}
svg{display:block;width:100%}svg .for{fill:rgb(var(--for))}svg .against{fill:rgb(var(--against))}
svg .axis{stroke:var(--faint);stroke-width:1;vector-effect:non-scaling-stroke}svg .wave{fill:var(--faint)}
.ends{display:flex;justify-content:space-between}
pre{margin:0;font:12px/1.55 ui-monospace,monospace}
pre u{text-decoration:none;color:var(--faint)}pre i{font-style:normal}
.p1{background:rgba(var(--for),.16)}.p2{background:rgba(var(--for),.34)}.p3{background:rgba(var(--for),.56)}
.p4{background:rgba(var(--for),.82)}.n1{background:rgba(var(--against),.16)}.n2{background:rgba(var(--against),.3)}
.n3{background:rgba(var(--against),.48)}.n4{background:rgba(var(--against),.7)}
.scale{display:inline-flex;vertical-align:middle;margin:0 .4rem}.scale i{width:1.3rem;height:.9rem}
.pictures{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;width:min(20rem,100%)}
figcaption{font-size:.875rem;color:var(--faint)}
.stack{position:relative}.stack img{display:block;width:100%;height:auto}
.stack img+img{position:absolute;inset:0;height:100%}.dim{filter:grayscale(1) opacity(.45)}
.small{image-rendering:pixelated}
@media (max-width:40rem){body{padding:.8rem}pre{font-size:10px}.ascii{display:none}.wide{display:none}}
"""


def document(title: str, body: str, origin: str = "") -> str:
    """An HTML page. `title` and `body` must be escaped already. `origin` identifies the file that the page explains; it
    is plain text near the beginning of the page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">'
        f'<meta name="origin" content="{origin}"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


GENERATOR = "bfsys explain"
"""Marks a page that bfsys wrote and may overwrite."""
