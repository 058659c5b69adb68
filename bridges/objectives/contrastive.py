"""Which caption belongs to which picture: image-text contrastive learning over the batches of all processes."""

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.objectives.gather import gather, rank
from bridges.pairs import PairHeads

SMOOTHING = 0.1


def similarity(images: Float[Tensor, "i k e"], texts: Float[Tensor, "t e"]) -> Float[Tensor, "i t"]:
    """Cosine of each text to the one query of each picture that is nearest to it (BLIP-2, section 3.1)."""
    return einsum(images.float(), texts.float(), "i k e, t e -> i t k").amax(-1)


def embed_images(heads: PairHeads, queries: Float[Tensor, "b k w"]) -> Float[Tensor, "b k e"]:
    return F.normalize(heads.image(queries).float(), dim=-1)


def embed_texts(heads: PairHeads, first: Float[Tensor, "b w"]) -> Float[Tensor, "b e"]:
    """From what stands at [CLS]."""
    return F.normalize(heads.text(first).float(), dim=-1)


class Compared:
    """Every picture of this process against every caption of all processes, and the other way round.

    `to_texts`, `to_images`: cosines "b n". `own`: where the pair itself stands. `negative`: where the other is another
    picture with another caption.
    """

    def __init__(self, images: Tensor, texts: Tensor, picture_keys: Tensor, caption_keys: Tensor) -> None:
        self.to_texts = similarity(images, gather(texts))
        self.to_images = similarity(gather(images), texts).T
        size = len(images)
        place = torch.arange(size, device=images.device) + rank() * size
        self.own: Bool[Tensor, "b n"] = F.one_hot(place, self.to_texts.shape[1]).bool()
        self.negative: Bool[Tensor, "b n"] = (picture_keys[:, None] != gather(picture_keys)) & (
            caption_keys[:, None] != gather(caption_keys)
        )


def contrastive_loss(compared: Compared, heads: PairHeads) -> Float[Tensor, ""]:
    """Cross-entropy of finding the caption of a picture and the picture of a caption, halved and summed over pairs.

    A tenth of each target is spread over all that may be chosen. What equals the pair is neither right nor wrong.
    """
    allowed = compared.negative | compared.own
    spread = SMOOTHING / allowed.sum(1, keepdim=True)
    targets = torch.where(compared.own, 1 - SMOOTHING + spread, spread)
    loss = torch.zeros((), device=allowed.device)
    for cosines in (compared.to_texts, compared.to_images):
        logits = (cosines / heads.temperature).masked_fill(~allowed, float("-inf"))
        log_probability = F.log_softmax(logits, dim=1).masked_fill(~allowed, 0.0)
        loss = loss - 0.5 * (targets * log_probability).sum()
    return loss


def sigmoid_loss(compared: Compared, heads: PairHeads) -> Float[Tensor, ""]:
    """Each picture with each caption is a question of its own (SigLIP, arXiv 2303.15343, algorithm 1), summed.

    The bias starts at -ln of the number of pairs, at which the few true pairs and the many false weigh alike.
    """
    bias = heads.shift - torch.log(torch.tensor(float(compared.own.shape[1]), device=heads.shift.device))
    sign = torch.where(compared.own, 1.0, -1.0)
    loss = torch.zeros((), device=sign.device)
    for cosines in (compared.to_texts, compared.to_images):
        each = -F.logsigmoid(sign * (cosines / heads.temperature + bias))
        loss = loss + 0.5 * each.masked_fill(~(compared.negative | compared.own), 0.0).sum()
    return loss
