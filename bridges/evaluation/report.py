"""What a run came to, as one HTML file to hand over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bridges.data.pictures import data_url
from bridges.evaluation.plots import drawn
from bridges.evaluation.table import Row, Table, columns, interval, is_kind, label_of, meanings, number
from bridges.files import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"image": "#2f80ed", "shuffled": "#e07b1a", "blank": "#a259d9"}
GREY = "#7f7f80"  # stands for the page's own text colour in the plot

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --text: #1f2328; --soft: #626b74; --line: #e3e5e8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131518; --card: #1b1e22; --text: #e4e6e9; --soft: #98a1aa; --line: #2f343a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.25rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.75rem; letter-spacing: -.015em; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; }
p, dl { margin: 0 0 1rem; } figure, dd { margin: 0; } dt, .soft { color: var(--soft); } .mark { font-weight: 650; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem; }
.top { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.facts, .notes { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.1rem; font-size: .93rem; }
.facts { margin: 0; align-content: start; }
.notes { font-size: .87rem; color: var(--soft); margin-top: 1rem; } .notes dt { color: var(--text); }
svg { display: block; width: 100%; height: auto; color: var(--soft); } svg text { font-family: inherit !important; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; font-size: .93rem; }
th, td { padding: .5rem 0; text-align: right; font-weight: 400; vertical-align: top; overflow-wrap: normal; }
th:first-child { text-align: left; width: 30%; } thead th { color: var(--soft); font-size: .85rem; padding-top: 0; }
tbody tr { border-top: 1px solid var(--line); } td b { font-weight: 650; } td { font-variant-numeric: tabular-nums; }
td small { display: block; color: var(--soft); white-space: nowrap; }
th.kind { padding-left: 1.4rem; color: var(--soft); }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
.grid .card { padding: 0; overflow: hidden; } .grid img { display: block; width: 100%; height: auto; }
figcaption { padding: .8rem 1rem .2rem; font-size: .92rem; white-space: pre-line; }
figcaption dt { font-size: .78rem; } figcaption dd { margin-bottom: .45rem; }
footer { margin-top: 2.5rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 600px) {
  body { padding: 1.5rem .8rem; } h1 { font-size: 1.5rem; } .card { padding: .9rem; }
  .notes { grid-template-columns: 1fr; gap: 0; } .notes dd { margin-bottom: .5rem; }
  tr { display: grid; grid-template-columns: 1.5fr repeat(var(--others), 1fr); } td, thead th { padding: .25rem 0; }
  th:first-child { grid-column: 1 / -1; width: auto; padding-bottom: 0; } thead th:first-child { display: none; }
  td:nth-child(2), thead th:nth-child(2) { text-align: left; } th.kind { padding-left: 0; }
}
"""


@dataclass(frozen=True)
class Shown:
    """A held-out picture, what was asked, the true answer, the model's answer, and its answer to another picture.

    `names` is what the last three are called.
    """

    picture: Image.Image
    prompt: str
    reference: str
    answer: str
    shuffled: str
    names: tuple[str, str, str] = ("Reference", "Answer", "Answer to another picture")


def write_report(
    path: Path,
    *,
    title: str,
    history: Sequence[Mapping[str, Any]],
    table: Table,
    pictures: Sequence[Shown],
    details: Mapping[str, str],
    attribution: str | None = None,
    unit: str = "nats per token",
) -> None:
    """One HTML file that needs nothing else: run facts, loss curve, the table and pictures with their answers.

    `history` are the rows of metrics.jsonl (see `plot_history`), `details` the facts of the run in the order to show,
    `attribution` the line owed to whoever drew the pictures, `unit` that of the loss. The file is whole or as it was.
    """
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in details.items())
    curve = f'<figure class="card">{plot_history(history, unit)}</figure>' if history else ""
    notes = "".join(f"<dt>{name}</dt><dd>{text}.</dd>" for name, text in meanings(table))
    shown = f'<h2>Held-out pictures</h2><div class="grid">{"".join(map(_figure, pictures))}</div>' if pictures else ""
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<div class="top"><dl class="facts card">{facts}</dl>{curve}</div>
<h2>Does it look at the picture?</h2>
<p class="soft">Only as far as its score with the right picture is better than with another, none, or by chance.</p>
{"".join(_split(name, rows, columns(table)) for name, rows in table.items())}
<dl class="notes">{notes}</dl>
{shown}
{f"<footer>{escape(attribution)}</footer>" if attribution else ""}
</body></html>
"""
    write(path, page.encode())


def plot_history(history: Sequence[Mapping[str, Any]], unit: str = "nats per token") -> str:
    """The loss curve as an inline SVG in the page's own text colour, readable on light and on dark.

    Rows {"step", "loss"} make the training loss, rows {"step", "validation": {"caption_nll": {"image", "shuffled",
    "blank"}}} the validation NLL with its baselines. Other rows and keys are for other readers.
    """
    svg = drawn(partial(_draw, history, unit), 4.6, 3.2, transparent=True).replace(GREY, "currentColor")
    return svg[svg.index("<svg") :]


def _draw(history: Sequence[Mapping[str, Any]], unit: str, figure: "Figure") -> None:
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    checks = [(row["step"], row["validation"].get("caption_nll", {})) for row in history if "validation" in row]
    axes = figure.add_subplot()
    if losses:
        axes.plot(*zip(*losses, strict=True), color=GREY, alpha=0.7, linewidth=1, label="training loss")
    for name, colour in COLOURS.items():
        points = [(step, nll[name]) for step, nll in checks if nll.get(name) is not None]
        if points:
            label = f"validation, {name}"
            axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.8, markersize=3, label=label)
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel(unit, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axes.spines[:].set_visible(False)
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=GREY)


def _split(name: str, rows: Mapping[str, Row], shown: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in ("", *shown))
    body = ""
    for metric, row in rows.items():
        kind = ' class="kind"' if is_kind(metric) else ""
        image, *others = (number(row, column) for column in shown)
        cells = f"<td><b>{image}</b><small>{interval(row)}</small></td>" + "".join(f"<td>{x}</td>" for x in others)
        body += f'<tr><th scope="row"{kind}>{escape(label_of(metric))}</th>{cells}</tr>'
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<h3>{escape(name)}</h3><div class="card"><table style="--others: {len(shown) - 1}">{table}</table></div>'


def _figure(shown: Shown) -> str:
    texts, kinds = (shown.reference, shown.answer, shown.shuffled), ("", "mark", "soft")
    facts = zip(shown.names, texts, kinds, strict=True)
    lines = "".join(f'<dt>{name}</dt><dd class="{kind}">{escape(text) or "–"}</dd>' for name, text, kind in facts)
    return (
        f'<figure class="card"><img src="{data_url(shown.picture)}" alt="{escape(shown.reference)}">'
        f'<figcaption><p class="soft">{escape(shown.prompt)}</p><dl>{lines}</dl></figcaption></figure>'
    )
