"""The table of what was measured: what its figures are called and mean, and how it looks in the terminal."""

import re
from collections.abc import Mapping

import rich.markup
import rich.table

Row = Mapping[str, float | int | None]
Table = Mapping[str, Mapping[str, Row]]
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


def table_text(table: Table) -> rich.table.Table:
    """The table for the terminal: a block for each split, a row for each metric."""
    first, *others = columns(table)
    shown = rich.table.Table("", f"{first} [95 % interval]", *others, box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for split, rows in table.items():
        shown.add_row(f"[bold]{rich.markup.escape(split)}[/]")
        for metric, row in rows.items():
            label = ("    " if is_kind(metric) else "  ") + rich.markup.escape(label_of(metric))
            image, *figures = (number(row, column) for column in (first, *others))
            beside = f" [dim]\\[{interval(row)}][/]" if interval(row) else ""
            shown.add_row(label, f"[bold]{image}[/]{beside}", *figures)
    return shown


def columns(table: Table) -> list[str]:
    """Those of which some metric has a figure to show, or misses one."""
    return [column for column in COLUMNS if any(column in row for rows in table.values() for row in rows.values())]


def meanings(table: Table) -> list[tuple[str, str]]:
    """What the metrics and columns of a table are called and mean."""
    kinds = {metric if metric in METRICS else re.split("[@/]", metric)[0] for rows in table.values() for metric in rows}
    return [*(METRICS[key] for key in METRICS if key in kinds), *((c, COLUMNS[c]) for c in columns(table))]


def is_kind(metric: str) -> bool:
    """`answer_accuracy/count` is a row of its own beneath `answer_accuracy`."""
    return "/" in metric and "@" not in metric and metric not in METRICS


def label_of(metric: str) -> str:
    """A kind is called by its name alone, `recall@1/image_to_text` is R@1 image to text."""
    if metric in METRICS:
        return METRICS[metric][0]
    name, _, kind = metric.partition("/")
    return f"{name.replace('recall', 'R')} {kind.replace('_', ' ')} ↑" if "@" in name else kind or metric


def interval(row: Row) -> str:
    ends = [number(row, end) for end in ("low", "high") if row.get(end) is not None]
    return " – ".join(ends) if len(ends) == 2 else ""


def number(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
