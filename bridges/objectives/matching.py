"""Is this the caption of that picture? Asked of the pair itself, and of its hardest neighbours."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.layers import together
from bridges.objectives.contrastive import Compared
from bridges.objectives.gather import gather, gather_ragged, rank
from bridges.pairs import PairHeads
from bridges.qformer import Memory, QFormer


def match_logits(
    bridge: QFormer, memory: Memory, ids: Int[Tensor, "b t"], real: Bool[Tensor, "b t"]
) -> Float[Tensor, "b 2"]:
    """Logits of (no match, match): a vote of all queries."""
    hidden, _ = bridge.run(memory, ids, together(bridge.num_slots, real))
    return bridge.heads.match(hidden[:, : bridge.num_slots]).float().mean(1)


@torch.no_grad()
def hard_negatives(
    cosines: Float[Tensor, "b n"], negative: Bool[Tensor, "b n"], heads: PairHeads, seed: int
) -> tuple[Int[Tensor, "b"], Bool[Tensor, "b"]]:
    """For each row one that is no true pair, drawn as the similarity says; and whether there is any.

    Every process draws the noise of all rows and takes its own, so that the number of processes changes nothing.
    """
    size, everything = cosines.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(everything, everything, generator=generator)[rank() * size :][:size].to(cosines.device)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
    drawn = (cosines / heads.temperature + gumbel).masked_fill(~negative, float("-inf")).argmax(1)
    return drawn, negative.any(1)


def matching_loss(
    bridge: QFormer,
    features: Float[Tensor, "b p v"],
    memory: Memory,
    ids: Int[Tensor, "b t"],
    real: Bool[Tensor, "b t"],
    compared: Compared,
) -> tuple[Float[Tensor, ""], Float[Tensor, "r"], Bool[Tensor, "r"]]:
    """Cross-entropy over the pair, the pair with another picture, and with another caption; a third each, summed.

    Also gives the logit difference of each asked row, and whether it is a true pair. A row without any negative asks
    the pair only. The guess that nothing matches costs 0.6365 nats.
    """
    all_ids, all_real, all_features = gather_ragged(ids, 0), gather_ragged(real, 0), gather(features)
    seed = int(all_ids.sum())  # a function of the batch alone: a resumed run draws the same
    other_picture, some = hard_negatives(compared.to_images, compared.negative, bridge.heads, seed)
    other_caption, _ = hard_negatives(compared.to_texts, compared.negative, bridge.heads, seed + 1)
    width = all_ids.shape[1]
    ids, real = F.pad(ids, (0, width - ids.shape[1])), F.pad(real, (0, width - real.shape[1]))
    strange = bridge.look(all_features[other_picture])
    asked = [stacked(own, other, own) for own, other in zip(memory, strange, strict=True)]
    logits = match_logits(
        bridge, asked, torch.cat([ids, ids, all_ids[other_caption]]), torch.cat([real, real, all_real[other_caption]])
    )
    true = torch.arange(3 * len(ids), device=ids.device) < len(ids)
    counts = torch.cat([torch.ones_like(some), some, some])
    each = F.cross_entropy(logits, true.long(), reduction="none").masked_fill(~counts, 0.0)
    return each.sum() / 3, (logits[:, 1] - logits[:, 0])[counts].detach(), true[counts]


def stacked(*parts: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Keys and values of several batches of pictures, one after the other."""
    there = [part for part in parts if part is not None]
    return (torch.cat([keys for keys, _ in there]), torch.cat([values for _, values in there])) if there else None
