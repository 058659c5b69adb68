"""Is the picture used? The same question with another picture, and with none, are the baselines of every figure."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.towers.vision import VisionTower

Control = Literal["image", "shuffled", "blank"]
CONTROLS: tuple[Control, ...] = get_args(Control)


@torch.no_grad()
def controlled(features: Float[Tensor, "n p v"], vision: VisionTower, control: Control) -> Float[Tensor, "n p v"]:
    """The features of the right pictures, of each one's neighbour, or of a plain grey picture.

    Where pictures are tiled the neighbour is beyond all tiles of the same picture, if there are so many images.
    """
    if control == "image":
        return features
    if control == "shuffled":
        beyond = vision.tiler.most + 1 if vision.tiler else 1
        return features.roll(max(1, min(beyond, len(features) // 2)), dims=0)
    grey = vision(vision.preprocess([Image.new("RGB", (64, 64), (128, 128, 128))]).to(features.device))
    return grey.expand(len(features), -1, -1)  # features may be fewer where the bridge reduces them
