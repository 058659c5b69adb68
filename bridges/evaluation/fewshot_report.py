"""Figures against the number of demonstrations: a table for the terminal, and a plot."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.table import Table

from bridges.evaluation.plots import drawn, finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "cider": "CIDEr-D",
    "naming_f1": "Naming F1",
    "accuracy": "Accuracy",
    "accuracy_mean": "Accuracy by mean",
}
COLOURS = ("#2f80ed", "#e07b1a", "#27a065", "#a259d9")
WAYS = {
    "fixed": "the same demonstrations for all queries of a trial",
    "random": "demonstrations drawn anew for each query",
    "nearest": "for each query the demonstrations with the nearest pictures",
}


def table_text(result: Mapping[str, Any]) -> Table:
    """A row for each number of demonstrations; with the query's own picture, and with another query's."""
    metrics = list(result["majority"])
    table = Table("shots", box=None, title_justify="left", caption_justify="left")
    table.title = f"{result['task']}, {result['queries']} queries of {result['data']}; {WAYS[result['choose']]}"
    for metric in metrics:
        table.add_column(NAMES[metric], justify="right")
        table.add_column("shuffled", justify="right", style="dim")
    for shots, figures in result["figures"].items():
        cells = [spread(figures[control][metric]) for metric in metrics for control in ("image", "shuffled")]
        table.add_row(shots, *cells)
    always = [cell for metric in metrics for cell in (f"{result['majority'][metric]:.3f}", "")]
    table.add_row("always the commonest answer", *always, style="dim")
    table.caption = "mean ± standard deviation over trials; shuffled: the query has another query's picture"
    if result["labels"]:
        table.caption += f"; {result['labels']} labels, by chance {1 / result['labels']:.3f}"
    return table


def spread(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.3f}" + ("" if figure["spread"] is None else f" ± {figure['spread']:.3f}")


def summary(trials: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each metric the mean and the standard deviation over trials, and every trial."""
    values = {name: [figures[name] for figures in trials] for name in trials[0]}
    return {
        name: {"mean": mean(each), "spread": stdev(each) if len(each) > 1 else None, "trials": each}
        for name, each in values.items()
    }


def plot(result: Mapping[str, Any]) -> str:
    """An SVG: a panel for each metric, score against shots, with the baselines."""
    return drawn(partial(_draw, result), 4.2 * len(result["majority"]), 3.4)


def _draw(result: Mapping[str, Any], figure: "Figure") -> None:
    metrics, shots = list(result["majority"]), [int(k) for k in result["figures"]]
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric, colour in zip(panels, metrics, COLOURS, strict=False):
        for control, style in (("image", "o-"), ("shuffled", "o:")):
            each = [figures[control][metric] for figures in result["figures"].values()]
            means, errors = [one["mean"] for one in each], [one["spread"] or 0.0 for one in each]
            name = "own picture" if control == "image" else "another query's picture"
            axes.errorbar(shots, means, errors, fmt=style, color=colour, capsize=3, markersize=4, label=name)
        axes.axhline(result["majority"][metric], color="grey", linewidth=1, label="commonest answer")
        axes.set_xticks(shots)
        axes.set_xlabel("demonstrations")
        axes.set_title(NAMES[metric])
        axes.set_ylim(bottom=0)
        finished(axes)
