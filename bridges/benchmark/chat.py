"""How much sooner the fourth turn of a conversation with two pictures is answered than with nothing kept."""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from bridges.benchmark.rounds import differ, enough
from bridges.checkpoint import load
from bridges.data.conversation import Turn
from bridges.data.pictures import open_picture
from bridges.inference.decoding import Choose, until_end
from bridges.inference.session import Session

REPLIES = [
    "A red cat sits on a wooden chair beside a window. Behind it stands a small table with a cup, a book and a green "
    "plant, and the light comes from the left.",
    "This one shows a blue house with a white door under a grey sky. A tall tree stands to the right of it, and a dog "
    "lies on the grass in front, looking at the road.",
    "The house is blue and its door is white; the roof is of a darker blue, and the dog in front of it is brown with "
    "one white ear.",
]
QUESTIONS = ["What is in the picture?", "And in this one?", "What colour is it?", "What is left of it?"]


def chat(
    checkpoint: str, rounds: int = 5, image: Sequence[str] = (), console: Console | None = None
) -> dict[str, float]:
    """Print, and return, the median seconds to the first token of turn 4, and how often the tower encoded a picture.

    `kept` goes on after three turns, what every message begins with read ahead, as the REPL does it while a person
    types: that is not timed. `kept, not ahead` reads it with turn 4, as the server does; `afresh` encodes both pictures
    and reads everything. They take turns, after one round each that does not count. Pictures are in turns 1 and 2; the
    first three replies are the same for every model.
    Raises ValueError for fewer than 3 rounds, not two pictures, or answers that differ in float32.
    """
    enough(rounds)
    if len(image) not in (0, 2):
        raise ValueError(f"the conversation has two pictures, not {len(image)}")
    pictures = [open_picture(Path(path)) for path in image] or [noise(seed) for seed in (0, 1)]
    told, session = console or Console(), Session(load(checkpoint))
    three_turns(session, pictures)
    encoded = session.looker.features.encoded
    last, before = Turn("user", [QUESTIONS[3]]), session.fork()
    ahead = session.read_ahead()
    ways: dict[str, Callable[[], Session]] = {
        "kept": session.fork,
        "kept, not ahead": before.fork,
        "afresh": lambda: afresh(session),
    }
    said = {way: answer(begin(), last) for way, begin in ways.items()}
    if len(set(said.values())) > 1:
        differ(f"the answers differ: {said}", session.assembled.model.language.dtype, told)
    seconds, read = timed(ways, last, rounds)
    again = session.looker.features.encoded - encoded
    told.print(table(seconds, read, {"kept": again, "kept, not ahead": again, "afresh": encoded}))
    medians = {way: median(times) for way, times in seconds.items()}
    sooner, plain = (medians["afresh"] / medians[way] for way in ("kept", "kept, not ahead"))
    told.print(
        f"turn 4 begins {sooner:.1f} times sooner; {ahead} tokens that every message begins with were read before it, "
        f"while a person types, which is not timed: without that {plain:.1f} times sooner"
    )
    told.print(f"in the whole conversation {encoded + again} encodings of 2 pictures")
    return {**medians, "encoded": encoded + again}


def three_turns(session: Session, pictures: Sequence[Image.Image]) -> None:
    """A picture in each of the first two."""
    for question, shown, reply in zip(QUESTIONS, [pictures[:1], pictures[1:], []], REPLIES, strict=False):
        session.append(Turn("user", [*shown, question]))
        list(session.stream(96, saying(session, reply)))


def afresh(session: Session) -> Session:
    """The same conversation, of which nothing was read or seen yet."""
    other = Session(session.assembled)
    other.turns = list(session.turns)
    return other


def saying(session: Session, reply: str) -> Choose:
    """Says this, with the tokens that the template has for it, and its end."""
    template, ends = session.assembled.template, session.assembled.model.language.end_ids
    before, _ = template.render(session.turns, reply=True)
    after, _ = template.render([*session.turns, Turn("assistant", [reply])])
    ids, _, _ = template.tokenize(after[len(before) :])
    following = chain(until_end(ids, ends), repeat(next(iter(ends))))
    return lambda logits: torch.full((len(logits),), next(following), device=logits.device)


def timed(
    ways: dict[str, Callable[[], Session]], last: Turn, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds to the first token, each way once a round, and how many tokens were read for it."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    read = {}
    for _ in range(rounds):
        for way, begin in ways.items():
            asked = begin()
            seconds[way].append(first_token(asked, last))
            read[way] = asked.spent.read
    return seconds, read


def first_token(session: Session, turn: Turn) -> float:
    """Seconds until it is there, all that stands before it included."""
    session.append(turn)
    began = perf_counter()
    pieces = session.stream(24)
    next(pieces)
    seconds = perf_counter() - began
    pieces.close()
    return seconds


def answer(session: Session, turn: Turn) -> str:
    session.append(turn)
    return "".join(session.stream(24))


def table(seconds: dict[str, list[float]], read: dict[str, int], encodings: dict[str, int]) -> Table:
    shown = Table("turn 4", "median s", "least", "most", "tokens read", "pictures encoded")
    for way, times in seconds.items():
        figures = (f"{value:.4f}" for value in (median(times), min(times), max(times)))
        shown.add_row(way, *figures, str(read[way]), str(encodings[way]))
    return shown


def noise(seed: int) -> Image.Image:
    """A picture of grey levels, the same on every machine."""
    values = torch.randint(0, 256, (224, 224, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())
