"""A look at what the language model will see, before paying for a run."""

from rich.console import Console
from rich.text import Text

from bridges.checkpoint import build
from bridges.config import Recipe
from bridges.data.batch import Row, rows_of
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID, Template


def inspect(recipe: Recipe, samples: int = 3) -> None:
    """Print the first rows: picture slots blue, targets green, everything else dim, with the lengths.

    Raises ValueError when not one token of them is a target.
    """
    console = Console()
    model, template, _ = build(recipe)
    limit = recipe.data.max_length
    data = SkipBroken(open_split(recipe.data, "train"))
    targets = 0
    for index in range(min(samples, len(data))):
        example = data[index]
        for row in rows_of(example, template, limit, model.language.shares(limit)):
            aimed = sum(label != IGNORE_INDEX for label in row.labels)
            slots = row.ids.count(IMAGE_TOKEN_ID)
            targets += aimed
            console.rule(
                f"example {index}: {len(example.conversations)} texts, {len(row.images)} pictures, "
                f"{len(row.ids)} positions = {slots} slots + {len(row.ids) - slots} tokens, {aimed} of them targets"
            )
            console.print(coloured(row, template))
    console.print(f"{len(data)} examples; {model.bridge.num_slots} slots a picture", highlight=False)
    console.print(Text.assemble(("slots", "bold blue"), "  ", ("targets", "bold green"), "  ", ("not learned", "dim")))
    if not targets:
        raise ValueError(
            "not one token is a target: the assistant says nothing, or data.max_length cuts it off, or the template "
            f"{recipe.language.template!r} leaves it out"
        )


def coloured(row: Row, template: Template) -> Text:
    """The tokens of a row as they are, each text that shares it on a line of its own."""
    text = Text()
    slots, segment = 0, row.segments[0]
    for token, label, belongs in [*zip(row.ids, row.labels, row.segments, strict=True), (None, IGNORE_INDEX, -1)]:
        if slots and token != IMAGE_TOKEN_ID:
            text.append(f"[picture: {slots} slots]", style="bold blue")
            slots = 0
        if token is None:
            break
        if belongs != segment:
            text.append("\n  text " + str(belongs) + "  ", style="cyan")
            segment = belongs
        if token == IMAGE_TOKEN_ID:
            slots += 1
        else:
            words = str(template.tokenizer.decode([token])).replace("\n", "↵\n")
            text.append(words, style="bold green" if label != IGNORE_INDEX else "dim")
    return text
