"""A checkpoint of the first stage on held-out pairs: what it finds, tells apart and writes."""

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bridges.build import Paired
from bridges.data.pairs import PairBatch, pair_of
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.evaluation.report import Shown
from bridges.evaluation.retrieval import Asked, Compared, caption_nll, costs, matching_accuracy, recalls
from bridges.evaluation.tasks import Metric
from bridges.inference.retrieval import RERANK, Retriever, nearest, reranked
from bridges.objectives.captioning import written
from bridges.objectives.controls import CONTROLS, Control, controlled
from bridges.objectives.matching import hard_negatives
from bridges.objectives.pairs import pair_batch, seen
from bridges.store import open_store

AT_ONCE = 48  # pairs; pictures are shuffled among them
SHOWN = 12


@dataclass
class HeldOut:
    """n pairs of a split: texts, vision features, keys that are equal for equal ones, and what writing each costs."""

    texts: list[str] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    picture_keys: list[int] = field(default_factory=list)
    caption_keys: list[int] = field(default_factory=list)
    nll: dict[Control, list[tuple[float, int]]] = field(default_factory=lambda: {c: [] for c in CONTROLS})
    """Summed over the tokens of a caption, and how many they are."""
    first: list[Image.Image] = field(default_factory=list)


def measure_pairs(paired: Paired, split: str, size: int, console: Console) -> tuple[dict[str, Metric], list[Shown]]:
    """Every metric that the recipe's objectives allow, and the first pictures with what was found for them.

    Raises ValueError where the split has fewer than two pairs, or an example is none.
    """
    retriever = Retriever(paired, console=console)
    held = hold_out(paired, retriever, split, size, console)
    compared = compare(retriever, held)
    table: dict[str, Metric] = {}
    if retriever.can_compare:
        table |= recalls(compared, retriever.can_match)
    if retriever.can_match:
        table["matching_accuracy"] = matching_accuracy(compared)
    writes = "captioning" in paired.recipe.objectives
    if writes:
        table["caption_nll"] = caption_nll(held.nll, retriever.bridge.words.size)
    if retriever.can_compare:
        table |= costs(compared)
    return table, shown(retriever, held, compared, writes)


@torch.no_grad()
def hold_out(paired: Paired, retriever: Retriever, split: str, size: int, console: Console) -> HeldOut:
    """See the pictures of a split, and have every caption written under each control."""
    data = SkipBroken(open_split(paired.recipe.data, split))
    count = min(size, len(data))
    if count < 2:
        raise ValueError(f"split {split} has {count} pair; at least 2 are needed, so that there is something to find")
    starts = [start for start in range(0, count, AT_ONCE) if count - start > 1]  # one alone has no other picture
    held, store = HeldOut(), open_store(paired)
    writes = "captioning" in paired.recipe.objectives
    for start in track(starts, f"seeing {split}", console=console):
        last = start == starts[-1]
        examples = [data[i] for i in range(start, count if last else start + AT_ONCE)]
        batch = pair_batch(paired.model, examples, store)
        features = seen(paired.model, batch)
        pairs = [pair_of(example) for example in examples]
        held.texts += [text for _, text, _ in pairs]
        held.first = held.first or [picture for picture, _, _ in pairs][:SHOWN]
        held.features.append(features.cpu())
        held.picture_keys += batch.pictures.tolist()
        held.caption_keys += batch.captions.tolist()
        for control in CONTROLS if writes else ():
            held.nll[control] += written_nll(retriever, controlled(features, paired.model.vision, control), batch)
    if store:
        store.flush()
    if data.broken:
        console.print(data.summary())
    return held


def written_nll(retriever: Retriever, features: Float[Tensor, "b p v"], batch: PairBatch) -> list[tuple[float, int]]:
    """Nats of each caption as the Q-Former writes it, and its number of tokens."""
    bridge = retriever.bridge
    _, kept = bridge.run(bridge.look(features.to(bridge.queries.dtype)))
    logits, rows, columns = written(bridge, kept, batch.ids, batch.real)
    each = F.cross_entropy(logits, batch.ids[rows, columns + 1], reduction="none").double()
    return [(float(each[rows == row].sum()), int((rows == row).sum())) for row in range(len(batch.ids))]


def compare(retriever: Retriever, held: HeldOut) -> Compared:
    """All cosines, and the odds of the nearest both ways and of all that is asked for the matching accuracy."""
    began = time.monotonic()
    pictures, texts = retriever.pictures(torch.cat(held.features)), retriever.texts(held.texts)
    cosines = retriever.cosines(pictures, texts)
    cosine_seconds = time.monotonic() - began
    keys = [torch.tensor(keys) for keys in (held.picture_keys, held.caption_keys)]
    wrong = (keys[0][:, None] != keys[0]) & (keys[1][:, None] != keys[1])  # what equals the answer is as good
    asked = hard_pairs(cosines, wrong, retriever)
    odds, pairs, seconds = torch.full_like(cosines, torch.nan), 0, 0.0
    if retriever.can_match:
        wanted = nearest(cosines, RERANK) | nearest(cosines.T, RERANK).T
        wanted[asked.pictures[asked.counts], asked.texts[asked.counts]] = True
        began = time.monotonic()
        odds = retriever.log_odds(pictures, texts, wanted)
        pairs, seconds = int(wanted.sum()), time.monotonic() - began
    return Compared(cosines, odds, wrong, asked, pairs, seconds, cosine_seconds, retriever.temperature)


def hard_pairs(cosines: Float[Tensor, "n n"], wrong: Bool[Tensor, "n n"], retriever: Retriever) -> Asked:
    """Negatives are drawn as in training, but among all held-out pairs."""
    own = torch.arange(len(cosines))
    text, some_text = hard_negatives(cosines, wrong, retriever.bridge.heads, seed=0)
    picture, some_picture = hard_negatives(cosines.T, wrong.T, retriever.bridge.heads, seed=1)
    counts = torch.stack([torch.ones_like(some_text), some_text, some_picture])
    return Asked(torch.stack([own, own, picture]), torch.stack([own, text, own]), counts)


def shown(retriever: Retriever, held: HeldOut, compared: Compared, writes: bool) -> list[Shown]:
    """The first pictures: their own caption, those found among all, and what the Q-Former itself writes."""
    count = len(held.first)
    said = retriever.write(held.features[0][:count]) if writes else [""] * count
    found = compared.cosines[:count].argmax(1).tolist()
    matched = found
    if retriever.can_match:
        cosines, odds = compared.cosines[:count], compared.odds[:count]
        matched = reranked(cosines, odds, nearest(cosines, RERANK), compared.temperature).argmax(1).tolist()
    return [
        Shown(
            picture,
            f"It writes: {said[i]}" if writes else "",
            held.texts[i],
            held.texts[matched[i]],
            held.texts[found[i]],
            ("Its caption", "Found, reranked by matching" if retriever.can_match else "Found", "Found by cosine alone"),
        )
        for i, picture in enumerate(held.first)
    ]
