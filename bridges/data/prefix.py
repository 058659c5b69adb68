"""Prefix language modelling: the beginning of a caption is read with the picture, the rest of it is said.

BLIP-2 does so in its second stage where the language model has an encoder (Flan-T5), at a place between the first
token and the middle one; here it is words that are counted, so that no word is split.
"""

import random
import re
from dataclasses import replace

from bridges.data.conversation import Conversation, Example, Turn
from bridges.data.pictures import MapStyle


class Prefixed:
    """A data set with its captions split. The place is drawn by the example's number: in each epoch it is the same."""

    def __init__(self, rows: MapStyle[Example]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        example, draw = self.rows[index], random.Random(f"prefix {index}")
        said = [split(c, draw) if c.kind == "caption" else c for c in example.conversations]
        return replace(example, conversations=said)


def split(conversation: Conversation, draw: random.Random) -> Conversation:
    """The caption's first words, one to half of them, end the question; with its answer they are still the caption.

    The answer keeps the space that it begins with. A caption of one word stays whole.
    """
    *before, asked, said = conversation.turns
    caption = "".join(part for part in said.content if isinstance(part, str))
    ends = [word.end() for word in re.finditer(r"\S+", caption)]
    if len(ends) < 2:
        return conversation
    cut = ends[draw.randint(1, len(ends) // 2) - 1]
    last = asked.content[-1] if asked.content else ""
    gap = " " if isinstance(last, str) and last.strip() and not last[-1].isspace() else ""
    question = Turn(asked.role, [*asked.content, gap + caption[:cut]])
    return replace(conversation, turns=[*before, question, Turn(said.role, [caption[cut:]])])
