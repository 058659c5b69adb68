"""How texts stand in rows, and rows in lines: who sees whom, what is needed, and what predicts what."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Int
from torch import Tensor

PADDING = -1
SHARED = 0
EVERYONES = -2  # of no row, and seen by all that stand behind it in its line


def attention_mask(
    segments: Int[Tensor, "b t"], dtype: torch.dtype, skip: int = 0, rows: Int[Tensor, "b t"] | None = None
) -> Tensor:
    """Who sees whom, from the segments alone: 0 is shared by the row, 1, 2, … are its texts, -1 is padding.

    A position sees itself, what is shared and what belongs to its own text, never ahead. With two texts:

        segment   0 0 1 1 2 2 -
                0 x . . . . . .
                0 x x . . . . .
                1 x x x . . . .
                1 x x x x . . .
                2 x x . . x . .
                2 x x . . x x .
                - x x . . . . x

    Plain rows get the usual `b t` mask (1 = token, 0 = padding), others an additive `b 1 t t` one.
    `skip` leaves out the queries of as many first columns (their keys and values are cached).
    `rows` says of which row a position is, where several stand end to end: they do not see each other, but all see
    what is `EVERYONES`.
    """
    if rows is None and int(segments.max()) <= 1:
        return (segments != PADDING).long()
    sees = visible(segments, rows)
    blocked = torch.zeros(sees.shape, dtype=dtype, device=segments.device)
    blocked.masked_fill_(~sees, torch.finfo(dtype).min)
    return rearrange(blocked, "b q k -> b 1 q k")[:, :, skip:]


def visible(segments: Int[Tensor, "b t"], rows: Int[Tensor, "b t"] | None = None) -> Bool[Tensor, "b t t"]:
    """The crosses of `attention_mask`."""
    query, key = rearrange(segments, "b t -> b t 1"), rearrange(segments, "b t -> b 1 t")
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    sees = ((key == query) | (key == SHARED)) & causal
    if rows is None:
        return sees
    theirs = rearrange(rows, "b t -> b 1 t")
    return sees & ((rearrange(rows, "b t -> b t 1") == theirs) | (theirs == EVERYONES))


def needed(segments: Int[Tensor, "b t"], at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]]) -> Bool[Tensor, "b t"]:
    """What the positions `at` see, themselves among it: nothing else has a part in their logits.

    The last token of a text, which only has to be told, is not:   segment  0 0 1 1 2 2 -   ->   x x x . x . .
    """
    columns = repeat(torch.arange(segments.shape[1], device=segments.device), "t -> b t", b=len(segments))
    wanted = torch.full_like(columns, -1)
    wanted[at] = columns[at]
    texts = segments.clamp(min=SHARED)
    last = torch.full_like(wanted, -1).scatter_reduce(1, texts, wanted, "amax")  # of each text; there are at most t
    last = torch.where(segments == SHARED, wanted.amax(1, keepdim=True), last.gather(1, texts))
    return (columns <= last) & (segments != PADDING)


def in_lines(lengths: Sequence[int], dim: int, before: int = 0) -> Int[Tensor, "l w"]:
    """Rows of these lengths, laid end to end in as many lines as cost least, with 1, 2, 3, … rows each; -1 is padding.

    Every token pays for the layers, in proportion to their width, and for each place of its line in the attention:
    as much as for a layer where the line is three times `dim` (measured). `before` more tokens will stand in front of
    each line. The longest rows are laid first, each in the emptiest line.
    """

    def lay(count: int) -> list[list[int]]:
        lines: list[list[int]] = [[] for _ in range(count)]
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            min(lines, key=len).extend(range(starts[row], starts[row + 1]))
        return lines

    def cost(lines: list[list[int]]) -> float:
        width = max(len(line) for line in lines) + before
        return len(lines) * width * (1 + width / (3 * dim))

    starts, rows = [0, *accumulate(lengths)], len(lengths)
    best = min((lay(count) for count in sorted({-(-rows // each) for each in range(1, rows + 1)})), key=cost)
    width = max(len(line) for line in best)
    return torch.tensor([line + [-1] * (width - len(line)) for line in best])


def contiguous(segments: Int[Tensor, "b t"]) -> bool:
    """Whether every row is one text, with padding on one side only: then columns are as far apart as positions."""
    padding = segments == PADDING
    return bool((segments <= SHARED).all() and ((padding[:, 1:] != padding[:, :-1]).sum(1) <= 1).all())


def predecessors(segments: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The column whose logits predict each position: the one before it in its own text.

    The first position of a text follows the last shared one:   segment  0 0 1 1 2 2   ->   0 0 1 2 1 4
    """
    columns = repeat(torch.arange(segments.shape[1], device=segments.device), "t -> b t", b=len(segments))
    last_shared = torch.where(segments == SHARED, columns, 0).amax(1, keepdim=True)
    starts = segments != segments.roll(1, dims=1)
    return torch.where(starts & (segments > 1), last_shared, (columns - 1).clamp(min=0))
