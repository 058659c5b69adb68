"""Conversations become token ids with the language model's own chat template; targets are known by construction."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase

from bridges.data.conversation import Turn, asked_of, images_of

IGNORE_INDEX = -100
IMAGE_TOKEN_ID = -1  # in no embedding table: the language model's vocabulary stays as it is
IMAGE_MARK = "\ufdd0"  # three of Unicode's noncharacters: they stand in nobody's text
PLACE = re.compile("\ufdd1(\\d+)\ufdd2")
IMAGE_TAG = "<image>"  # what the language model reads where a bridge fills no slots: Flamingo's tag, as plain words

TEMPLATES = {
    # Nothing but the words: caption alignment as in LLaVA's and MiniGPT-4's first stage, and models without a chat.
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    # No prompt for a reply ends in a space: tokens take the space in front of a word with them.
    # Vicuna v0, with which MiniGPT-4 was trained.
    "vicuna0": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}###Human: {{ m.content }}"
    "{% else %}###Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}###Assistant:{% endif %}",
    # Vicuna v1.1 and v1.5, with which LLaVA-1.5 was trained.
    "vicuna": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    # Every text of T5 and Flan-T5 ends so, what is read and what is said.
    "t5": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
}


@dataclass(frozen=True)
class Encoded:
    """One text: ids with `IMAGE_TOKEN_ID` once for each slot, labels (the id where it is a target), its pictures.

    `asked` stands beside the pictures: what is asked about each, where the bridge reads that. `looks` stands beside
    the ids: the number of the last picture before each, counted from 1; 0 where there is none.
    """

    ids: list[int]
    labels: list[int]
    images: list[Image.Image]
    asked: list[str] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)


class Template:
    """`chat` is the tokenizer's own template; or one of `plain`, `vicuna0`, `vicuna`, `t5`; or a Jinja text.

    `system` opens every conversation that has no system turn of its own. `instructed`: the bridge reads what is asked.
    `tiler` says which images a picture becomes; without one it is one.
    Raises ValueError where the tokenizer has no template, the template leaves out what someone says, or is no Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_slots: int,
        source: str = "chat",
        system: str | None = None,
        instructed: bool = False,
        tiler: Callable[[Image.Image], list[Image.Image]] | None = None,
    ) -> None:
        self.tokenizer, self.num_slots, self.system, self.instructed = tokenizer, num_slots, system, instructed
        self.tiler = tiler
        known = f"one of {', '.join(TEMPLATES)}, or a Jinja text"
        if source == "chat" and not tokenizer.chat_template:
            raise ValueError(f"template 'chat': this tokenizer has no chat template; choose {known}")
        if source != "chat" and source not in TEMPLATES and "{" not in source:
            raise ValueError(f"no template {source!r}: choose chat, {known}")
        self.jinja = None if source == "chat" else TEMPLATES.get(source, source)
        self.tag = [IMAGE_TOKEN_ID] * num_slots or tokenizer(IMAGE_TAG, add_special_tokens=False)["input_ids"]
        self.end = any_of(special_tokens(tokenizer))
        self.render([Turn("user", ["?"]), Turn("assistant", ["!"])])

    def render(self, turns: Sequence[Turn], reply: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, a mark where each picture stands, and the spans (characters) of what the assistant is to say.

        That is its words, the spaces that the template puts in front of them (a prompt for a reply ends without), and
        what stands between them and the special token that ends its turn, with that token.
        `reply` ends the text where the assistant is to speak next. A conversation without
        a system turn gets `system`, where that is given.
        """
        if self.system is not None and turns[0].role != "system":
            turns = [Turn("system", [self.system]), *turns]
        words = [self._words(turn) for turn in turns]
        messages = [{"role": turn.role, "content": f"\ufdd1{i}\ufdd2"} for i, turn in enumerate(turns)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply, chat_template=self.jinja
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        assert isinstance(text, str)
        before, *parts = PLACE.split(text)
        pieces, spans = before, []
        for number, after in zip(parts[::2], parts[1::2], strict=True):
            start = len(pieces) - (len(before) - len(before.rstrip(" ")))
            pieces += words[int(number)]
            if turns[int(number)].role == "assistant":
                end = self.end.search(after)
                spans.append((start, len(pieces) + (end.end() if end else 0)))
            pieces, before = pieces + after, after
        for i, turn in enumerate(turns):
            if str(i) not in parts[::2]:
                raise ValueError(f"the chat template leaves out what the {turn.role} says; it must print every message")
        return pieces, spans

    def _words(self, turn: Turn) -> str:
        for part in turn.content:
            if isinstance(part, str) and (IMAGE_MARK in part or PLACE.search(part)):
                raise ValueError(f"the text {part[:40]!r} holds a private character that marks a picture; take it out")
        return "".join(part if isinstance(part, str) else IMAGE_MARK for part in self._cut(turn).content)

    def _cut(self, turn: Turn) -> Turn:
        """The turn with all images that its pictures become."""
        if self.tiler is None:
            return turn
        parts = [[part] if isinstance(part, str) else self.tiler(part) for part in turn.content]
        return Turn(turn.role, [one for some in parts for one in some])

    def images(self, turns: Sequence[Turn]) -> list[Image.Image]:
        """What the encoder gets of a conversation, in reading order: its pictures, or their tiles."""
        return images_of([self._cut(turn) for turn in turns])

    def encode(self, turns: Sequence[Turn], reply: bool = False) -> Encoded:
        """Ids and labels of a conversation, each piece between pictures tokenized once.

        The target is what the assistant says and the special token that ends it. The very first token is none:
        nothing stands before it to tell it from.
        """
        text, spans = self.render(turns, reply)
        ids, labels, looks = self.tokenize(text, spans)
        labels[:1] = [IGNORE_INDEX] * len(labels[:1])
        return Encoded(ids, labels, self.images(turns), self.asked(turns), looks)

    def asked(self, turns: Sequence[Turn]) -> list[str]:
        """What is asked about each image, if the bridge reads it."""
        return asked_of([self._cut(turn) for turn in turns]) if self.instructed else []

    def tokenize(self, text: str, spans: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[int], list[int]]:
        """Ids of a rendered text, its labels (the id where a token touches one of the `spans`, characters), its looks.

        Each picture's mark becomes `num_slots` image tokens; where there are none, the words `<image>`, which look at
        it, so that a picture that another one follows at once is seen too.
        """
        ids: list[int] = []
        labels: list[int] = []
        looks: list[int] = []
        start = 0
        for index, piece in enumerate(text.split(IMAGE_MARK)):
            if index:
                ids += self.tag
                labels += [IGNORE_INDEX] * len(self.tag)
                start += len(IMAGE_MARK)
            encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                said = any(first + start < stop and last + start > begin for begin, stop in spans)
                labels.append(token if said else IGNORE_INDEX)
            start += len(piece)
            looks += [index] * (len(ids) - len(looks))
        return ids, labels, looks


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The named ones (end of sequence, …) and those that only the list of added tokens knows (`<end_of_turn>`)."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of the words, or nothing where there are none."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)")
