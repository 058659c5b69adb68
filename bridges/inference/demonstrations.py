"""Which demonstrations stand before a query: the same for all, drawn anew for each, or those with the nearest pictures.

Flamingo (arXiv 2204.14198); the nearest are its RICES (Yang et al., arXiv 2109.05014).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.inference.features import AT_ONCE, Features, key
from bridges.inference.prompts import Prompt

Choice = Literal["fixed", "random", "nearest"]


@dataclass(frozen=True)
class Gallery:
    """Pictures by the direction of what the encoder sees in them, and by a key that is equal for equal pictures."""

    vectors: Float[Tensor, "n v"]
    keys: list[bytes]


def gallery(features: Features, pictures: Iterable[Image.Image]) -> Gallery:
    """A few pictures are open at a time. ValueError where there is none."""
    pictures, vectors, keys = iter(pictures), [], []
    while some := list(islice(pictures, AT_ONCE)):
        vectors.append(features.pooled(some))
        keys += [key(picture) for picture in some]
    if not keys:
        raise ValueError("the pool of demonstrations is empty; give it at least one picture")
    return Gallery(torch.cat(vectors), keys)


def fixed(pool: int, shots: int, seed: int = 0) -> list[int]:
    """Places in a pool for all queries of a trial, without replacement. ValueError where the pool is too small."""
    return drawn(pool, shots, 1, seed)[0]


def drawn(pool: int, shots: int, queries: int, seed: int = 0) -> list[list[int]]:
    """Places in a pool for each query, drawn anew without replacement. ValueError where the pool is too small."""
    enough(pool, shots)
    rng = Random(f"demonstrations {seed}")
    return [rng.sample(range(pool), shots) for _ in range(queries)]


def nearest(pool: Gallery, queries: Gallery, shots: int) -> list[list[int]]:
    """Places in the pool for each query, by cosine, the most similar last, next to the query. It is never shown itself.

    Raises ValueError where too few other pictures are there.
    """
    found = []
    for vector, own in zip(queries.vectors, queries.keys, strict=True):
        same = [place for place, other in enumerate(pool.keys) if other == own]
        enough(len(pool.keys) - len(same), shots)
        cosines = pool.vectors @ vector
        cosines[same] = -torch.inf
        found.append(cosines.argsort(descending=True, stable=True)[:shots].flip(0).tolist())
    return found


def enough(pool: int, shots: int) -> None:
    """ValueError unless so many demonstrations are there."""
    if pool == 0:
        raise ValueError("the pool of demonstrations is empty; give it at least one picture")
    if not 0 <= shots <= pool:
        raise ValueError(f"{shots} demonstrations from a pool of {pool}: take fewer, at least 0, or a larger pool")


def text_only(shots: Sequence[Prompt]) -> list[Prompt]:
    """Without their pictures: two such stand for 0 shots in Flamingo, to say what is asked for but not what is seen."""
    return [[part for part in shot if isinstance(part, str)] for shot in shots]
