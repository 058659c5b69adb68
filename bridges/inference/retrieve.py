"""`bridges retrieve`: the best pictures for a text, the best texts for a picture, or how well one fits the other."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridges.checkpoint import load_pairs
from bridges.data.pictures import no_file, open_picture
from bridges.inference.folder import Folder
from bridges.inference.retrieval import Match, Ranking, Retriever


def retrieve(
    checkpoint: str | Path,
    *,
    images: str | None = None,
    image: Sequence[str] = (),
    text: Sequence[str] = (),
    texts: str | None = None,
    top: int = 5,
    rerank: int = 16,
) -> None:
    """Print what was found. Raises ValueError for anything the user can mend, before any work where that can be."""
    if bool(images) == bool(image):
        raise ValueError("give either --images FOLDER, to find pictures in it, or --image PICTURE, to find its text")
    if top < 1 or rerank < 1:
        raise ValueError(f"--top {top} --rerank {rerank}: both are numbers of results, at least 1")
    said = [*text, *(lines_of(Path(texts)) if texts else [])]
    if not said:
        raise ValueError("no text to compare with: give --text, or --texts FILE with one a line")
    opened = [open_picture(path) for path in image]
    console, quiet = Console(), Console(stderr=True)
    retriever = Retriever(load_pairs(checkpoint), console=quiet)
    one_pair = len(image) == len(said) == 1
    if not retriever.can_compare and not one_pair:
        raise ValueError(f"{checkpoint} was not trained to compare: its objectives lack contrastive and sigmoid")
    embedded = retriever.texts(said)
    for cut in retriever.too_long(said):
        quiet.print(
            Text(f"only the first {retriever.bridge.words.longest - 2} tokens are read of: {cut}"), soft_wrap=True
        )
    if images:
        folder = Folder(Path(images), retriever.vision, quiet)
        found = retriever.find_pictures(retriever.pictures(folder), embedded, rerank)
        names = [str(path.relative_to(images)) for path in folder.paths]
        show(console, said, found, names, "file", top)
        if folder.broken:
            quiet.print(Text(folder.summary()), soft_wrap=True)
    elif one_pair:
        explain(console, retriever.match(opened[0], said[0]), retriever)
    else:
        show(console, image, retriever.find_texts(retriever.see(opened), embedded, rerank), said, "text", top)
    if not retriever.can_match and not one_pair:
        quiet.print("in the order of cosines alone: the recipe has no objective `matching`")


def lines_of(path: Path) -> list[str]:
    """Texts, one a line. ValueError where there is no such file, or nothing in it."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise ValueError(no_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from error
    if not any(lines):
        raise ValueError(f"{path} is empty; it should hold a text in each line")
    return [line for line in lines if line]


def show(console: Console, queries: Sequence[str], found: Ranking, names: Sequence[str], kind: str, top: int) -> None:
    """A table for each query."""
    for place, query in enumerate(queries):
        table = Table("rank", kind, "cosine", "probability of a match", box=None, title_justify="left")
        table.title = Text(query, style="bold")
        for column in (0, 2, 3):
            table.columns[column].justify = "right"
        for rank, best in enumerate(found.best(place, top), 1):
            figures = (float(found.cosines[place, best]), float(found.probability[place, best]))
            table.add_row(str(rank), Text(names[best], overflow="fold"), *map(number, figures))
        console.print(table)


def explain(console: Console, found: Match, retriever: Retriever) -> None:
    """Both figures of a pair, and what they mean."""
    probability = found.probability if retriever.can_match else math.nan
    cosine = found.cosine if retriever.can_compare else math.nan
    lines = [
        (probability, "probability of a match: the text belongs to the picture, rather than to one that is like it"),
        (cosine, "cosine, -1 to 1: higher than with other texts or pictures is better; alone it says little"),
    ]
    for figure, meaning in lines:
        console.print(f"{number(figure):>6}  {meaning}", highlight=False, soft_wrap=True)
    if math.isnan(probability + cosine):
        console.print("–: its recipe did not train that", highlight=False)


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
