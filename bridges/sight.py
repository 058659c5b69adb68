"""What blocks inside the language model see: for every text position, which pictures' memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridges.base import Bridge


@dataclass(frozen=True)
class Sight:
    """Blocks by the layer that they run before, the pictures' keys and values for each, and who sees them.

    `mask` is true where a position sees one of the s = (pictures of the row) x (memory of each).
    """

    blocks: nn.ModuleDict
    seen: Mapping[str, tuple[Tensor, Tensor]]
    mask: Bool[Tensor, "b 1 t s"]

    def before(self, layer: int, hidden: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"] | None:
        """What enters this layer instead of `hidden`; None where no block stands before it."""
        name = str(layer)
        if name not in self.blocks:
            return None
        weight = next(self.blocks[name].parameters())
        return self.blocks[name](hidden.to(weight.dtype), self.seen[name], self.mask).to(hidden.dtype)

    def of(self, columns: slice) -> "Sight":
        """For some positions only."""
        return Sight(self.blocks, self.seen, self.mask[:, :, columns])

    def rows(self, index: Int[Tensor, "r"]) -> "Sight":
        """For some of the rows only."""
        seen = {name: (keys[index], values[index]) for name, (keys, values) in self.seen.items()}
        return Sight(self.blocks, seen, self.mask[index])

    def times(self, count: int) -> "Sight":
        """Of one row, for `count` rows that go on from it."""
        seen = {
            k: (keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1))
            for k, (keys, values) in self.seen.items()
        }
        return Sight(self.blocks, seen, self.mask.expand(count, -1, -1, -1))


def sight(
    bridge: Bridge, memory: Float[Tensor, "n m w"], looks: Int[Tensor, "b t"], visible: Bool[Tensor, "b t t"]
) -> Sight:
    """Keys and values of each row's own pictures, made once for each picture and block.

    `looks` counts the batch's pictures in reading order: j where the j-th is the last one before a position, in its own
    text; 0 where there is none. `visible` says which positions a position sees in the language model. A bridge that
    `sees` all pictures lets a position see what all those look at:

        looks       0 1 1 2 2 -   sees  last  . 1 1 2 2   all  . 1 1 1 1
                                                                     2 2
    """
    index = pictures_of(looks)
    blocks: Any = bridge.blocks
    kept = {name: place(block.keys_values(memory), index) for name, block in blocks.items()}
    at = (rearrange(looks, "b t -> b t 1") == rearrange(index, "b c -> b 1 c")) & (index > 0)[:, None]
    if bridge.sees == "all":
        at = visible.float() @ at.float() > 0
    return Sight(bridge.blocks, kept, repeat(at, "b t c -> b 1 t (c m)", m=memory.shape[1]))


def sight_of_one(
    bridge: Bridge,
    kept: Mapping[str, tuple[Float[Tensor, "n h m c"], Float[Tensor, "n h m c"]]],
    looks: Int[Tensor, "1 t"],
) -> Sight:
    """Of a part of one text, from the keys and values of all pictures up to its end, which were made before.

    `looks` counts the pictures of the whole text, as in `sight`.
    """
    keys, _ = next(iter(kept.values()))
    index = torch.arange(len(keys) + 1, device=looks.device)[None]  # number 0 is a picture that nobody sees
    last, number = rearrange(looks, "b t -> b t 1"), rearrange(index, "b c -> b 1 c")
    at = (number <= last if bridge.sees == "all" else number == last) & (number > 0)
    seen = {name: place(pictures, index) for name, pictures in kept.items()}
    return Sight(bridge.blocks, seen, repeat(at, "b t c -> b 1 t (c m)", m=keys.shape[2]))


def check_looks(bridge: Bridge, memory: Float[Tensor, "n m w"] | None, looks: Int[Tensor, "b t"] | None) -> None:
    """ValueError where the texts look at more pictures than there are, or at fewer, and blocks have to know."""
    if bridge.blocks and memory is not None and looks is not None and int(looks.max()) != len(memory):
        raise ValueError(
            f"the texts look at {int(looks.max())} pictures, and there are {len(memory)}; "
            "each picture needs one marker in the text, and each marker a picture"
        )


def pictures_of(looks: Int[Tensor, "b t"]) -> Int[Tensor, "b c"]:
    """The numbers of the pictures of every row, one after another, filled up with 0; at least one place."""
    rows = [row[row > 0].unique() for row in looks]
    width = max(1, *(len(row) for row in rows)) if rows else 1
    return torch.stack([F.pad(row, (0, width - len(row))) for row in rows])


def place(kept: tuple[Tensor, Tensor], index: Int[Tensor, "b c"]) -> tuple[Tensor, Tensor]:
    """Keys and values "n h m c" of pictures, side by side in their rows; number 0 is a picture that nobody sees."""
    keys, values = (rearrange(F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[index], "b n h m c -> b h (n m) c") for x in kept)
    return keys, values
