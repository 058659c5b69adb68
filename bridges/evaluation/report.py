"""What a run came to: one HTML file to hand over, and the same table for the terminal."""

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import rich.markup
import rich.table
from PIL import Image

from bridges.data.pictures import data_url

Table = Mapping[str, Mapping[str, Mapping[str, float | int | None]]]
"""{split: {metric: {one of COLUMNS or "low", "high": figure}}}; None, or nothing, where there is no figure."""

COLUMNS = {
    "image": "the score with the right picture; beneath it its 95 % interval (bootstrap over pictures)",
    "reranked": "the score after the matching head has reordered what the first column finds by cosine alone",
    "shuffled": "the score with the picture of another example: what is left is guessed from the text",
    "blank": "the score with an empty picture",
    "chance": "no model at all: a random order, or every word alike",
    "majority": "no model at all: always the most frequent answer",
    "n": "how many captions, questions or queries were scored",
}
METRICS = {
    "caption_nll": (
        "Caption NLL ↓",
        "how surprised the model is by each token of the true caption, in nats; lower is better",
    ),
    "text_nll": (
        "Text NLL ↓",
        "how surprised the model is by each token of the true answers in texts without a picture, in nats",
    ),
    "cider": (
        "CIDEr-D ↑",
        "how many phrases a caption shares with its references, rare phrases counting more; 0 to 10",
    ),
    "bleu4": ("BLEU-4 ↑", "how many of a caption's runs of one to four words occur in its references; 0 to 1"),
    "right_picture": (
        "Right picture ↑",
        "how often a document goes on about the picture before the words, and not about another of its; 0 to 1",
    ),
    "naming_f1": ("Naming F1 ↑", "whether captions name all objects in the picture and no others; 0 to 1"),
    "answer_accuracy": ("Answer accuracy ↑", "the share of questions whose answer is exactly right; 0 to 1"),
    "recall": (
        "R@k ↑",
        "recall: how often a right text of a picture (or picture of a text) is among the first k; 0 to 1",
    ),
    "matching_accuracy": (
        "Matching accuracy ↑",
        "how often the matching head is right about true pairs and pairs that are hard to tell from them; 0 to 1",
    ),
    "cost/seconds": ("Seconds a query ↓", "time to embed and compare, without the time to see the pictures"),
    "cost/pairs": ("Pairs a query", "with how many a query is compared, and of how many the matching head is asked"),
}
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
    `attribution` the line owed to whoever drew the pictures, `unit` that of the loss. The file appears whole or not at
    all.
    """
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in details.items())
    curve = f'<figure class="card">{plot_history(history, unit)}</figure>' if history else ""
    explained = {_key(metric) for rows in table.values() for metric in rows}
    told = [*(METRICS[key] for key in METRICS if key in explained), *((c, COLUMNS[c]) for c in columns(table))]
    notes = "".join(f"<dt>{name}</dt><dd>{text}.</dd>" for name, text in told)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def plot_history(history: Sequence[Mapping[str, Any]], unit: str = "nats per token") -> str:
    """The loss curve as an inline SVG in the page's own text colour, readable on light and on dark.

    Rows {"step", "loss"} make the training loss, rows {"step", "validation": {"caption_nll": {"image", "shuffled",
    "blank"}}} the validation NLL with its baselines. Other rows and keys are for other readers.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    checks = [(row["step"], row["validation"].get("caption_nll", {})) for row in history if "validation" in row]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bridges", "font.size": 9}):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
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
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # the same run gives the same file
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue().replace(GREY, "currentColor")
    return svg[svg.index("<svg") :]


def table_text(table: Table) -> rich.table.Table:
    """The table for the terminal: a block for each split, a row for each metric."""
    first, *others = columns(table)
    shown = rich.table.Table("", f"{first} [95 % interval]", *others, box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for split, rows in table.items():
        shown.add_row(f"[bold]{rich.markup.escape(split)}[/]")
        for metric, row in rows.items():
            label = ("    " if _is_kind(metric) else "  ") + rich.markup.escape(_label(metric))
            image, *figures = (_number(row, column) for column in (first, *others))
            interval = f" [dim]\\[{_interval(row)}][/]" if _interval(row) else ""
            shown.add_row(label, f"[bold]{image}[/]{interval}", *figures)
    return shown


def columns(table: Table) -> list[str]:
    """Those of which some metric has a figure to show, or misses one."""
    return [column for column in COLUMNS if any(column in row for rows in table.values() for row in rows.values())]


def _split(name: str, rows: Mapping[str, Mapping[str, float | int | None]], shown: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in ("", *shown))
    body = ""
    for metric, row in rows.items():
        kind = ' class="kind"' if _is_kind(metric) else ""
        image, *others = (_number(row, column) for column in shown)
        cells = f"<td><b>{image}</b><small>{_interval(row)}</small></td>" + "".join(f"<td>{x}</td>" for x in others)
        body += f'<tr><th scope="row"{kind}>{escape(_label(metric))}</th>{cells}</tr>'
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


def _key(metric: str) -> str:
    """Which of METRICS says what it is."""
    return metric if metric in METRICS else re.split("[@/]", metric)[0]


def _is_kind(metric: str) -> bool:
    """`answer_accuracy/count` is a row of its own beneath `answer_accuracy`."""
    return "/" in metric and "@" not in metric and metric not in METRICS


def _label(metric: str) -> str:
    """A kind is called by its name alone, `recall@1/image_to_text` is R@1 image to text."""
    if metric in METRICS:
        return METRICS[metric][0]
    name, _, kind = metric.partition("/")
    return f"{name.replace('recall', 'R')} {kind.replace('_', ' ')} ↑" if "@" in name else kind or metric


def _interval(row: Mapping[str, float | int | None]) -> str:
    ends = [_number(row, end) for end in ("low", "high") if row.get(end) is not None]
    return " – ".join(ends) if len(ends) == 2 else ""


def _number(row: Mapping[str, float | int | None], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
