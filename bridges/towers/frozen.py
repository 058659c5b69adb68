"""What wakes in a frozen tower: nothing but its adapter."""

from collections.abc import Sequence
from typing import Any


def wake(adapters: Sequence[Any], mode: bool) -> None:
    """Let peft's layers train, or sleep, with their dropout; the frozen layers that they hold stay as they are."""
    for layer in adapters:
        layer.training = mode
        layer.lora_dropout.train(mode)
