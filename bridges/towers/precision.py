"""Which number format a frozen tower runs in: the fastest that this machine really has, whatever a checkpoint says.

And how its weights lie in memory where few tokens at a time are read.
"""

import os
import time
from functools import cache
from typing import Any

import torch
from torch import nn

CHOICE = "BRIDGES_DTYPE"
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def fastest_device() -> torch.device:
    """This machine's accelerator where there is one, else its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@cache
def fastest_dtype(device: torch.device | None = None) -> torch.dtype:
    """The dtype for frozen weights on `device`, by default the fastest of this machine.

    A CPU takes bfloat16 only where it has instructions for it and they win a short race (under 0.1 s, once a process):
    without them bfloat16 is emulated, several times slower than float32. `BRIDGES_DTYPE` chooses instead: the
    gradient of a fresh bridge that has come through thirty layers in bfloat16 is off by half of its size (measured).
    ValueError for one that is not known.
    """
    if chosen := os.environ.get(CHOICE):
        if chosen not in NAMED:
            raise ValueError(f"{CHOICE} is {chosen!r}; it may be {', '.join(NAMED)}, or not set")
        return NAMED[chosen]
    device = device or fastest_device()
    if device.type == "cuda":
        # 8.0 is Ampere, the first with bfloat16; 7.0 is Volta, the first whose float16 does not lose to float32
        capability = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    if device.type == "cpu" and has_bfloat16_instructions() and bfloat16_wins():
        return torch.bfloat16
    return torch.float32


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX tiles, or AVX-512 BF16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def bfloat16_wins() -> bool:
    """Race a matrix product of a transformer's size on the CPU, the best of three runs each."""
    return seconds(torch.bfloat16) < seconds(torch.float32)


def seconds(dtype: torch.dtype) -> float:
    """Time of one product of (256, 1024) and (1024, 1024) on the CPU."""
    left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first run also chooses and compiles the kernel


def for_few_tokens(model: Any) -> None:
    """Lay the linear layers' weights in memory column by column, in place, on a CPU; their values stay.

    MKL multiplies a few tokens by such weights up to twice as fast, one or many of them as fast as before. The head is
    left: it may be the embeddings too, which are read row by row.
    """
    head = model.get_output_embeddings()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not head and layer.weight.device.type == "cpu":
            layer.weight.data = layer.weight.data.t().contiguous().t()
