"""The contract of a bridge: features of a frozen encoder in, what a frozen language model can read out."""

import importlib
import inspect
import pkgutil
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class Visual(NamedTuple):
    """What a bridge makes of n images."""

    slots: Float[Tensor, "n k d"]
    """Fills the k text positions that each image takes; k may be 0 (pure cross-attention)."""
    memory: Float[Tensor, "n m w"] | None = None
    """Read by the bridge's blocks inside the language model."""


class Bridge(nn.Module):
    """All that trains. A subclass in `bridges/<name>.py` is a bridge called `<name>` in YAML; nothing else is needed.

    Its constructor is its schema: `(vision_dim, num_patches, language_dim, num_layers, *, <options>)`.
    A bridge knows no language model, and reads no text but the instructions that it asks for.
    """

    num_slots: int
    blocks: nn.ModuleDict
    """{"layer index": block that runs before that layer of the language model}; mostly empty."""
    sees: str = "last"
    """Which pictures the blocks show a text position: the `last` before it, or `all` before it."""
    reads_instructions: bool = False
    """Whether `forward` also takes what is asked about each picture, as a list of n texts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict()

    def begin(self) -> None:
        """Called once on a fresh bridge: the place to read weights to begin with."""

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Begin with the weights of another checkpoint. ValueError (`is …`) where they do not fit."""
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"does not fit the bridge: {' '.join(str(error).split())}") from error

    def match_scale(self, embedding_rms: float) -> None:
        """Called once on a fresh bridge with the RMS of the language model's own token embeddings.

        A bridge that fills slots may scale its last weights so that they start at the size the model is used to.
        """

    @property
    def last(self) -> nn.Linear | None:
        """The linear layer whose outputs are the slots, or the memory: `train.regression` can set it."""
        return None

    def shape(self) -> str:
        """In words, what a picture becomes."""
        if not self.blocks:
            return f"{self.num_slots} slots an image"
        return f"{len(self.blocks)} blocks in the language model" + (
            f", {self.num_slots} slots an image" if self.num_slots else ""
        )

    def reduced(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q v"]:
        """Features after what is done to them before any weight: they can be kept so. `forward` takes either."""
        return features

    def watched(self) -> dict[str, dict[str, float]]:
        """Figures of its own to log in training, beside the held-out loss: by group and name."""
        return {}

    def forward(self, features: Float[Tensor, "n p v"]) -> Visual:
        raise NotImplementedError


def bridge_class(name: str) -> type[Bridge]:
    """The one Bridge defined in `bridges/<name>.py`, or in the user's own module when the name has a dot.

    Raises ValueError: no such module (the nearest name is given), or not exactly one Bridge in it.
    """
    module_name = name if "." in name else f"bridges.{name}"
    if "." in name and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a command, unlike `python -m`, does not look in the folder where it runs
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists and misses something of its own
        near = get_close_matches(name, bridge_names(), n=1)
        hint = (
            f"did you mean {near[0]!r}?" if near else f"there are {', '.join(bridge_names())}; your own: package.module"
        )
        raise ValueError(f"no bridge named {name!r}: {hint}") from None
    found = [
        c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Bridge) and c.__module__ == module_name
    ]
    if len(found) != 1:
        raise ValueError(f"{module_name} must define exactly one Bridge, it defines {len(found)}")
    return found[0]


def bridge_names() -> list[str]:
    """The bridges that come with the library: every file beside this one that defines a Bridge."""
    folder = Path(__file__).parent
    files = [m.name for m in pkgutil.iter_modules([str(folder)]) if not m.ispkg]
    return [name for name in files if re.search(r"^class \w+\(Bridge\)", (folder / f"{name}.py").read_text(), re.M)]
