"""What a model says about held-out pictures, with the right picture, another one and none; and the table of it all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.build import Assembled
from bridges.data.batch import collate, rows_of
from bridges.data.conversation import Conversation, Example, Turn, images_of
from bridges.data.template import IGNORE_INDEX
from bridges.evaluation.documents import continued, pieces, right_picture
from bridges.evaluation.metrics import accuracy, bleu, bleu_counts, cider_d, f1, interval, majority, naming
from bridges.inference.decoding import answers
from bridges.objectives.controls import CONTROLS, Control, controlled
from bridges.objectives.language import target_nll

Metric = dict[str, float | int | None]
Statistic = Callable[[np.ndarray], float]
Seen = Callable[[Sequence[Image.Image]], Tensor]

LONGEST_CAPTION, LONGEST_ANSWER = 30, 10  # new tokens


@dataclass
class Said:
    """What was said about one example under each control."""

    example: Example
    nll: dict[Control, tuple[float, int]]
    """Summed over the targets of its captions (or of all it has, when there are none), and how many targets."""
    captions: dict[Control, str]
    answers: dict[Control, list[str]]
    continued: dict[Control, list[str]] = field(default_factory=dict)
    """With what a document goes on after each of its pictures but the first."""

    @property
    def pictured(self) -> bool:
        return any(images_of(c.turns) for c in self.example.conversations)

    @property
    def references(self) -> list[str]:
        return [expected(c) for c in captions_of(self.example)]

    @property
    def kinds(self) -> list[str]:
        return [c.kind for c in questions_of(self.example)]

    @property
    def expected(self) -> list[str]:
        return [expected(c) for c in questions_of(self.example)]


def captions_of(example: Example) -> list[Conversation]:
    return [c for c in example.conversations if c.kind == "caption"]


def questions_of(example: Example) -> list[Conversation]:
    """Those with one right answer in a few words; free chats have none."""
    return [c for c in example.conversations if c.kind not in ("caption", "chat", "document")]


def expected(conversation: Conversation) -> str:
    """What the assistant says last."""
    return "".join(part for part in conversation.turns[-1].content if isinstance(part, str))


@torch.no_grad()
def listen(assembled: Assembled, examples: Sequence[Example], see: Seen | None = None) -> list[Said]:
    """Put every question of some examples to the model under each control. Pictures are shuffled among them.

    Something else than the encoder may `see` them.
    """
    said = [Said(example, {}, {}, {}) for example in examples]
    vision = assembled.model.vision
    pictures = unique(i for e in examples for c in e.conversations for i in assembled.template.images(c.turns))
    place = {id(picture): number for number, picture in enumerate(pictures)}
    device = assembled.model.language.device
    right = (see(pictures) if see else vision(vision.preprocess(pictures).to(device))).to(device)

    for control in CONTROLS:
        features = controlled(right, vision, control)

        def seen(images: Sequence[Image.Image], features: Tensor = features) -> Float[Tensor, "n p v"]:
            return features[[place[id(i)] for i in images]]

        for one, nll in zip(said, nll_of(assembled, examples, seen), strict=True):
            one.nll[control] = nll
        asked = [captions_of(e)[0].turns[:-1] if captions_of(e) else None for e in examples]
        captioned = reply(assembled, [turns for turns in asked if turns], seen, LONGEST_CAPTION)
        for one, turns in zip(said, asked, strict=True):
            if turns:
                one.captions[control] = next(captioned)
        for one, texts in zip(said, continued(assembled, examples, seen), strict=True):
            one.continued[control] = texts
        prompts = [c.turns[:-1] for e in examples for c in questions_of(e)]
        answered = reply(assembled, prompts, seen, LONGEST_ANSWER)
        for one in said:
            one.answers[control] = [next(answered) for _ in one.kinds]
    return said


def unique(pictures: Iterable[Image.Image]) -> list[Image.Image]:
    """Each picture once, by identity."""
    return list({id(picture): picture for picture in pictures}.values())


def reply(assembled: Assembled, prompts: Sequence[Sequence[Turn]], seen: Seen, longest: int) -> Iterator[str]:
    """The model's answers, one after another."""
    images = [image for turns in prompts for image in assembled.template.images(turns)]
    return iter(answers(assembled, prompts, seen(images), longest) if prompts else [])


def nll_of(assembled: Assembled, examples: Sequence[Example], seen: Seen) -> list[tuple[float, int]]:
    """For each example the summed negative log-likelihood (nats) of its captions and their number of tokens."""
    model, template, recipe = assembled
    rows, owner = [], []
    for number, example in enumerate(examples):
        whole = [c for c in example.conversations if c.kind == "document"]
        chosen = Example(captions_of(example) or whole or example.conversations)
        own = rows_of(chosen, template, recipe.data.max_length, model.language.shares(recipe.data.max_length))
        rows += own
        owner += [number] * len(own)
    batch = collate(rows).to(model.language.device)
    batch.features = seen([image for row in rows for image in row.images])
    nll = target_nll(model, batch).double().cpu()
    whose = torch.tensor(owner)[(batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)[0].cpu()]
    return [(float(nll[whose == number].sum()), int((whose == number).sum())) for number in range(len(examples))]


