"""How many more queries are answered after demonstrations that are read once than with nothing reused."""

from collections.abc import Callable
from typing import Any

from rich.console import Console

from bridges.benchmark.naive import from_cache
from bridges.benchmark.rounds import differ, figures, in_turns, table
from bridges.checkpoint import load
from bridges.evaluation.fewshot_bench import Bench, Plan
from bridges.evaluation.fewshot_tasks import Task, read_form
from bridges.inference.demonstrations import fixed
from bridges.inference.features import Features
from bridges.inference.fewshot import FewShot
from bridges.inference.prompts import Prompt, join

Said = dict[str, list[str]]

WHAT = {
    "kept": "encodes and reads the demonstrations once, in the time that is told; queries after them side by side, as "
    "many as take the room of a batch of whole prompts; a caption that has ended is read no more, labels are a tree",
    "anew": "encodes and reads the demonstrations for every query, a batch of whole prompts side by side, until all "
    "have ended; labels one after another from the cache, token by token",
    "anew, tree": "as anew, with all labels in one pass",
}


def fewshot(
    checkpoint: str,
    rounds: int = 3,
    task: Task = "caption",
    kind: str | None = None,
    shots: int = 16,
    queries: int = 32,
    data: str | None = None,
    pool: int = 200,
    batch: int = 32,
    console: Console | None = None,
) -> dict[str, Any]:
    """Print, and return, the median seconds for all queries after fixed demonstrations, in each way of WHAT.

    As for `anew`, so does OpenFlamingo's evaluation. The ways take turns, after one query each that does not count.
    Raises ValueError where they do not answer alike in float32.
    """
    told = console or Console()
    assembled = load(checkpoint)
    if not assembled.model.language.shares(1):
        raise ValueError(f"{assembled.model.language.name} cannot share a beginning, so nothing is kept to be compared")
    bench = Bench(assembled, data, Plan(task, (shots,), "fixed", queries, 1, kind, pool, batch), read_form(task), told)
    demonstrations = bench.told(fixed(len(bench.pool.items), shots), shots)
    prompts = [bench.query(place, place) for place in range(len(bench.asked.items))]

    def reader(reuse: bool) -> FewShot:
        return FewShot(bench.assembled, demonstrations, Features(bench.assembled, keep=reuse), batch, reuse)

    ways: dict[str, Callable[[list[Prompt]], Said]] = {
        "kept": lambda some: bench.answers(reader(True), some),
        "anew": lambda some: anew(bench, reader(False), some),
    }
    if bench.labels:
        ways["anew, tree"] = lambda some: bench.answers(reader(False), some)
    for run in ways.values():
        run(prompts[:1])
    said: dict[str, list[Said]] = {way: [] for way in ways}
    timed = {way: lambda way=way, run=run: said[way].append(run(prompts)) for way, run in ways.items()}
    seconds = in_turns(timed, rounds)
    for way, answers in said.items():
        if any(one[""] != said["kept"][0][""] for one in answers):
            why = f"the answers differ: {way} does not answer as what is kept does"
            differ(why, assembled.model.language.dtype, told)
    rates = {way: f"{len(prompts) / found['median']:.2f}" for way, found in figures(seconds).items()}
    told.print(table(f"{task}, {shots} shots, {len(prompts)} queries", seconds, {"queries a second": rates}))
    for way in ways:
        told.print(f"{way}: {WHAT[way]}", highlight=False)
    return {"task": task, "kind": kind, "shots": shots, "queries": len(prompts), **figures(seconds)}


def anew(bench: Bench, reader: FewShot, prompts: list[Prompt]) -> Said:
    """With nothing reused."""
    if not bench.labels:
        return bench.answers(reader, prompts)
    labels, best = [bench.form.label(label) for label in bench.labels], []
    for start in range(0, len(prompts), reader.batch):
        grown = [
            reader.plain.with_labels(prompt, labels, first=False) for prompt in prompts[start : start + reader.batch]
        ]
        assert all(tree == grown[0][1] for _, tree in grown), "queries that end otherwise have other trees"
        texts = [join([*reader.shots, text]) for text, _ in grown]
        totals = from_cache(reader.model, reader.features, texts, grown[0][1], whole=False)
        best += totals.argmax(1).tolist()
    return {"": [bench.labels[place] for place in best]}
