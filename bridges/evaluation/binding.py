"""`bridges fewshot --task binding`: are invented names bound to the pictures beside them? Frozen (arXiv 2106.13884)."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bridges.build import Assembled
from bridges.evaluation.metrics import interval
from bridges.inference.features import Features
from bridges.inference.fewshot import FewShot


def binding(
    assembled: Assembled, shots: Sequence[int], queries: int, batch: int, console: Console, ways: int = 2
) -> dict[str, Any]:
    """For each number of pictures of a thing, how often its name is the likelier one, beside chance.

    The name with the full stop that closes it is scored, as in Frozen, where both must be said.
    Raises ValueError where an episode does not fit the context, or has no pictures to bind a name to.
    """
    from bridges.data.binding import Binding  # extra [demo]

    features, figures = Features(assembled), {}
    for count in shots:
        episodes, hits = Binding(ways, count, size=queries), []
        starts = range(0, queries, batch)
        for start in track(starts, f"{ways} ways, {count} shots", console=console):
            some = [episodes[place] for place in range(start, min(start + batch, queries))]
            for labels, group in groupby(some, key=lambda episode: episode.labels):
                alike = list(group)
                reader = FewShot(assembled, features=features, batch=batch)
                scores = reader.score([episode.prompt for episode in alike], [f" {label}." for label in labels])
                likeliest = [labels[place] for place in scores.total.argmax(1).tolist()]
                hits += [name == episode.answer for name, episode in zip(likeliest, alike, strict=True)]
        right = np.array(hits, dtype=np.float64)
        low, high = interval(lambda rows, right=right: float(right[rows].mean()), len(right))
        figures[str(count)] = {"accuracy": float(right.mean()), "low": low, "high": high}
    return {"ways": ways, "queries": queries, "chance": 1 / ways, "figures": figures}


def binding_text(result: Mapping[str, Any]) -> Table:
    table = Table("shots", "accuracy", "95 % interval", "chance", box=None, title_justify="left")
    table.title = f"binding of {result['ways']} new names, {result['queries']} episodes"
    for shots, row in result["figures"].items():
        span = f"{row['low']:.3f} – {row['high']:.3f}"
        table.add_row(shots, f"[bold]{row['accuracy']:.3f}[/]", span, f"{result['chance']:.3f}")
    return table
