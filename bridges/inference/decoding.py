"""One token after another: what chat and evaluation share."""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from bridges.build import Assembled
from bridges.data.batch import collate, pack
from bridges.data.conversation import Turn
from bridges.data.template import Encoded
from bridges.sight import Sight
from bridges.towers.language import LanguageTower

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
    """The ids with which each text goes on, up to the longest answer of them. Otherwise as `answers`."""
    model = assembled.model
    language = model.language
    rows = [pack([text]) for text in texts]
    longest = max(len(row.ids) for row in rows)
    room(language, longest, max_new_tokens)
    if features is None:
        features = model.vision(model.vision.preprocess([i for row in rows for i in row.images]).to(language.device))
    batch = collate(rows, left=True, share=language.shares(longest + max_new_tokens)).to(language.device)
    images = {"features": features, "asked": batch.asked, "looks": batch.looks}
    logits, cache, sight = model.prefill(batch.input_ids, batch.segments, batch.positions, **images)
    mask = (batch.segments >= 0).long()
    lengths = torch.tensor([len(row.ids) for row in rows], device=language.device)
    ends = torch.tensor(sorted(language.end_ids), device=language.device)
    said: list[Tensor] = []
    done = torch.zeros(len(rows), dtype=torch.bool, device=language.device)
    for tokens in decode(language, logits, mask, lengths, cache, choose, sight):
        said.append(tokens)
        done |= torch.isin(tokens, ends)
        if done.all() or len(said) == max_new_tokens:
            break
    return torch.stack(said, dim=1).tolist()


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
