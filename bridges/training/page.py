"""The page of `bridges inspect`: one file with everything in it, to be opened in a browser or sent to someone."""

from collections.abc import Sequence
from html import escape

from PIL import Image

from bridges.data.pictures import data_url

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
h1{{font-size:1.4rem}} h2{{font-size:1rem;margin:0 0 .5rem;color:#555;font-weight:600}}
table{{border-collapse:collapse;margin:1rem 0}} td{{padding:.15rem 1.2rem .15rem 0;vertical-align:top}}
td:first-child{{color:#666}} section{{border:1px solid #ddd;border-radius:.5rem;padding:1rem;margin:1rem 0}}
.text{{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.7 ui-monospace,monospace}}
img{{max-height:12rem;max-width:20rem;border-radius:.3rem;margin:0 .5rem .5rem 0;vertical-align:top}}
.slots{{background:#d6e6ff;color:#0b3d91;border-radius:.2rem;padding:.1rem .3rem;font-weight:600}}
.target{{background:#d8f5dc;color:#0a5c1b;border-radius:.2rem}} .dim{{color:#777}} .break{{color:#06748c}}
</style><h1>{title}</h1>
<p><span class="slots">slots of a picture</span> <span class="target">targets: learned</span>
<span class="dim">read, not learned</span></p>
"""

Pieces = Sequence[tuple[str, str]]
Shown = Sequence[tuple[str, Sequence[tuple[Sequence[Image.Image], Pieces]]]]


def page(source: str, figures: Sequence[tuple[str, str]], skipped: Sequence[tuple[int, str]], samples: Shown) -> str:
    """HTML of the samples, each a title and rows of pictures and (words, kind), above them the figures."""
    lines = [HEAD.format(title=escape(source)), rows_of_table(figures)]
    for title, rows in samples:
        lines.append(f"<section><h2>{escape(title)}</h2>")
        for images, pieces in rows:
            lines += [f'<img src="{data_url(image)}" alt="image {n}">' for n, image in enumerate(images, 1)]
            spans = "".join(f'<span class="{kind}">{escape(words)}</span>' for words, kind in pieces)
            lines.append(f'<div class="text">{spans}</div>')
        lines.append("</section>")
    if skipped:
        lines += ["<h2>Skipped</h2>", rows_of_table([(f"example {row}", why) for row, why in skipped])]
    return "\n".join(lines)


def rows_of_table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"
