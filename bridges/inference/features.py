"""What the vision tower sees in pictures: each is encoded once, however often it is shown."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.build import Assembled

AT_ONCE = 32  # pictures


class Features:
    """Vision features of pictures, kept in the host's memory by what is in the picture; equal pictures are one.

    `encoded` counts what the tower had to look at. Without `keep` it looks at everything again.
    """

    def __init__(self, assembled: Assembled, keep: bool = True) -> None:
        self.vision, self.device = assembled.model.vision, assembled.model.language.device
        self.keep, self.encoded = keep, 0
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n p v"]:
        """On the model's device, in the tower's precision."""
        if not self.keep or not pictures:
            return self._encode(pictures)
        keys = [key(picture) for picture in pictures]
        new = {k: picture for k, picture in zip(keys, pictures, strict=True) if k not in self._kept}
        if new:
            self._kept.update(zip(new, self._encode(list(new.values())).cpu(), strict=True))
        return torch.stack([self._kept[k] for k in keys]).to(self.device)

    def pooled(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n v"]:
        """The mean over the patches, of length 1: cosines of these say how alike two pictures are."""
        return F.normalize(self(pictures).float().mean(1), dim=-1).cpu()

    @torch.no_grad()
    def _encode(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n p v"]:
        self.encoded += len(pictures)
        starts = range(0, max(1, len(pictures)), AT_ONCE)
        pixels = (self.vision.preprocess(pictures[start : start + AT_ONCE]) for start in starts)
        return torch.cat([self.vision(some.to(self.device)) for some in pixels])


def key(picture: Image.Image) -> bytes:
    """The same for pictures that look the same."""
    return blake2b(picture.convert("RGB").tobytes(), digest_size=16, salt=b"%dx%d" % picture.size).digest()
