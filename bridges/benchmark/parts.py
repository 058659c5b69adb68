"""Where the seconds of a step go: into the encoder, the rest of the forward pass, the backward pass, or elsewhere."""

from time import perf_counter
from typing import Any

import torch


def wait() -> None:
    """For whatever an accelerator has still to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Parts:
    """Seconds of the `vision` tower, of `forward` with it, and of `backward`, as long as it is `on`.

    It waits for the device before and after each, so a lap in which it is on is not one that counts.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.on = True

    def watch(self, part: str, owner: Any, method: str = "forward") -> None:
        """From now on the calls of a method of this object are a part."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return inner(*args, **kwargs)
            wait()
            began = perf_counter()
            found = inner(*args, **kwargs)
            wait()
            self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - began
            return found

        setattr(owner, method, timed)

    def shares(self, seconds: float) -> dict[str, float]:
        """Of so many seconds the share of each part, forward without vision; what is missing to 1 is elsewhere. Off."""
        self.on, found = False, {part: spent / seconds for part, spent in self.seconds.items()}
        return {**found, "forward": found.get("forward", 0.0) - found.get("vision", 0.0)}
