"""How much sooner forty labels are scored as a tree, in one pass, than one after another."""

from collections.abc import Callable

from rich.console import Console
from torch import Tensor

from bridges.benchmark.chat import noise
from bridges.benchmark.naive import from_cache, row_by_row
from bridges.benchmark.rounds import differ, enough, figures, in_turns, table
from bridges.checkpoint import load
from bridges.inference.features import Features
from bridges.inference.fewshot import FewShot
from bridges.inference.prompts import Prompt

THINGS = """goldfish, great white shark, ostrich, house finch, bald eagle, tree frog, box turtle, green iguana,
garter snake, scorpion, garden spider, peacock, hummingbird, black swan, koala, jellyfish, sea slug, fiddler crab,
pelican, grey whale, sea lion, border collie, golden retriever, red fox, tiger cat, snow leopard, brown bear, ladybug,
dung beetle, monarch butterfly, starfish, guinea pig, hippopotamus, red panda, acoustic guitar, fire engine,
hot air balloon, coffee mug, grand piano, traffic light"""
BEFORE, ASKED = "This is a picture of a {}.\n", "This is a picture of a"
OTHERS = ("house", "red car", "tall tree", "white cup of tea", "small boat on a lake")
SAME = 2e-3  # nats; float32 adds up in another order


def score(checkpoint: str, rounds: int = 5, context: int = 120, console: Console | None = None) -> dict[str, object]:
    """Print, and return, the median seconds to the log-probabilities of 40 labels after a prompt with a picture.

    `tree` reads the prompt and the labels' common beginnings once, in one pass; `cached` reads the prompt once and then
    label after label; `anew` reads the prompt before every label. They take turns, after a round that does not count;
    what the encoder sees in the picture is given to all. The prompt has at least `context` tokens.
    Raises ValueError for fewer than 3 rounds, a bridge or a language model that cannot share, or scores that differ in
    float32.
    """
    enough(rounds)
    assembled = load(checkpoint)
    told, model = console or Console(), assembled.model
    model.keeps_prefix = False  # nothing is kept where the prompt is read anew
    reader = FewShot(assembled, features=Features(assembled))
    labels = [f" {thing.strip()}.\n" for thing in THINGS.split(",")]
    prompt = prompt_of(reader, context)
    text, tree = reader.plain.with_labels(prompt, labels)
    if not model.language.shares(len(text.ids) + len(tree.tokens)):
        raise ValueError(f"{model.language.name} cannot share a beginning, so there is no tree to compare")
    ways: dict[str, Callable[[], Tensor]] = {
        "tree": lambda: reader.score([prompt], labels).total[0],
        "cached": lambda: from_cache(model, reader.features, [text], tree, whole=True)[0],
        "anew": lambda: row_by_row(model, reader.features, text, tree)[0],
    }
    found = {way: run() for way, run in ways.items()}
    for way, totals in found.items():
        far = float((totals - found["tree"]).abs().max())
        if far > SAME or totals.argmax() != found["tree"].argmax():
            differ(f"the scores differ: {way} is {far:.2g} nats from the tree", model.language.dtype, told)
    seconds = in_turns(ways, rounds)
    read = {"tree": len(text.ids) + len(tree.inner), "cached": len(text.ids) + sum(len(p) - 1 for p in tree.paths)}
    read["anew"] = sum(len(text.ids) + len(path) - 1 for path in tree.paths)
    told.print(table(f"{len(labels)} labels", seconds, {"tokens read": read}))
    return {"labels": len(labels), "context": len(text.ids), "read": read, **figures(seconds)}


def prompt_of(reader: FewShot, context: int) -> Prompt:
    """Text of other things and a picture, with as many tokens as are wanted or a few more."""
    told = ""
    while True:
        for thing in OTHERS:
            prompt = [told, noise(0), ASKED]
            if len(reader.plain.encode(prompt).ids) >= context:
                return prompt
            told += BEFORE.format(thing)
