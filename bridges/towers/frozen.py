"""Of frozen towers: how their weights are told from others', and what wakes in them: nothing but an adapter."""

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import nn


def wake(adapters: Sequence[Any], mode: bool) -> None:
    """Let peft's layers train, or sleep, with their dropout; the frozen layers that they hold stay as they are."""
    for layer in adapters:
        layer.training = mode
        layer.lora_dropout.train(mode)


def fingerprint(model: nn.Module) -> str:
    """Twelve hex digits of a strided sample of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sample = tensor.flatten()[:: max(1, tensor.numel() // 64)][:64].bfloat16().float()
        digest.update(f"{name}{tuple(tensor.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()[:12]
