"""What there is to see of a conversation: its words, where the context goes, what an answer cost, small pictures."""

from typing import TYPE_CHECKING

from PIL import Image
from rich.color import Color
from rich.segment import Segment, Segments
from rich.style import Style

from bridges.data.conversation import images_of
from chat.state import Chat, name_of, words_of

if TYPE_CHECKING:  # torch comes with it
    from bridges.build import Assembled

WHO = {"system": "system", "user": "you", "assistant": "model"}


def model_line(assembled: "Assembled") -> str:
    """What talks."""
    model, name = assembled.model, assembled.recipe.bridge["name"]
    return f"{name} between {model.vision.name} and {model.language.name}, {model.bridge.shape()}"


def history(chat: Chat, _: str) -> str:
    lines = []
    for turn in chat.session.turns:
        said = "".join(part if isinstance(part, str) else f"[{name_of(part)}] " for part in turn.content)
        lines.append(f"{WHO[turn.role]}: {said}")
    return "\n".join(lines) or "nothing was said yet"


def tokens(chat: Chat, _: str) -> str:
    """By who said them; what no one said is the template's."""
    session = chat.session
    template, context = session.assembled.template, session.assembled.model.language.context
    read = session.turns_read()
    counts = {
        f"{WHO[role]}": sum(len(template.tokenize(words_of(turn))[0]) for turn in read if turn.role == role)
        for role in WHO
    }
    pictures, images = sum(len(images_of([turn])) for turn in read), len(template.images(read))
    cut = f" in {images} images" if images > pictures else ""
    counts[f"{pictures} pictures{cut} of {template.num_slots}"] = images * template.num_slots
    total = session.size()
    counts["template"] = max(0, total - sum(counts.values()))
    lines = [f"{count:>6}  {what}" for what, count in counts.items() if count]
    share = f" of {context}, {total / context:.0%}" if context else ""
    dropped = f"; the first {session.dropped} turns are no longer read" if session.dropped else ""
    return "\n".join([*lines, f"{total:>6}  in all{share}{dropped}"])


def stats(chat: Chat, _: str) -> str:
    spent = chat.session.spent
    if not spent.said:
        return "no answer yet"
    return "\n".join(
        [
            f"first token after {spent.first:.2f} s, then {per_second(chat):.1f} tokens a second, {spent.said} in all",
            f"prompt: {spent.read} tokens read, {spent.kept} known before",
            f"pictures: {spent.encoded} encoded, {spent.reused} known before",
        ]
    )


def per_second(chat: Chat) -> float:
    """Tokens after the first."""
    spent = chat.session.spent
    return (spent.said - 1) / (spent.seconds - spent.first) if spent.said > 1 else 0.0


def thumbnail(picture: Image.Image, width: int = 32, height: int = 12) -> Segments:
    """A small picture of half-blocks, for a terminal with colours."""
    small = picture.copy()
    small.thumbnail((width, 2 * height))
    parts = []
    for y in range(0, small.height, 2):
        for x in range(small.width):
            above, below = (small.getpixel((x, row)) if row < small.height else None for row in (y, y + 1))
            parts.append(Segment("▀", Style(color=colour(above), bgcolor=colour(below))))
        parts.append(Segment.line())
    return Segments(parts)


def colour(pixel: object) -> Color | None:
    return Color.from_rgb(*pixel) if isinstance(pixel, tuple) else None
