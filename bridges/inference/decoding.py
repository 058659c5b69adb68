"""One token after another, for one text or for many side by side: what chat, few-shot and evaluation share."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from bridges.build import Assembled
from bridges.data.batch import collate, pack
from bridges.data.conversation import Turn
from bridges.data.template import Encoded
from bridges.model import BridgedModel
from bridges.sight import Sight
from bridges.towers.language import LanguageTower
from bridges.towers.precision import for_few_tokens

Choose = Callable[[Float[Tensor, "b vocab"]], Int[Tensor, "b"]]


def greedy(logits: Float[Tensor, "b vocab"]) -> Int[Tensor, "b"]:
    return logits.argmax(-1)


@torch.no_grad()
def decode(
    language: LanguageTower,
    logits: Float[Tensor, "b vocab"],
    mask: Int[Tensor, "b t"],
    positions: Int[Tensor, "b"],
    cache: Cache,
    choose: Choose = greedy,
    sight: Sight | None = None,
) -> Iterator[Int[Tensor, "b"]]:
    """The tokens that follow, one for each row at a time, for ever; each is read only when the next is asked for.

    `mask` says which cached columns are text (1) and which padding (0); `positions` are those of the next tokens;
    `sight` is what these see of the pictures, where blocks in the language model look at them.
    """
    at = (
        torch.arange(len(logits), device=logits.device),
        torch.zeros(len(logits), dtype=torch.long, device=logits.device),
    )
    while True:
        tokens = choose(logits)
        yield tokens
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits = language(language.embed(tokens[:, None]), mask, positions[:, None], at, cache, sight)
        positions = positions + 1


class Begun(NamedTuple):
    """Texts side by side, read up to their answers: logits of the first tokens, and what it takes to go on.

    `mask` and `positions` as in `decode`.
    """

    logits: Float[Tensor, "b vocab"]
    cache: Cache
    mask: Int[Tensor, "b all"]
    positions: Int[Tensor, "b"]
    sight: Sight | None


@torch.no_grad()
def begin(model: BridgedModel, texts: Sequence[Encoded], features: Float[Tensor, "n p v"], longest: int) -> Begun:
    """Read each text for itself, padded in front; answers of `longest` tokens at most will follow."""
    language, lengths = model.language, [len(text.ids) for text in texts]
    share = language.shares(max(lengths) + longest)
    batch = collate([pack([text]) for text in texts], left=True, share=share).to(language.device)
    images = {"features": features, "asked": batch.asked, "looks": batch.looks}
    logits, cache, sight = model.prefill(batch.input_ids, batch.segments, batch.positions, **images)
    positions = torch.tensor(lengths, device=language.device)
    return Begun(logits, cache, (batch.segments >= 0).long(), positions, sight)


@torch.no_grad()
def say(
    language: LanguageTower,
    begun: Begun,
    longest: int,
    ended: Callable[[Sequence[int]], bool],
    choose: Choose = greedy,
    drop: bool = True,
) -> list[list[int]]:
    """The ids with which each text goes on: `longest` of them, or until it has `ended`.

    A row that has ended is read no more, unless it is not to `drop`, or an encoder read it. `choose` gets logits of all
    rows all the same, so that a row's draws do not depend on the others; those of an ended row are its last.
    """
    for_few_tokens(language.model)
    logits, cache, mask, positions, sight = begun
    said: list[list[int]] = [[] for _ in logits]
    speaking = rows = list(range(len(said)))
    while True:
        chosen = choose(logits)
        for row, token in zip(range(len(said)), chosen.tolist(), strict=True):
            if row in speaking:
                said[row].append(token)
        speaking = [row for row in speaking if len(said[row]) < longest and not ended(said[row])]
        if not speaking:
            return said
        if drop and not language.has_encoder and len(speaking) < len(rows):
            index = torch.tensor([rows.index(row) for row in speaking], device=logits.device)
            cache.batch_select_indices(index)
            mask, positions, sight = mask[index], positions[index], sight and sight.rows(index)
            rows = speaking
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        own = torch.tensor(rows, device=logits.device)
        at = (torch.arange(len(rows), device=logits.device), torch.zeros_like(own))
        tokens = language.embed(chosen[own, None])
        logits = logits.index_copy(0, own, language(tokens, mask, positions[:, None], at, cache, sight))
        positions = positions + 1


@torch.no_grad()
def answers(
    assembled: Assembled,
    prompts: Sequence[Sequence[Turn]],
    features: Float[Tensor, "n p v"] | None = None,
    max_new_tokens: int = 64,
    choose: Choose = greedy,
) -> list[str]:
    """What the assistant says to each conversation, all at once. `features` may replace the pictures, in reading order.

    Raises ValueError where a prompt and its answer do not fit the language model's context.
    """
    texts = [assembled.template.encode(turns, reply=True) for turns in prompts]
    return [spoken(assembled.model.language, ids) for ids in go_on(assembled, texts, features, max_new_tokens, choose)]


@torch.no_grad()
def go_on(
    assembled: Assembled,
    texts: Sequence[Encoded],
    features: Float[Tensor, "n p v"] | None = None,
    max_new_tokens: int = 64,
    choose: Choose = greedy,
) -> list[list[int]]:
    """The ids with which each text goes on, its end included. Otherwise as `answers`."""
    model, language = assembled.model, assembled.model.language
    room(language, max(len(text.ids) for text in texts), max_new_tokens)
    if features is None:
        pixels = model.vision.preprocess([image for text in texts for image in text.images])
        features = cast(Tensor, model.vision(pixels.to(language.device)))
    begun = begin(model, texts, features, max_new_tokens)
    return say(language, begun, max_new_tokens, lambda ids: ids[-1] in language.end_ids, choose)


def spoken(language: LanguageTower, ids: Sequence[int]) -> str:
    """The words of an answer, as they stand in a turn: neither the space that its first token takes with it,
    nor half a character at the end."""
    words = language.decode(until_end(ids, language.end_ids))
    return words.lstrip(" ").rstrip("\N{REPLACEMENT CHARACTER}")


def until_end(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The ids before the first that ends the answer."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])


def room(language: LanguageTower, used: int, wanted: int) -> None:
    """ValueError unless there is a prompt (`used` tokens) and the `wanted` ones of the answer fit the context too."""
    if wanted < 1:
        raise ValueError(f"an answer of {wanted} tokens: max_new_tokens must be at least 1")
    if used < 1:
        raise ValueError("the prompt is empty; give it some text or an image")
    if language.context is not None and used + wanted > language.context:
        raise ValueError(
            f"a prompt of {used} tokens and an answer of {wanted} exceed the {language.context} positions that "
            f"{language.name} knows; shorten the prompt, use fewer images, or ask for fewer new tokens"
        )


def held(words: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a text to stop at: they are shown only when they are not.

    >>> held("one #", ["##"])
    1
    """
    most = max((len(stop) for stop in stops), default=0)
    starts = (n for n in range(min(most, len(words)), 0, -1) if any(stop.startswith(words[-n:]) for stop in stops))
    return next(starts, 0)


def cut(words: str, stops: Sequence[str]) -> str:
    """What stands before the first of the texts to stop at."""
    return words[: min((words.find(stop) for stop in stops if stop in words), default=len(words))]
