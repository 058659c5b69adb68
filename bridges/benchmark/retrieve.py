"""How much sooner a text finds its picture among pictures that were looked at before than among unknown ones."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

from rich.console import Console

from bridges.benchmark.rounds import differ, enough, figures, in_turns, table
from bridges.checkpoint import load_pairs
from bridges.data.pairs import pair_of
from bridges.data.scenes import Scenes
from bridges.inference.retrieval import Pictures, Ranking, Retriever


def retrieve(
    checkpoint: str, rounds: int = 3, queries: int = 32, pictures: int = 200, console: Console | None = None
) -> dict[str, Any]:
    """Print, and return, the median seconds for texts that each look for their own among held-out `scenes`.

    `kept` has encoded and embedded the pictures before, in seconds that are told, and embeds the text and matches the
    nearest; `anew` also encodes and embeds all pictures for every text. Texts come one at a time; both ways take turns,
    after a round that does not count. Raises ValueError for fewer than 3 rounds, a checkpoint that cannot compare, no
    or more texts than pictures, or rankings that differ in float32.
    """
    enough(rounds)
    if not 1 <= queries <= pictures:
        raise ValueError(f"{queries} queries among {pictures} pictures: at least 1, and no more than pictures")
    told, retriever = console or Console(), Retriever(load_pairs(checkpoint))
    if not retriever.can_compare:
        raise ValueError(f"{checkpoint} was not trained to compare: its objectives lack contrastive and sigmoid")
    data = Scenes("val", pictures)
    images, texts, _ = zip(*(pair_of(data[place]) for place in range(pictures)), strict=True)

    def find(among: Callable[[], Pictures]) -> list[Ranking]:
        return [retriever.find_pictures(among(), retriever.texts([text])) for text in texts[:queries]]

    began = perf_counter()
    known = retriever.see(images)
    ahead = perf_counter() - began
    ways: dict[str, Callable[[], list[Ranking]]] = {
        "kept": lambda: find(lambda: known),
        "anew": lambda: find(lambda: retriever.see(images)),
    }
    first = {way: [ranking.best(0, pictures) for ranking in run()] for way, run in ways.items()}
    if first["anew"] != first["kept"]:
        differ("the rankings differ: anew is not in the order of what is kept", retriever.vision.dtype, told)
    seconds = in_turns(ways, rounds)
    right = sum(best[0] == place for place, best in enumerate(first["kept"])) / queries
    rates = {way: f"{queries / found['median']:.2f}" for way, found in figures(seconds).items()}
    told.print(table(f"{queries} texts, {pictures} pictures", seconds, {"texts a second": rates}))
    told.print(
        f"the pictures were encoded and embedded before, in {ahead:.1f} s; the right one comes first for {right:.3f} "
        f"of the texts (by chance {1 / pictures:.3f})",
        highlight=False,
        soft_wrap=True,
    )
    return {"queries": queries, "pictures": pictures, "ahead": ahead, "first": right, **figures(seconds)}
