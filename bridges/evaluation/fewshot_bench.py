"""Trials of few-shot prompting: demonstrations chosen, queries put after them, answers scored."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from random import Random
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bridges.build import Assembled
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.evaluation.fewshot_report import summary
from bridges.evaluation.fewshot_tasks import OPEN, Form, Items, Task, data_of, labels_of, measure
from bridges.evaluation.metrics import majority
from bridges.evaluation.run import namer
from bridges.evaluation.tasks import LONGEST_ANSWER, LONGEST_CAPTION
from bridges.inference.demonstrations import Choice, drawn, fixed, gallery, nearest, text_only
from bridges.inference.features import Features
from bridges.inference.fewshot import FewShot
from bridges.inference.lines import evenly
from bridges.inference.prompts import Prompt

CONTROLS = ("image", "shuffled")  # the query's own picture, or another query's; the demonstrations keep theirs

Figures = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """`shots` are numbers of demonstrations; for 0, `text_shots` stand there without pictures, as in Flamingo.

    Demonstrations come from a `pool` of training examples, queries from held-out ones; a trial for each of the `seeds`.
    `kind` is that of the questions asked.
    """

    task: Task = "caption"
    shots: tuple[int, ...] = (0, 4, 8, 16)
    choose: Choice = "fixed"
    queries: int = 100
    seeds: int = 3
    kind: str | None = None
    pool: int = 1000
    batch: int = 32
    text_shots: int = 2


class Bench:
    """A model, a pool of demonstrations and the queries, at which one trial after another is made.

    Raises ValueError where there are too few of either.
    """

    def __init__(self, assembled: Assembled, data: str | None, plan: Plan, form: Form, console: Console) -> None:
        source = data_of(assembled.recipe.data, data)
        assembled = assembled._replace(recipe=replace(assembled.recipe, data=source))
        self.assembled, self.plan, self.form, self.console = assembled, plan, form, console
        self.features, self.named = Features(assembled), namer(assembled)
        train, val = (SkipBroken(open_split(source, split)) for split in ("train", "val"))
        with console.status("reading demonstrations and queries"):
            rows = Random("pool").sample(range(len(train)), len(train))
            self.pool = Items(train, rows, plan.pool, plan.task, plan.kind)
            self.asked = Items(val, range(len(val)), plan.queries, plan.task, plan.kind)
        if len(self.asked.items) < 2 or not self.pool.items:
            raise ValueError(
                f"{source.source} has {len(self.pool.items)} demonstrations and {len(self.asked.items)} queries for "
                f"{plan.task}, of one picture each; 1 and 2 are needed. Choose another task, --kind or --data"
            )
        self.labels = labels_of(self.pool.items, form) if plan.task == "classify" else []
        self.ranked: list[list[int]] = []

    def run(self, progress: Progress) -> dict[str, Any]:
        """Every trial, and what they come to."""
        trials = [(k, seed) for k in self.plan.shots for seed in range(self.trials(k))]
        bar = progress.add_task("few-shot", total=len(trials) * len(CONTROLS) * len(self.asked.items))
        found: dict[int, dict[str, list[Figures]]] = {k: {c: [] for c in CONTROLS} for k in self.plan.shots}
        for k, seed in trials:
            progress.update(bar, description=f"{k} shots, trial {seed + 1} of {self.trials(k)}")
            for control, figures in self.trial(k, seed, lambda count: progress.advance(bar, count)).items():
                found[k][control].append(figures)
        common = majority([item.answer for item in self.pool.items])
        return {
            **asdict(self.plan),
            "data": self.assembled.recipe.data.source,
            "template": f"{self.form.before}{self.form.gap}…{self.form.after}",
            "queries": len(self.asked.items),
            "pool": len(self.pool.items),
            "labels": len(self.labels) or None,
            "majority": self.measured({"": [common] * len(self.asked.items)}),
            "figures": {str(k): {c: summary(each) for c, each in found[k].items()} for k in self.plan.shots},
        }

    def trials(self, shots: int) -> int:
        """The nearest are the same in every trial."""
        return 1 if self.plan.choose == "nearest" and shots else self.plan.seeds

    def trial(self, shots: int, seed: int, advance: Callable[[int], None]) -> dict[str, Figures]:
        """All queries once with their own pictures and once with each other's."""
        places, count = self.places(shots, seed), len(self.asked.items)
        shared = all(some == places[0] for some in places)  # then they are read once for all
        size = evenly(count, OPEN if shared else self.plan.batch)
        reader = FewShot(self.assembled, self.told(places[0], shots) if shared else [], self.features, self.plan.batch)
        found = {}
        for shift, control in enumerate(CONTROLS):
            said: dict[str, list[str]] = {}
            for start in range(0, count, size):
                some = range(start, min(start + size, count))
                prompts = [self.query(place, (place + shift) % count) for place in some]
                if not shared:
                    prompts = [self.after(self.told(places[i], shots), p) for i, p in zip(some, prompts, strict=True)]
                for way, answers in self.answers(reader, prompts).items():
                    said.setdefault(way, []).extend(answers)
                advance(len(some))
            found[control] = self.measured(said)
        return found

    def places(self, shots: int, seed: int) -> list[list[int]]:
        """Which of the pool stand before each query."""
        pool, queries = len(self.pool.items), len(self.asked.items)
        if not shots or self.plan.choose == "fixed":
            return [fixed(pool, shots or self.plan.text_shots, seed)] * queries
        if self.plan.choose == "random":
            return drawn(pool, shots, queries, seed)
        if not self.ranked:
            with self.console.status(f"looking at {pool + queries} pictures to find the nearest"):
                galleries = [
                    gallery(self.features, map(i.picture, range(len(i.items)))) for i in (self.pool, self.asked)
                ]
            self.ranked = nearest(*galleries, shots=max(self.plan.shots))
        return [order[-shots:] for order in self.ranked]

    def told(self, places: Sequence[int], shots: int) -> list[Prompt]:
        """Demonstrations as text and pictures; only text where there are to be none."""
        items = [(self.pool.picture(place), self.pool.items[place]) for place in places]
        told = [self.form.demonstration(picture, item.question, item.answer) for picture, item in items]
        return told if shots else text_only(told)

    def query(self, place: int, picture: int) -> Prompt:
        return self.form.query(self.asked.picture(picture), self.asked.items[place].question)

    def after(self, shots: Sequence[Prompt], query: Prompt) -> Prompt:
        """A query with demonstrations of its own. ValueError where they do not fit."""
        FewShot(self.assembled, shots, self.features).check([query], self.longest)
        return [*chain(*shots), *query]

    @property
    def longest(self) -> int:
        return LONGEST_CAPTION if self.plan.task == "caption" else LONGEST_ANSWER

    def answers(self, reader: FewShot, prompts: Sequence[Prompt]) -> dict[str, list[str]]:
        """What the model says; of classes the likeliest, by the log-probability of all its tokens and by their mean."""
        if not self.labels:
            return {"": reader.complete(prompts, self.longest, self.form.stop)}
        scores = reader.score(prompts, [self.form.label(label) for label in self.labels])
        ways = {"": scores.total, "_mean": scores.mean}
        return {way: [self.labels[place] for place in each.argmax(1).tolist()] for way, each in ways.items()}

    def measured(self, said: dict[str, list[str]]) -> Figures:
        figures = {way: measure(self.plan.task, answers, self.asked.items, self.named) for way, answers in said.items()}
        return {name + way: value for way, each in figures.items() for name, value in each.items()}
