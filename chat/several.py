"""`bridges generate --answers N`: one prompt, several answers."""

from collections.abc import Sequence

from rich.console import Console

from bridges.data.conversation import Turn
from bridges.data.pictures import open_picture
from bridges.inference.settings import Settings
from chat.terminal import CONTROL, load_chat


def tell_several(checkpoint: str, prompt: str, images: Sequence[str], count: int, settings: Settings) -> None:
    """Print `count` answers, one a line: the likeliest by beam search, or with a temperature as many draws."""
    pictures = [open_picture(path) for path in images]
    chat = load_chat(Console(stderr=True), checkpoint, settings)
    from bridges.inference.several import several  # torch; a spinner turned before it

    choose = settings.chooser() if settings.temperature else None
    turns = [Turn("user", [*pictures, prompt])]
    for answer in several(chat.session.assembled, turns, count, settings.max_new_tokens, choose):
        print(" ".join(CONTROL.sub("", answer).split()))
