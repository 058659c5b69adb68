"""How an answer is chosen: what a user may set. Without torch, so that a terminal is there at once."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridges.inference.decoding import Choose


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for a value that means nothing."""

    temperature: float = 0.0
    """0 always takes the likeliest token, 1 draws as the model says"""
    top_p: float = 1.0
    """draw from the likeliest tokens that together have this probability; 1 keeps every token"""
    top_k: int = 0
    """draw from so many of the likeliest tokens; 0 keeps every token"""
    min_p: float = 0.0
    """draw from tokens at least so likely, measured against the likeliest; 0 keeps every token"""
    repetition_penalty: float = 1.0
    """above 1 makes what the answer has said already less likely"""
    seed: int = 0
    """of what is drawn"""
    max_new_tokens: int = 256
    """longest answer"""
    stop: str = ""
    """the answer ends before this text; none if empty"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature {self.temperature} is below 0 or no number; "
                "0 always takes the likeliest token, 1 draws as the model says"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1, which keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is below 0; 0 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must be between 0, which keeps every token, and 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty {self.repetition_penalty} must be above 0; 1 changes nothing")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def chooser(self, answer: int = 0) -> "Choose":
        """Chooses the tokens of one answer; another number of it draws otherwise."""
        from bridges.inference.sampling import sampler

        return sampler(
            self.temperature, self.top_p, self.seed + answer, self.top_k, self.min_p, self.repetition_penalty
        )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if self.stop else []


NAMES = {entry.name: entry.type for entry in fields(Settings)}


def changed(settings: Settings, name: str, value: str) -> Settings:
    """With one value replaced, as a user writes it. ValueError for a name or a value that there is not."""
    from dataclasses import replace
    from difflib import get_close_matches

    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"no setting {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}")
        )
    kind = type(getattr(settings, name))
    try:
        read = kind(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is a number{' without a point' if kind is int else ''}, not {value!r}") from None
    return replace(settings, **{name: read})
