"""What few-shot prompting is asked: demonstrations and queries as text, taken from a data set, and their scores."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from string import Formatter
from typing import Literal

import yaml
from PIL import Image

from bridges.config import Data
from bridges.data.conversation import Conversation, Example, images_of
from bridges.data.pictures import MapStyle
from bridges.data.template import IMAGE_MARK
from bridges.evaluation.metrics import accuracy, cider_d, f1, naming
from bridges.evaluation.tasks import captions_of, expected, questions_of
from bridges.inference.prompts import Prompt

Task = Literal["caption", "vqa", "classify"]

# Those of the paper (Flamingo, arXiv 2204.14198), with the line break of OpenFlamingo where a demonstration ends.
TEMPLATES: dict[str, str] = {
    "caption": "{image}Output: {caption}\n",
    "vqa": "{image}Question: {question} Answer: {answer}\n",
    "classify": "{image}Output: {label}\n",
}
ANSWERS = ("caption", "answer", "label")  # all mean the same
MOST_LABELS = 1000
OPEN = 256  # pictures of a pool that stay open


@dataclass(frozen=True)
class Form:
    """How a demonstration reads. A query ends before the answer, and the model's answer where `after` begins."""

    before: str
    gap: str
    after: str

    @property
    def stop(self) -> list[str]:
        return [self.after.strip(" ")] if self.after.strip(" ") else []

    def query(self, picture: Image.Image, question: str) -> Prompt:
        head, tail = self.before.format(image=IMAGE_MARK, question=question).split(IMAGE_MARK)
        return [part for part in (head, picture, tail) if part]

    def demonstration(self, picture: Image.Image, question: str, answer: str) -> Prompt:
        return [*self.query(picture, question), self.label(answer)]

    def label(self, answer: str) -> str:
        """An answer as it stands after a query. With its end, or a label that another begins with were never behind."""
        return f"{self.gap}{answer}{self.after}"


def read_form(task: Task, template: str | None = None) -> Form:
    r"""The template of a task: the paper's, a text (in which `\n` is a line break), or a YAML file `{task: text}`.

    Raises ValueError: no such file or entry, no {image} before the answer, no answer, an unknown field.
    """
    if template is None:
        text = TEMPLATES[task]
    elif Path(template).suffix in (".yaml", ".yml"):
        text = from_file(Path(template), task)
    else:
        text = template.replace("\\n", "\n")
    try:
        fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}; braces stand around image, question and the answer") from error
    *shown, last = fields or [""]
    if last not in ANSWERS or shown.count("image") != 1 or not {"image", "question"}.issuperset(shown):
        raise ValueError(
            f"template {text!r} has the fields {', '.join(fields) or 'none'}; it needs {{image}} once, perhaps "
            "{question}, then {caption}, {answer} or {label} once"
        )
    before, after = text.split("{" + last + "}")
    return Form(before.rstrip(" "), before[len(before.rstrip(" ")) :], after.format())


def from_file(path: Path, task: str) -> str:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read templates from {path}: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or not isinstance(given.get(task), str):
        raise ValueError(f"{path} has no text for {task}; it should hold lines such as {task}: {TEMPLATES[task]!r}")
    return given[task]


def data_of(own: Data, source: str | None) -> Data:
    """The checkpoint's data or another source, each picture for itself; of scenes every kind of question is asked."""
    data = replace(own, prefix=False) if source is None else Data(source=source)
    if data.source.startswith("scenes"):
        data = replace(data, source="scenes", captions=1, questions=5.0)
    return data


@dataclass(frozen=True)
class Item:
    """One row of a data set as a task sees it; the picture is opened when it is needed."""

    row: int
    kind: str
    question: str
    answer: str
    references: tuple[str, ...]
    names: frozenset[str]


class Items:
    """The rows of a data set that a task can use, found in the order given until there are `count`."""

    def __init__(
        self, data: MapStyle[Example], rows: Iterable[int], count: int, task: Task, kind: str | None = None
    ) -> None:
        self.items: list[Item] = []
        self.picture_of: Callable[[int], Image.Image] = lru_cache(OPEN)(lambda row: shown(data[row]))
        for row in rows:
            example = data[row]
            usable = [c for c in chosen(example, task, kind) if len(images_of(c.turns)) == 1]
            if usable and len(self.items) < count:
                told = usable[0] if task == "caption" else Random(row).choice(usable)
                references = tuple(expected(c) for c in usable) if task == "caption" else (expected(told),)
                self.items.append(Item(row, told.kind, asked(told), expected(told), references, example.names))
            if len(self.items) == count:
                break

    def picture(self, place: int) -> Image.Image:
        return self.picture_of(self.items[place].row)


def chosen(example: Example, task: Task, kind: str | None) -> list[Conversation]:
    """The conversations that a task is about. What a data set does not call a question is a caption, or a chat."""
    captions = captions_of(example) or [c for c in example.conversations if c.kind == "document"]
    if task == "caption":
        return captions
    short = questions_of(example) or [c for c in example.conversations if c.kind == "chat"]
    if task == "classify":
        short = short or captions
    return [c for c in short if kind in (None, c.kind)]


def shown(example: Example) -> Image.Image:
    """The picture of the conversations that have one."""
    return next(images_of(c.turns)[0] for c in example.conversations if len(images_of(c.turns)) == 1)


def asked(conversation: Conversation) -> str:
    """The words beside the picture."""
    return "".join(part for part in conversation.turns[0].content if isinstance(part, str)).strip()


def labels_of(pool: Sequence[Item], form: Form) -> list[str]:
    """Every answer once. ValueError where they are too many to be classes, or only one; or of several questions."""
    kinds = sorted({item.kind for item in pool})
    if len(kinds) > 1 and "{question}" not in form.before:
        raise ValueError(
            f"these are labels of several kinds of question, which the template does not ask: choose one of "
            f"{', '.join(kinds)} with --kind, or put {{question}} into --template"
        )
    labels = sorted({item.answer for item in pool})
    if not 2 <= len(labels) <= MOST_LABELS:
        raise ValueError(
            f"{len(labels)} different answers are no classes (2 to {MOST_LABELS} are); choose a kind of question, or "
            "another data set"
        )
    return labels


def measure(
    task: Task, answers: Sequence[str], items: Sequence[Item], named: Callable[[str], frozenset[str]]
) -> dict[str, float]:
    """CIDEr-D (0 to 10) and naming F1 of captions, or the share of answers that are exactly right."""
    if task != "caption":
        return {"accuracy": float(accuracy(answers, [item.answer for item in items]).mean())}
    figures = {"cider": float(cider_d(answers, [item.references for item in items]).mean())}
    if all(item.names for item in items):
        figures["naming_f1"] = f1(naming([named(text) for text in answers], [item.names for item in items]))
    return figures
