"""Which picture belongs to which text: every pair by cosine, then the best of them by the matching head.

BLIP-2 (arXiv 2301.12597, section 4.4): the cosine costs one product a pair, the matching head one pass of the Q-Former,
so the head only looks at the `k` nearest and orders them anew.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from bridges.build import Paired
from bridges.inference.folder import Folder
from bridges.layers import together, writing
from bridges.objectives.captioning import write_logits
from bridges.objectives.contrastive import embed_images, embed_texts, similarity
from bridges.objectives.matching import match_logits
from bridges.qformer import Memory, QFormer

RERANK = 16  # candidates of a query that the matching head looks at


@dataclass(frozen=True)
class Pictures:
    """i pictures: vision features (on the CPU, or in the cache), and the k normalised embeddings of each."""

    features: Tensor | Folder
    embedded: Float[Tensor, "i k e"]


@dataclass(frozen=True)
class Texts:
    """t texts: ids, where they are no padding, and the normalised embedding of each."""

    ids: Int[Tensor, "t l"]
    real: Bool[Tensor, "t l"]
    embedded: Float[Tensor, "t e"]


class Match(NamedTuple):
    """`probability` that a text belongs to a picture, as the matching head sees it; `cosine`, -1 to 1."""

    probability: float
    cosine: float


@dataclass(frozen=True)
class Ranking:
    """For each of q queries a score of every one of c candidates; the probability is NaN where nobody matched."""

    scores: Float[Tensor, "q c"]
    cosines: Float[Tensor, "q c"]
    probability: Float[Tensor, "q c"]

    def best(self, query: int, top: int) -> list[int]:
        """The candidates with the highest scores, the highest first."""
        return self.scores[query].argsort(descending=True, stable=True)[:top].tolist()


class Retriever:
    """Compares pictures and texts with a checkpoint of the first stage, `batch` at a time; `console` shows progress.

    Nothing trains. What a recipe without `matching` (or without `contrastive` and `sigmoid`) cannot do is in
    `can_match` (and `can_compare`): those heads are as they were drawn.
    """

    def __init__(self, paired: Paired, batch: int = 128, console: Console | None = None) -> None:
        bridge, objectives = paired.model.bridge, paired.recipe.objectives
        assert isinstance(bridge, QFormer)
        self.vision, self.bridge, self.batch, self.console = paired.model.vision, bridge, batch, console
        self.can_match = "matching" in objectives
        self.can_compare = bool({"contrastive", "sigmoid"} & objectives.keys())
        self.temperature = float(bridge.heads.temperature.detach()) if self.can_compare else 1.0

    @torch.no_grad()
    def pictures(self, features: Tensor | Folder) -> Pictures:
        """Pictures by their vision features "i p v"."""
        heads = self.bridge.heads
        embedded = [
            embed_images(heads, self.bridge.run(self._look(features, list(rows)))[0])
            for rows in self._batches(len(features), "embedding pictures")
        ]
        return Pictures(features, torch.cat(embedded))

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> Pictures:
        """Pictures that are not in a folder."""
        return self.pictures(self.vision(self.vision.preprocess(pictures).to(self._device)).cpu())

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Texts:
        """Texts of any lengths; what is longer than the bridge reads is cut. ValueError where there is none."""
        if not texts:
            raise ValueError("no text to compare with; give at least one")
        if empty := [place for place, text in enumerate(texts, 1) if not text.strip()]:
            raise ValueError(f"text {empty[0]} is empty; give it words")
        ids, real = (x.to(self._device) for x in self.bridge.words(texts))
        embedded = []
        for rows in self._batches(len(texts), "embedding texts"):
            some, seen = trimmed(ids[list(rows)], real[list(rows)])
            hidden, _ = self.bridge.run(None, some, together(0, seen))
            embedded.append(embed_texts(self.bridge.heads, hidden[:, 0]))
        return Texts(ids, real, torch.cat(embedded))

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Those whose end is cut."""
        words = self.bridge.words
        ids = words.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) > words.longest - 2]

    def cosines(self, pictures: Pictures, texts: Texts) -> Float[Tensor, "i t"]:
        """Of the query of each picture that is nearest to the text; no temperature. On the CPU, in float64."""
        parts = pictures.embedded.split(self.batch)
        return torch.cat([similarity(part, texts.embedded) for part in parts]).double().cpu()

    @torch.no_grad()
    def log_odds(self, pictures: Pictures, texts: Texts, wanted: Bool[Tensor, "i t"]) -> Float[Tensor, "i t"]:
        """Of a match, for the wanted pairs; NaN for the others. The mean over queries, as in training."""
        found = torch.full(wanted.shape, torch.nan, dtype=torch.float64)
        rows, columns = wanted.nonzero(as_tuple=True)  # picture after picture: a batch looks at few of them
        for some in self._batches(len(rows), "matching pairs"):
            own, place = rows[list(some)].unique(return_inverse=True)
            memory: Memory = [
                seen and (seen[0][place], seen[1][place]) for seen in self._look(pictures.features, own.tolist())
            ]
            which = columns[list(some)]
            logits = match_logits(self.bridge, memory, *trimmed(texts.ids[which], texts.real[which]))
            found[rows[list(some)], which] = (logits[:, 1] - logits[:, 0]).double().cpu()
        return found

    def find_pictures(self, pictures: Pictures, texts: Texts, k: int = RERANK) -> Ranking:
        """Pictures for each text, the `k` nearest reordered by matching. ValueError where k is below 1."""
        return self._ranking(self.cosines(pictures, texts).T, k, lambda w: self.log_odds(pictures, texts, w.T).T)

    def find_texts(self, pictures: Pictures, texts: Texts, k: int = RERANK) -> Ranking:
        """Texts for each picture, as `find_pictures`."""
        return self._ranking(self.cosines(pictures, texts), k, lambda w: self.log_odds(pictures, texts, w))

    def _ranking(self, cosines: Tensor, k: int, log_odds: Callable[[Tensor], Tensor]) -> Ranking:
        wanted = nearest(cosines, k)
        if not self.can_match:
            return Ranking(cosines, cosines, torch.full_like(cosines, torch.nan))
        odds = log_odds(wanted)
        return Ranking(reranked(cosines, odds, wanted, self.temperature), cosines, odds.sigmoid())

    def match(self, image: Image.Image, text: str) -> Match:
        """One pair. The sigmoid of the log-odds is the one softmax over (no match, match).

        The probability is NaN where the recipe has no matching.
        """
        found = self.find_texts(self.see([image]), self.texts([text]))
        return Match(float(found.probability), float(found.cosines))

    @torch.no_grad()
    def write(self, features: Float[Tensor, "i p v"], longest: int = 30) -> list[str]:
        """What the Q-Former itself writes about pictures, the likeliest token each time; at most `longest` of them."""
        bridge, words = self.bridge, self.bridge.words
        _, past = bridge.run(self._look(features, list(range(len(features)))))
        ids = torch.full((len(features), 1), words.write, device=self._device)
        for _ in range(longest):
            mask = writing(bridge.num_slots, torch.ones_like(ids).bool())[:, :, bridge.num_slots :]
            hidden, _ = bridge.run(None, ids, mask, past)
            ids = torch.cat([ids, write_logits(bridge, hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
            if (ids == words.end).any(1).all():
                break
        rows = [row[1 : row.index(words.end) if words.end in row else None] for row in ids.tolist()]
        return words.tokenizer.batch_decode(rows, skip_special_tokens=True)

    @property
    def _device(self) -> torch.device:
        return self.bridge.queries.device

    def _look(self, features: Tensor | Folder, rows: list[int]) -> Memory:
        """Keys and values of some pictures."""
        return self.bridge.look(features[rows].to(self._device, self.bridge.queries.dtype))

    def _batches(self, count: int, told: str) -> Iterable[range]:
        """Stretches of `batch`, with a bar."""
        stretches = [range(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]
        seen = self.console is not None and self.console.is_terminal
        return track(stretches, told, console=self.console, transient=True, disable=not seen)


def trimmed(ids: Int[Tensor, "b t"], real: Bool[Tensor, "b t"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Without the columns that are padding in every row."""
    width = int(real.sum(1).max())
    return ids[:, :width], real[:, :width]


def nearest(cosines: Float[Tensor, "q c"], k: int) -> Bool[Tensor, "q c"]:
    """The k candidates of each query that are nearest to it, or all where they are fewer."""
    if k < 1:
        raise ValueError(f"rerank {k}: matching needs at least 1 candidate of each query")
    places = cosines.topk(min(k, cosines.shape[1])).indices
    return torch.zeros_like(cosines, dtype=torch.bool).scatter(1, places, True)


def reranked(
    cosines: Float[Tensor, "q c"], odds: Float[Tensor, "q c"], wanted: Bool[Tensor, "q c"], temperature: float
) -> Float[Tensor, "q c"]:
    """Cosine / temperature + half the log-odds of a match for the wanted; all others lie below, ordered by cosine.

    Matching has learned to tell true pairs from negatives drawn by exp(cosine / temperature), so its odds come on top
    of that; half of them, because it is surer than it is right. LAVIS adds the logit of a match to the bare cosine,
    which then hardly counts: in the demo that makes the first found worse, not better.
    """
    matched = (cosines / temperature + odds / 2).masked_fill(~wanted, torch.inf)
    return torch.where(wanted, matched, matched.amin(1, keepdim=True) - 2 + cosines)  # no cosine is above 1
