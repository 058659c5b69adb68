"""A user's own interleaved prompt as token ids: text and pictures in reading order, plain text and no chat."""

from collections.abc import Sequence

from PIL import Image

from bridges.build import Assembled
from bridges.data.conversation import Turn
from bridges.data.template import IGNORE_INDEX, IMAGE_MARK, Encoded, Template
from bridges.inference.scoring import Tree, stem_and_tree

Prompt = Sequence[str | Image.Image]

CONTENT = "{% for m in messages %}{{ m.content }}{% endfor %}"


class Plain:
    """Prompts as the tokenizer's beginning of a sequence, if it has one, and their content.

    What an encoder reads ends with the end of a sequence. A bridge that reads instructions gets with each picture the
    text up to the next one.
    """

    def __init__(self, assembled: Assembled) -> None:
        template, language = assembled.template, assembled.model.language
        self.template = Template(
            template.tokenizer, template.num_slots, CONTENT, instructed=template.instructed, tiler=template.tiler
        )
        self.begin = str(template.tokenizer.bos_token or "")
        self.end = str(template.tokenizer.eos_token) if language.has_encoder else ""
        self._trees: dict[tuple[str, tuple[str, ...]], tuple[list[int], Tree]] = {}

    def encode(self, prompt: Prompt, first: bool = True, last: bool = True) -> Encoded:
        """Ids of a prompt, or of a part of one, each piece between pictures tokenized once.

        Raises ValueError for what is neither text nor a picture.
        """
        turns = turns_of(prompt)
        ids, _, looks = self.template.tokenize(self._text(turns, first, last))
        return Encoded(ids, [IGNORE_INDEX] * len(ids), self.template.images(turns), self.template.asked(turns), looks)

    def with_labels(self, prompt: Prompt, labels: Sequence[str], first: bool = True) -> tuple[Encoded, Tree]:
        """What is read before any of the labels, and the tree of them. Raises ValueError as `encode` does."""
        turns = turns_of(prompt)
        head, mark, tail = self._text(turns, first, last=True).rpartition(IMAGE_MARK)
        ids, _, looks = self.template.tokenize(head + mark) if mark else ([], [], [])
        known = (tail, tuple(labels))
        if known not in self._trees:  # most queries of a task end alike
            self._trees[known] = stem_and_tree(self.template, tail, labels)
        stem, tree = self._trees[known]
        images = self.template.images(turns)
        ids, looks = ids + stem, looks + [len(images)] * len(stem)
        return Encoded(ids, [IGNORE_INDEX] * len(ids), images, self.template.asked(turns), looks), tree

    def _text(self, turns: Sequence[Turn], first: bool, last: bool) -> str:
        return self.begin * first + self.template.render(turns)[0] + self.end * last


def turns_of(prompt: Sequence[object]) -> list[Turn]:
    """A turn for each picture, with the text after it. ValueError for what is neither text nor a picture."""
    if isinstance(prompt, (str, Image.Image)):
        raise ValueError(f"a prompt is a list of texts and pictures, such as ['This is a', picture]; got {prompt!r}")
    turns = [Turn("user", [])]
    for part in prompt:
        if isinstance(part, str):
            turns[-1].content.append(part)
        elif isinstance(part, Image.Image):
            turns.append(Turn("user", [part]))
        else:
            raise ValueError(f"a prompt holds texts and pictures (PIL), not {part!r}; open a file with PIL.Image.open")
    return turns


def join(texts: Sequence[Encoded]) -> Encoded:
    """One text after another, pictures counted through all."""
    ids, labels, looks = [], [], []
    images: list[Image.Image] = []
    asked: list[str] = []
    for text in texts:
        looks += [look + len(images) for look in text.looks]
        ids, labels = ids + text.ids, labels + text.labels
        images, asked = images + text.images, asked + text.asked
    return Encoded(ids, labels, images, asked, looks)


def follow(text: Encoded, ids: Sequence[int]) -> Encoded:
    """A text, and an answer as its target."""
    return Encoded(
        [*text.ids, *ids], [*text.labels, *ids], text.images, text.asked, [*text.looks, *text.looks[-1:] * len(ids)]
    )
