"""Pictures with one caption each: what contrastive learning, matching and captioning without a language model read."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from bridges.data.batch import Preprocess
from bridges.data.conversation import Example, images_of

Tokenize = Callable[[Sequence[str]], tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]]


@dataclass
class PairBatch:
    """b pictures, as pixels or features, and the caption of each: its ids, and where they are no padding.

    `pictures` and `captions` are numbers that are equal for equal pictures and for captions that say the same.
    """

    ids: Int[Tensor, "b t"]
    real: Bool[Tensor, "b t"]
    pictures: Int[Tensor, "b"]
    captions: Int[Tensor, "b"]
    pixel_values: Float[Tensor, "b 3 y x"] | None = None
    features: Float[Tensor, "b p v"] | None = None

    def to(self, device: torch.device) -> "PairBatch":
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if x is not None})

    @property
    def num_targets(self) -> int:
        return len(self.ids)


Pair = tuple[Image.Image, str, str]


def pair_of(example: Example) -> Pair:
    """The picture of an example, its first caption, and what that says: the objects where the data set knows them, so
    that "a cat" and "there is a cat" are not held against each other, else its words.

    ValueError where there is not one of each.
    """
    turns = next((c.turns for c in example.conversations if c.kind == "caption"), example.conversations[0].turns)
    pictures = images_of(turns)
    said = next((turn for turn in turns if turn.role == "assistant"), None)
    if len(pictures) != 1 or said is None:
        raise ValueError(f"a pair is one picture and one caption; here are {len(pictures)} pictures")
    caption = "".join(part for part in said.content if isinstance(part, str))
    return pictures[0], caption, " ".join(sorted(example.names)) or caption.strip().lower()


def collate_pairs(pairs: Sequence[Pair], tokenize: Tokenize, preprocess: Preprocess | None) -> PairBatch:
    """Pairs as tensors."""
    ids, real = tokenize([caption for _, caption, _ in pairs])
    return PairBatch(
        ids,
        real,
        torch.tensor([zlib.crc32(picture.tobytes(), picture.width) for picture, _, _ in pairs]),
        torch.tensor([zlib.crc32(said.encode()) for _, _, said in pairs]),
        preprocess([picture for picture, _, _ in pairs]) if preprocess else None,
    )
