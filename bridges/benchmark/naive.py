"""How labels are scored elsewhere: the prompt is read once, then every label for itself. What the tree is held against.

OpenFlamingo's evaluation (arXiv 2308.01390) goes on from the cache token by token; `whole` labels need fewer passes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from bridges.data.batch import collate, pack
from bridges.data.template import Encoded
from bridges.inference.features import Features
from bridges.inference.prompts import follow
from bridges.inference.scoring import Tree
from bridges.model import BridgedModel
from bridges.objectives.language import target_nll
from bridges.sight import Sight


@torch.no_grad()
def from_cache(
    model: BridgedModel, features: Features, texts: Sequence[Encoded], tree: Tree, whole: bool
) -> Float[Tensor, "b c"]:
    """Log-probabilities of labels after texts, which stand side by side."""
    language, lengths = model.language, torch.tensor([len(text.ids) for text in texts], device=features.device)
    batch = collate([pack([text]) for text in texts], left=True).to(features.device)
    seen = {"asked": batch.asked, "looks": batch.looks}
    seen["features"] = features([image for text in texts for image in text.images])
    logits, cache, sight = model.prefill(batch.input_ids, batch.segments, batch.positions, **seen)
    first, real = logits.float().log_softmax(-1), (batch.segments >= 0).long()
    totals = []
    for path in tree.paths:
        tokens = torch.tensor([tree.tokens[node] for node in path], device=features.device)
        total, more = first[:, tokens[0]], len(path) - 1
        step = max(1, more) if whole else 1
        for start in range(0, more, step):
            told = after(language, tokens[start : start + step], start, lengths, real, cache, sight)
            total = total + told[:, range(told.shape[1]), tokens[start + 1 : start + step + 1]].sum(1)
        if more:
            shared: Any = cache
            shared.crop(-more)
        totals.append(total)
    return torch.stack(totals, dim=1).double().cpu()


def after(
    language: Any, tokens: Tensor, start: int, lengths: Tensor, real: Tensor, cache: Any, sight: Sight | None
) -> Float[Tensor, "b n vocab"]:
    """Log-probabilities after some more tokens of a label, `start` of which were read, in all rows."""
    rows, more = len(lengths), len(tokens)
    steps = torch.arange(more, device=tokens.device)
    mask = torch.cat([real, real.new_ones(rows, start + more)], dim=1)
    positions = lengths[:, None] + start + steps
    at = (torch.arange(rows, device=tokens.device).repeat_interleave(more), steps.repeat(rows))
    seen = sight and Sight(sight.blocks, sight.seen, sight.mask.expand(-1, -1, more, -1))
    logits = language(language.embed(tokens.expand(rows, -1)), mask, positions, at, cache, seen)
    return rearrange(logits.float().log_softmax(-1), "(b n) v -> b n v", b=rows)


@torch.no_grad()
def row_by_row(model: BridgedModel, features: Features, text: Encoded, tree: Tree) -> Float[Tensor, "1 c"]:
    """Each label after the whole prompt, in a pass of its own, with nothing kept but what the encoder saw."""
    totals = []
    for path in tree.paths:
        batch = collate([pack([follow(text, [tree.tokens[node] for node in path])])]).to(features.device)
        batch.features = features(text.images)
        totals.append(-target_nll(model, batch).sum())
    return torch.stack(totals)[None].double().cpu()
