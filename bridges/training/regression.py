"""A bridge may begin where a regression ends: at the words that are said about each picture, before any step.

Ridge regression (Hoerl and Kennard 1970) in closed form: the slots of a picture, or what blocks read of it (its memory,
here slots too), are, on average, the embeddings of its words, of which each counts for as much as it tells (its inverse
document frequency). The language model knows what to make of words; what is left to the steps is how to say them so
that it listens.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from bridges.build import Assembled
from bridges.data.conversation import Example, images_of
from bridges.data.pictures import MapStyle
from bridges.store import Store
from bridges.training.feed import shuffled
from bridges.training.stage import Stage

SIZE = 30.0
"""Slots begin so many times as large as token embeddings. Small ones drown: each layer adds to what is there, and what
a picture says is looked for in all of them."""
RIDGE = 0.1
"""Of the mean variance of an input."""
TOGETHER, FEWEST = 32, 20


def start_at_words(stage: Stage, data: MapStyle[Example], console: Console) -> None:
    """Fit the last layer of a fresh bridge to `train.regression` examples, those with a single picture. A tenth is held
    out: where nothing of that is explained, all texts have the same words, or there are fewer than 20, the bridge stays
    as it is.

    Raises ValueError where there is no such layer, or another start.
    """
    built = stage.built
    if not (count := built.recipe.train.regression):
        return
    last = built.model.bridge.last
    if not isinstance(built, Assembled) or last is None:
        raise ValueError(
            f"train.regression {count}: {built.recipe.bridge['name']} has no linear layer from pictures to a language "
            "model's embeddings here; set it to 0"
        )
    if built.recipe.start:
        raise ValueError(f"train.regression {count} would undo what start {built.recipe.start} brings; set it to 0")
    places = [int(place) for place in shuffled(built.recipe.train.seed, 0, len(data))[:count]]
    seen, slots, texts = read(built, last, stage.store, data, places, console)
    if len(texts) < FEWEST:
        console.print(f"regression: {len(texts)} examples with one picture are too few; the bridge starts at random")
        return
    wanted = meant(built, texts)
    if not wanted.any():  # a word in every text tells nothing about a picture, so it counts for nothing
        console.print(
            f"regression: all {len(texts)} texts have the same words, and from equal texts there is nothing to learn; "
            "the bridge starts at random"
        )
        return
    explained = fit(last, seen, wanted, slots, SIZE * built.model.language.embedding_rms())
    console.print(
        f"regression on {len(texts)} pictures: explains {explained:.2f} of the words about pictures held out (0: their "
        f"mean); the bridge starts {'there' if explained > 0 else 'at random'}",
        highlight=False,
    )


@torch.no_grad()
def read(
    built: Assembled,
    last: nn.Linear,
    store: Store | None,
    data: MapStyle[Example],
    places: Sequence[int],
    console: Console,
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "m k c"], list[str]]:
    """Of each example with one picture what enters the bridge's last layer, its mean over the slots (of the last few
    examples all slots), and what the assistant says."""
    vision, caught, means, texts = built.model.vision, [torch.empty(0, 0, 0)], [], []
    starts = range(0, len(places), TOGETHER)
    with last.register_forward_pre_hook(lambda _, given: caught.append(given[0].cpu().double())):
        for start in track(starts, "regression", console=console, transient=True, disable=not console.is_terminal):
            pictures = []
            for example in (data[place] for place in places[start : start + TOGETHER]):
                turns = [turn for talk in example.conversations for turn in talk.turns]
                if len({id(picture) for picture in images_of(turns)}) == 1:
                    pictures.append(images_of(turns)[0])
                    texts.append(" ".join(str(part) for t in turns if t.role == "assistant" for part in t.content))
            if pictures:
                features = store(pictures) if store else vision(vision.preprocess(pictures).to(last.weight.device))
                built.model.bridge(features.to(last.weight))
                means.append(caught[-1].mean(1))
                del caught[:-1]
    return torch.cat(means or caught), caught[-1], texts


@torch.no_grad()
def meant(built: Assembled, texts: Sequence[str]) -> Float[Tensor, "n d"]:
    """The embeddings of the words of each text added up, each times log(n / texts that have it)."""
    language, tokenizer = built.model.language, built.template.tokenizer
    ids: list[list[int]] = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in texts]
    known = sorted({token for row in ids for token in row})
    rows = (torch.tensor(row, dtype=torch.long) for row in ids)
    counts = torch.stack([torch.bincount(row, minlength=known[-1] + 1)[known] for row in rows]).double()
    telling = (len(ids) / (counts > 0).sum(0)).log()
    return counts * telling @ language.embed(torch.tensor([known], device=language.device))[0].cpu().double()


@torch.no_grad()
def fit(
    last: nn.Linear,
    seen: Float[Tensor, "n c"],
    wanted: Float[Tensor, "n d"],
    slots: Float[Tensor, "m k c"],
    size: float,
) -> float:
    """Set a layer by the regression of `wanted` on `seen`, scaled so that of `slots` it makes some of root mean square
    `size`. Nothing is set where it explains nothing (R² below 0) of every tenth row, which it does not learn from.

    Returns R² of these rows; there is none (nan) of rows of `wanted` that are all the same.
    """
    held = torch.arange(len(seen)) % 10 == 0
    middle, mean = seen[~held].mean(0), wanted[~held].mean(0)
    known, said = seen[~held] - middle, wanted[~held] - mean
    products = known.T @ known
    products.diagonal().add_(RIDGE * products.diagonal().mean() + 1e-12)  # where all pictures are the same
    weight = torch.linalg.solve(products, known.T @ said)
    missed = (wanted[held] - mean - (seen[held] - middle) @ weight).square().sum()
    explained = 1 - float(missed / (wanted[held] - mean).square().sum())
    if explained > 0:
        weight *= size / ((slots - middle) @ weight).square().mean().sqrt()
        last.weight.copy_(weight.T)
        if last.bias is not None:
            last.bias.copy_(-middle @ weight)
    return explained