def tabulate(said: Sequence[Said], named: Callable[[str], frozenset[str]]) -> dict[str, Metric]:
    """Every metric that the examples allow, each with its baselines and a 95 % interval over examples.

    `named` finds the object names in a caption. The majority is the commonest caption, or answer of a kind. Texts
    without a picture have their likelihood alone, and no baseline.
    """
    pictured, texts = ([one for one in said if one.pictured is there] for there in (True, False))
    table = {"caption_nll": row(pictured, {c: ratio(pictured, c) for c in CONTROLS})} if pictured else {}
    table |= {"text_nll": row(texts, {"image": ratio(texts, "image")})} if texts else {}
    told = [one for one in said if one.captions]
    if told:
        references = [one.references for one in told]
        common = [majority([text for texts in references for text in texts])] * len(told)
        captions = {**{c: [one.captions[c] for one in told] for c in CONTROLS}, "majority": common}
        ciders = {c: cider_d(texts, references) for c, texts in captions.items()}
        counts = {c: bleu_counts(texts, references) for c, texts in captions.items()}
        table["cider"] = row(told, {c: lambda rows, c=c: float(ciders[c][rows].mean()) for c in captions})
        table["bleu4"] = row(told, {c: lambda rows, c=c: bleu(counts[c][rows]) for c in captions})
        if all(one.example.names for one in told):
            names = [one.example.names for one in told]
            found = {c: naming([named(text) for text in texts], names) for c, texts in captions.items()}
            table["naming_f1"] = row(told, {c: lambda rows, c=c: f1(found[c][rows]) for c in captions})
    return table | accuracies(said) | right_pictures(said, named)


def accuracies(said: Sequence[Said]) -> dict[str, Metric]:
    """Accuracy of short answers, over all and for each kind of question."""
    kinds = sorted({kind for one in said for kind in one.kinds})
    if not kinds:
        return {}
    common = {
        kind: majority([a for one in said for k, a in zip(one.kinds, one.expected, strict=True) if k == kind])
        for kind in kinds
    }
    table = {}
    for wanted in [None, *kinds]:
        asked = [one for one in said if (one.kinds if wanted is None else wanted in one.kinds)]
        pick = [[i for i, kind in enumerate(one.kinds) if wanted in (None, kind)] for one in asked]
        right = {
            c: [accuracy(one.answers[c], one.expected)[p] for one, p in zip(asked, pick, strict=True)] for c in CONTROLS
        }
        always = [accuracy([common[k] for k in one.kinds], one.expected)[p] for one, p in zip(asked, pick, strict=True)]
        hits = {
            c: np.array([[r.sum(), len(r)] for r in per_example])
            for c, per_example in {**right, "majority": always}.items()
        }
        statistics = {c: lambda rows, h=h: float(h[rows, 0].sum() / h[rows, 1].sum()) for c, h in hits.items()}
        name = "answer_accuracy" if wanted is None else f"answer_accuracy/{wanted}"
        table[name] = row(asked, statistics, int(hits["image"][:, 1].sum()))
    return table


def right_pictures(said: Sequence[Said], named: Callable[[str], frozenset[str]]) -> dict[str, Metric]:
    """How often what a document says after a picture names that one's objects rather than another's of the document.

    The majority is chance: one of the document's pictures.
    """
    told = [one for one in said if one.continued.get("image")]
    if not told or not all(one.example.names for one in told):
        return {}
    hits: dict[str, list[tuple[float, int]]] = {c: [] for c in (*CONTROLS, "majority")}
    for one in told:
        shown = [named(text) for text in pieces(one.example)]
        places = range(1, len(shown))
        for control in CONTROLS:
            right = [
                right_picture(named(text), shown, place)
                for text, place in zip(one.continued[control], places, strict=True)
            ]
            hits[control].append((sum(right), len(places)))
        hits["majority"].append((len(places) / len(shown), len(places)))
    sums = {c: np.array(per_document) for c, per_document in hits.items()}
    statistics = {c: lambda rows, s=s: float(s[rows, 0].sum() / s[rows, 1].sum()) for c, s in sums.items()}
    return {"right_picture": row(told, statistics, int(sums["image"][:, 1].sum()))}


def ratio(said: Sequence[Said], control: Control) -> Statistic:
    """Nats a target over the chosen examples."""
    sums = np.array([one.nll[control] for one in said])
    return lambda rows: float(sums[rows, 0].sum() / sums[rows, 1].sum())


def row(said: Sequence[Said], statistics: dict[str, Statistic], count: int | None = None) -> Metric:
    """One line of the table: the figure with the right picture, its interval, the baselines, the number of cases."""
    everything = np.arange(len(said))
    low, high = interval(statistics["image"], len(said))
    figures = {c: statistics[c](everything) if c in statistics else None for c in (*CONTROLS, "majority")}
    return {**figures, "low": low, "high": high, "n": len(said) if count is None else count}
