"""What the comparison of all held-out pictures with all their captions comes to. Ties count against us."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridges.evaluation.metrics import interval
from bridges.evaluation.tasks import Metric
from bridges.inference.retrieval import RERANK, nearest, reranked
from bridges.objectives.controls import Control

CUTOFFS = (1, 5, 10)


@dataclass(frozen=True)
class Asked:
    """Three questions a pair: is it one, is its picture one with a hard wrong text, its text with a hard wrong picture?

    A pair to which nothing is wrong has no such text or picture: then it does not count.
    """

    pictures: Int[Tensor, "3 n"]
    texts: Int[Tensor, "3 n"]
    counts: Bool[Tensor, "3 n"]


@dataclass(frozen=True)
class Compared:
    """All pictures with all captions: cosines, log-odds of a match (NaN where not asked), and what is no answer.

    `pairs` were matched and took `seconds`; the cosines, with both embeddings, took `cosine_seconds`.
    """

    cosines: Float[Tensor, "n n"]
    odds: Float[Tensor, "n n"]
    wrong: Bool[Tensor, "n n"]
    asked: Asked
    pairs: int
    seconds: float
    cosine_seconds: float
    temperature: float


def recalls(compared: Compared, matched: bool) -> dict[str, Metric]:
    """How often one of the right ones is among the first 1, 5, 10, both ways."""
    table: dict[str, Metric] = {}
    for way in ("image_to_text", "text_to_image"):
        turned = (lambda x: x) if way == "image_to_text" else (lambda x: x.T)
        cosines, odds, wrong = (turned(x) for x in (compared.cosines, compared.odds, compared.wrong))
        found = {"image": ranks(cosines, wrong)}
        if matched:
            found["reranked"] = ranks(reranked(cosines, odds, nearest(cosines, RERANK), compared.temperature), wrong)
        for k in CUTOFFS:
            hits = {name: (rank <= k).double().numpy() for name, rank in found.items()}
            low, high = interval(lambda rows, h=hits["image"]: float(h[rows].mean()), len(cosines))
            table[f"recall@{k}/{way}"] = {
                "image": float(hits["image"].mean()),
                "reranked": float(hits["reranked"].mean()) if matched else None,
                "chance": chance(wrong, k),
                "low": low,
                "high": high,
                "n": len(cosines),
            }
    return table


def ranks(scores: Float[Tensor, "q c"], wrong: Bool[Tensor, "q c"]) -> Int[Tensor, "q"]:
    """Place of the best right candidate of each query, from 1: behind every wrong one that is not below it."""
    best = scores.masked_fill(wrong, -torch.inf).amax(1, keepdim=True)
    return 1 + (wrong & ~(scores < best)).sum(1)  # so written, NaN is against us too


def chance(wrong: Bool[Tensor, "q c"], k: int) -> float:
    """Of one right candidate or more among the first k of a random order; k / c where there is one right candidate."""
    count = wrong.shape[1]
    missed = [math.comb(number, k) / math.comb(count, k) for number in wrong.sum(1).tolist()] if k <= count else [0.0]
    return 1 - sum(missed) / len(missed)


def matching_accuracy(compared: Compared) -> Metric:
    """How often the head is right about a pair and its hard negatives, beside always the more frequent answer."""
    asked = compared.asked
    odds = compared.odds[asked.pictures, asked.texts]
    right = torch.stack([odds[0] > 0, odds[1] < 0, odds[2] < 0]) & asked.counts  # a tie is wrong
    hits, count = (x.sum(0).double().numpy() for x in (right, asked.counts))

    def accuracy(rows: np.ndarray) -> float:
        return float(hits[rows].sum() / count[rows].sum())

    everything = np.arange(len(hits))
    low, high = interval(accuracy, len(hits))
    true = len(hits) / count.sum()
    return {
        "image": accuracy(everything),
        "majority": float(max(true, 1 - true)),
        "low": low,
        "high": high,
        "n": int(count.sum()),
    }


def caption_nll(nll: dict[Control, list[tuple[float, int]]], vocabulary: int) -> Metric:
    """Nats a token of the true caption, with each control; by chance every word is alike."""
    sums = {control: np.array(each) for control, each in nll.items()}
    ratio = {c: lambda rows, s=s: float(s[rows, 0].sum() / s[rows, 1].sum()) for c, s in sums.items()}
    everything = np.arange(len(sums["image"]))
    low, high = interval(ratio["image"], len(everything))
    figures = {control: of(everything) for control, of in ratio.items()}
    return {**figures, "chance": math.log(vocabulary), "low": low, "high": high, "n": len(everything)}


def costs(compared: Compared) -> dict[str, Metric]:
    """What a query takes, embedding included and seeing excluded; reranking comes on top of the cosines."""
    count = len(compared.cosines)
    cosine = compared.cosine_seconds / (2 * count)
    k = min(RERANK, count)
    matching = k * compared.seconds / compared.pairs if compared.pairs else None
    return {
        "cost/seconds": {
            "image": cosine,
            "reranked": cosine + matching if matching is not None else None,
            "n": 2 * count,
        },
        "cost/pairs": {"image": count, "reranked": k if matching is not None else None, "n": 2 * count},
    }
