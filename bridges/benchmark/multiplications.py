"""What a piece of work multiplies, counted while it runs, and how fast this machine multiplies at best."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T")
aten: Any = torch.ops.aten
ATTENTION: dict[Any, Any] = {  # on a CPU, which the counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}


def counted(work: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and its floating-point operations: those of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        found = work()
    return found, float(counter.get_total_flops())


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a plain product of large square matrices, the best of five: what a step's own rate is a share of."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = perf_counter()
        (left @ right)[0, 0].item()  # waits for it
        seconds.append(perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])
