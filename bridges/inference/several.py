"""Several answers to one prompt, which is read once: the likeliest by beam search, or so many draws."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from bridges.build import Assembled
from bridges.data.batch import collate, pack
from bridges.data.conversation import Turn
from bridges.inference.decoding import Choose, decode, room, spoken
from bridges.sight import Sight
from bridges.towers.language import LanguageTower


@torch.no_grad()
def several(
    assembled: Assembled,
    turns: Sequence[Turn],
    count: int,
    max_new_tokens: int = 64,
    choose: Choose | None = None,
) -> list[str]:
    """`count` answers: with `choose` (a sampler) as many draws, without it the best of a beam search, best first.

    Raises ValueError for no answers, and where a prompt and its answer do not fit the language model's context.
    """
    if count < 1:
        raise ValueError(f"{count} answers: ask for at least 1")
    model, template, _ = assembled
    language = model.language
    row = pack([template.encode(turns, reply=True)])
    room(language, len(row.ids), max_new_tokens)
    batch = collate([row], model.vision.preprocess).to(language.device)
    seen = {"pixel_values": batch.pixel_values, "asked": batch.asked, "looks": batch.looks}
    logits, cache, sight = model.prefill(batch.input_ids, batch.segments, batch.positions, **seen)
    cache.batch_repeat_interleave(count)
    sight = sight.times(count) if sight else None
    logits, mask = logits.expand(count, -1), torch.ones_like(batch.input_ids).expand(count, -1)
    positions = mask.sum(1)
    if choose is None:
        said = beam_search(language, logits, mask, positions, cache, max_new_tokens, sight)
    else:
        steps = decode(language, logits, mask, positions, cache, choose, sight)
        said = torch.stack([tokens for tokens, _ in zip(steps, range(max_new_tokens), strict=False)], dim=1).tolist()
    return [spoken(language, ids) for ids in said]


@torch.no_grad()
def beam_search(
    language: LanguageTower,
    logits: Float[Tensor, "b vocab"],
    mask: Int[Tensor, "b t"],
    positions: Int[Tensor, "b"],
    cache: Cache,
    max_new_tokens: int,
    sight: Sight | None = None,
) -> list[list[int]]:
    """The b likeliest continuations of one prompt, whose b equal rows are in the cache; best first.

    A continuation is judged by its mean log-probability, the end token counted. The search ends when no unfinished one
    can become better than the worst of b finished ones, as transformers' beam search does with its defaults.
    """
    beams, ends = len(logits), torch.tensor(sorted(language.end_ids), device=logits.device)
    at = (torch.arange(beams, device=logits.device), torch.zeros_like(positions))
    sums = torch.full_like(logits[:, 0], -torch.inf, dtype=torch.float32)
    sums[0] = 0.0  # all rows are equal: only one of them counts at first
    running: list[list[int]] = [[] for _ in range(beams)]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, max_new_tokens + 1):
        total = (sums[:, None] + logits.float().log_softmax(-1)).flatten()
        # of twice as many, at least b do not end if there is but one end token, as there mostly is
        best, places = total.topk(min(len(total), beams * (1 + len(ends))))
        rows, tokens = places // logits.shape[1], places % logits.shape[1]
        ended = torch.isin(tokens, ends)
        done += [
            (float(best[i]) / length, [*running[int(rows[i])], int(tokens[i])])
            for i in ended[:beams].nonzero()[:, 0].tolist()
        ]
        done = sorted(done, key=lambda one: -one[0])[:beams]
        go_on = (~ended).nonzero()[:beams, 0]
        sums, rows, tokens = best[go_on], rows[go_on], tokens[go_on]
        running = [[*running[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        if length == max_new_tokens or (len(done) == beams and done[-1][0] >= float(sums[0]) / length):
            break
        reordered: Any = rows
        cache.reorder_cache(reordered)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        logits = language(language.embed(tokens[:, None]), mask, positions[:, None], at, cache, sight)
        positions = positions + 1
    if len(done) < beams:  # the longest allowed count as they are
        done += [(float(total) / len(ids), ids) for total, ids in zip(sums, running, strict=True)]
    return [ids for _, ids in sorted(done, key=lambda one: -one[0])[:beams]]
