"""Pictures and their captions, without a language model: the model of BLIP-2's first stage, and its heads."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.base import Bridge
from bridges.towers.vision import VisionTower

EMBEDDED = 256  # width in which pictures and texts are compared
HOTTEST, COLDEST = 0.5, 0.001  # bounds of the temperature, as in BLIP


class PairHeads(nn.Module):
    """What the first stage asks of queries and text (arXiv 2301.12597, section 3.1); `vocabulary` words to write."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, EMBEDDED), nn.Linear(width, EMBEDDED)
        self.match = nn.Linear(width, 2)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """Learned as its logarithm, and kept within bounds."""
        return self.log_temperature.exp().clamp(COLDEST, HOTTEST)


class PairModel(nn.Module):
    """A frozen vision tower and a bridge with heads for pairs. All that trains is under `bridge`."""

    def __init__(self, vision: VisionTower, bridge: Bridge) -> None:
        super().__init__()
        self.vision, self.bridge = vision, bridge

    def forward(self, objective: Callable[["PairModel", Any], Any], batch: Any) -> Any:
        """The objective of a batch. It is computed in here, because a parallel wrapper sees only what forward does."""
        return objective(self, batch)
