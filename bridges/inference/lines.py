"""How several texts stand end to end, each seeing only itself, what was kept before it, and its labels' tree."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from bridges.data.template import Encoded
from bridges.inference.scoring import Tree


def evenly(count: int, most: int) -> int:
    """How many of `count` at once, `most` at most, so that no few are left over in the end."""
    return ceil(count / max(1, ceil(count / most)))


def parts(sizes: Sequence[int], most: int, room: int | float) -> list[slice]:
    """Which texts stand together: about equally many, `most` at most, with `room` for all their tokens."""
    starts, together = [0], evenly(len(sizes), most)
    for place in range(1, len(sizes)):
        count, columns = place + 1 - starts[-1], sum(sizes[starts[-1] : place + 1])
        if count > together or columns > room:
            starts.append(place)
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(sizes)], strict=True)] if sizes else []


@dataclass(frozen=True)
class Lines:
    """Texts, each followed by the inner nodes of its tree. Two texts after one kept column, the first with two nodes:

            kept | a  b  cat car | c        a   sees  x | x . . . | .
                                            b         x | x x . . | .
                                            cat       x | x x x . | .
                                            car       x | x x . x | .
                                            c         x | . . . . | x

    `told` are the places (lines, columns) whose logits tell the next token, the last of each text and its nodes.
    Padding sees itself and what is kept.
    """

    ids: Int[Tensor, "b w"]
    positions: Int[Tensor, "b w"]
    looks: Int[Tensor, "b w"]
    sees: Bool[Tensor, "b w all"]
    told: tuple[Int[Tensor, "s"], Int[Tensor, "s"]]


def lay(
    texts: Sequence[Encoded],
    trees: Sequence[Tree],
    before: int,
    device: torch.device,
    room: int | float = inf,
) -> Lines:
    """Texts after `before` kept columns, end to end in a line, or in several where they would not fit the `room`.

    Every token pays for all columns of its line. Pictures are numbered through all texts.
    """
    sizes = [len(text.ids) + len(tree.inner) for text, tree in zip(texts, trees, strict=True)]
    lines = parts(sizes, len(sizes), room)
    width = max(sum(sizes[line]) for line in lines)
    ids, positions, looks = (torch.zeros(len(lines), width, dtype=torch.long) for _ in range(3))
    sees = torch.eye(width, dtype=torch.bool).repeat(len(lines), 1, 1)
    told, pictures = [], 0
    for row, line in enumerate(lines):
        start = 0
        for text, tree in zip(texts[line], trees[line], strict=True):
            size, end = len(text.ids), start + len(text.ids) + len(tree.inner)
            sees[row, start:end, start:end], depths = with_tree(size, tree)
            ids[row, start:end] = torch.tensor([*text.ids, *(tree.tokens[node] for node in tree.inner)])
            positions[row, start:end] = torch.tensor([*range(before, before + size), *(before + d for d in depths)])
            own = [look + pictures * (look > 0) for look in text.looks]
            looks[row, start:end] = torch.tensor(own + own[-1:] * len(tree.inner))
            told += [(row, column) for column in range(start + size - 1, end)]
            start, pictures = end, pictures + len(text.images)
    sees = F.pad(sees, (before, 0), value=True)
    ids, positions, looks, sees = (x.to(device) for x in (ids, positions, looks, sees))
    return Lines(ids, positions, looks, sees, places(told, device))


def with_tree(size: int, tree: Tree) -> tuple[Bool[Tensor, "t t"], list[int]]:
    """Who sees whom in a text of this size and the inner nodes after it, and the positions of these in their label."""
    place = {node: size + number for number, node in enumerate(tree.inner)}
    sees, depths = torch.ones(size + len(place), size + len(place), dtype=torch.bool).tril(), []
    sees[size:, size:] = False
    for node, column in place.items():
        chain = [place[above] for above in tree.ancestors(node)]
        sees[column, chain] = True
        depths.append(size + len(chain) - 1)
    return sees, depths


def places(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Int[Tensor, "s"], Int[Tensor, "s"]]:
    lines, columns = torch.tensor(pairs, device=device).view(-1, 2).unbind(1)
    return lines, columns
