"""What every process has, on every process, with its gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_context: Any, *gradients: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Each process has a loss of its own over all rows: a row's gradient is the sum of what all of them ask."""
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def parallel() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if parallel() else 0


def gather(x: Tensor) -> Tensor:
    """The first dimensions of all processes, joined in the order of their ranks; equal shapes are needed.

    With processes whose gradients are averaged and whose losses are scaled by their number, the result is exactly the
    gradient that one process would have with the whole batch (LAVIS gathers without gradient: it is not).
    """
    return _Gather.apply(x) if parallel() else x


def gather_ragged(x: Tensor, fill: int) -> Tensor:
    """Like `gather`, where the second dimension differs from process to process: filled up to the longest."""
    if not parallel():
        return x
    longest = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    gap = int(longest) - x.shape[1]
    filled = torch.cat([x, x.new_full((len(x), gap, *x.shape[2:]), fill)], dim=1)
    whole = gather(filled.long()) if x.dtype == torch.bool else gather(filled)
    return whole.to(x.dtype)


def total(x: Tensor) -> Tensor:
    """The sum over all processes, without gradient."""
    x = x.detach().clone()
    if parallel():
        dist.all_reduce(x)
    return x
