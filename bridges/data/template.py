"""Conversations become token ids with the language model's own chat template; targets are known by construction."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import PreTrainedTokenizerBase

from bridges.data.conversation import Turn, images_of

IGNORE_INDEX = -100
IMAGE_TOKEN_ID = -1  # in no embedding table: the language model's vocabulary stays as it is
IMAGE_MARK = "\uf8ff"  # private use, so it cannot stand in anyone's text by accident
PLACE = re.compile("\ue000(\\d+)\ue001")

TEMPLATES = {
    # Nothing but the words: caption alignment as in LLaVA's and MiniGPT-4's first stage, and language models without a chat.
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    # Vicuna v0, with which MiniGPT-4 was trained.
    "vicuna0": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}###Human: {{ m.content }}"
    "{% else %}###Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}###Assistant: {% endif %}",
    # Vicuna v1.1 and v1.5, with which LLaVA-1.5 was trained.
    "vicuna": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
}


@dataclass(frozen=True)
class Encoded:
    """One text: ids with `IMAGE_TOKEN_ID` once for each slot, labels that are the id where it is a target, its pictures."""

    ids: list[int]
    labels: list[int]
    images: list[Image.Image]


class Template:
    """`chat` is the tokenizer's own template; or one of `plain`, `vicuna0`, `vicuna`; or a Jinja text.

    `system` opens every conversation that has no system turn of its own.
    Raises ValueError where the tokenizer has no template, where the template leaves out what the assistant says, or is no Jinja.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_slots: int, source: str = "chat", system: str | None = None
    ) -> None:
        self.tokenizer, self.num_slots, self.system = tokenizer, num_slots, system
        known = f"one of {', '.join(TEMPLATES)}, or a Jinja text"
        if source == "chat" and not tokenizer.chat_template:
            raise ValueError(f"template 'chat': this tokenizer has no chat template; choose {known}")
        if source != "chat" and source not in TEMPLATES and "{" not in source:
            raise ValueError(f"no template {source!r}: choose chat, {known}")
        self.jinja = None if source == "chat" else TEMPLATES.get(source, source)
        self.render([Turn("user", ["?"]), Turn("assistant", ["!"])])

    def render(self, turns: Sequence[Turn], reply: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, a mark where each picture stands, and the spans (characters) of what the assistant says.

        `reply` ends the text where the assistant is to speak next. A conversation without
        a system turn gets `system`, where that is given.
        """
        if self.system is not None and turns[0].role != "system":
            turns = [Turn("system", [self.system]), *turns]
        words = [self._words(turn) for turn in turns]
        messages = [{"role": turn.role, "content": f"\ue000{i}\ue001"} for i, turn in enumerate(turns)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply, chat_template=self.jinja
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        assert isinstance(text, str)
        pieces, spans, seen = "", [], set()
        for part_index, part in enumerate(PLACE.split(text)):
            if part_index % 2 == 0:
                pieces += part
                continue
            turn = int(part)
            seen.add(turn)
            if turns[turn].role == "assistant":
                spans.append((len(pieces), len(pieces) + len(words[turn])))
            pieces += words[turn]
        for i, turn in enumerate(turns):
            if i not in seen and turn.role != "system":
                raise ValueError(f"the chat template leaves out what the {turn.role} says; it must print every message")
        return pieces, spans

    def _words(self, turn: Turn) -> str:
        for part in turn.content:
            if isinstance(part, str) and (IMAGE_MARK in part or PLACE.search(part)):
                raise ValueError(f"the text {part[:40]!r} holds a private character that marks a picture; take it out")
        return "".join(part if isinstance(part, str) else IMAGE_MARK for part in turn.content)

    def encode(self, turns: Sequence[Turn], reply: bool = False) -> Encoded:
        """Ids and labels of a conversation, each piece between pictures tokenized once.

        The target is what the assistant says and the special token that ends it.
        """
        text, spans = self.render(turns, reply)
        ids, labels = self.tokenize(text, spans)
        return Encoded(ids, labels, images_of(turns))

    def tokenize(self, text: str, spans: Sequence[tuple[int, int]] = ()) -> tuple[list[int], list[int]]:
        """Ids of a rendered text and its labels; each picture's mark becomes `num_slots` image tokens."""
        ids: list[int] = []
        labels: list[int] = []
        start = 0
        for index, piece in enumerate(text.split(IMAGE_MARK)):
            if index:
                ids += [IMAGE_TOKEN_ID] * self.num_slots
                labels += [IGNORE_INDEX] * self.num_slots
                start += len(IMAGE_MARK)
            encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            labels += self._targets(encoded["input_ids"], encoded["offset_mapping"], start, spans)
            start += len(piece)
        return ids, labels

    def _targets(
        self, ids: list[int], offsets: list[tuple[int, int]], start: int, spans: Sequence[tuple[int, int]]
    ) -> list[int]:
        """A token is a target where it touches the assistant's words, and on to the special token that ends them."""
        ends = set(self.tokenizer.all_special_ids)
        labels, speaking = [], False
        for token, (first, last) in zip(ids, offsets, strict=True):
            inside = any(first + start < stop and last + start > begin for begin, stop in spans)
            after = any(first + start >= stop for _, stop in spans)
            speaking = inside or (speaking and after)
            labels.append(token if speaking else IGNORE_INDEX)
            if not inside and token in ends:
                speaking = False
        return labels
