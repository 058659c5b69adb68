"""Scores of captions, object names and answers, and how sure they are. No model, no torch.

A metric gives numbers image by image (i) first, then one function makes a figure of them: a bootstrap only sums rows.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence, Set

import numpy as np
from jaxtyping import Float, Int

_CLITIC = r"(?:s|re|ve|ll|d|m)\b"
_WORD = re.compile(rf"'{_CLITIC}|\d+(?:[.,:]\d+)+|\w+(?:(?:-|'(?!{_CLITIC}))\w+)*")
_ORDERS = (1, 2, 3, 4)

Ngram = tuple[str, ...]


def tokenize(text: str) -> list[str]:
    """Lower-case words without punctuation, a simple PTB tokenizer: "The dog's T-shirt." is the | dog | 's | t-shirt.

    Kept whole: hyphenated words, numbers such as 3.5 and 10:30, negations (PTB: do|n't). Symbols (&, $, %) are dropped.
    Tokenizing the joined words again changes nothing.
    """
    return _WORD.findall(text.lower().replace("’", "'"))


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "i"]:
    """CIDEr-D of every image, 0 to 10 (Vedantam et al. 2015; n = 1…4, σ = 6); their mean is the corpus score.

    Words that are rare in this corpus' references count most, so the scores of two corpora cannot be compared, and
    a corpus of one image scores 0. Raises ValueError: lengths differ, or an image has no reference.
    """
    _check(candidates, references)
    ours = [tokenize(text) for text in candidates]
    theirs = [[tokenize(text) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in theirs for ngram in set().union(*map(_ngrams, texts)))
    rarity = {ngram: math.log(len(theirs) / count) for ngram, count in frequency.items()}
    unseen = math.log(max(len(theirs), 1))

    def weigh(words: list[str]) -> list[dict[Ngram, float]]:
        weights: list[dict[Ngram, float]] = [{} for _ in _ORDERS]
        for ngram, count in _ngrams(words).items():
            weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, unseen)
        return weights

    scores = []
    for words, texts in zip(ours, theirs, strict=True):
        weights = weigh(words)
        lengths = [math.exp(-((len(words) - len(text)) ** 2) / (2 * 6.0**2)) for text in texts]
        similar = [_similarity(weights, weigh(text)) * close for text, close in zip(texts, lengths, strict=True)]
        scores.append(10 * sum(similar) / len(texts))
    return np.array(scores, dtype=np.float64)


def _similarity(ours: list[dict[Ngram, float]], theirs: list[dict[Ngram, float]]) -> float:
    """Cosine of two sentences, averaged over the orders; a candidate gains nothing from repeating a word (the -D)."""
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        norm = math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))
        if norm:
            total += sum(min(weight, b[ngram]) * b[ngram] for ngram, weight in a.items() if ngram in b) / norm
    return total / len(_ORDERS)


def bleu_counts(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Int[np.ndarray, "i 10"]:
    """What BLEU-4 needs of every image: its length, the closest reference's length, matched n-grams (4), n-grams (4).

    Raises ValueError: lengths differ, or an image has no reference.
    """
    _check(candidates, references)
    rows = []
    for candidate, texts in zip(candidates, references, strict=True):
        words, others = tokenize(candidate), [tokenize(text) for text in texts]
        counts, best = _ngrams(words), Counter[Ngram]()
        for other in others:
            best |= _ngrams(other)
        closest = min((len(other) for other in others), key=lambda length: (abs(length - len(words)), length))
        matched, total = [0] * 4, [0] * 4
        for ngram, count in counts.items():
            matched[len(ngram) - 1] += min(count, best[ngram])
            total[len(ngram) - 1] += count
        rows.append([len(words), closest, *matched, *total])
    return np.array(rows, dtype=np.int64).reshape(-1, 10)


def bleu(counts: Int[np.ndarray, "i 10"]) -> float:
    """Corpus BLEU-4 with brevity penalty, 0 to 1, from `bleu_counts` (Papineni et al. 2002, section 2; unsmoothed)."""
    length, closest, *ngrams = counts.sum(0).tolist()
    matched, total = ngrams[:4], ngrams[4:]
    if not all(matched):
        return 0.0
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / 4)
    return precision * math.exp(min(0.0, 1 - closest / length))


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4, 0 to 1. Raises ValueError as `bleu_counts` does."""
    return bleu(bleu_counts(candidates, references))


def naming(predicted: Sequence[Set[str]], true: Sequence[Set[str]]) -> Int[np.ndarray, "i 3"]:
    """Objects of every image: named and there, named, there. Raises ValueError: lengths differ."""
    _same_length(predicted, true)
    rows = [[len(named & there), len(named), len(there)] for named, there in zip(predicted, true, strict=True)]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def f1(counts: Int[np.ndarray, "i 3"]) -> float:
    """Micro F1 over all images, 0 to 1, from `naming`; 0 where nothing is named and nothing is there."""
    both, named, there = counts.sum(0).tolist()
    return 2 * both / max(named + there, 1)


def normalize(answer: str) -> str:
    """An answer as accuracy compares it: lower case, no articles, no punctuation at the end, single spaces."""
    words = answer.lower().strip().rstrip(".!?,;: ").split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def accuracy(predicted: Sequence[str], true: Sequence[str]) -> Float[np.ndarray, "i"]:
    """1 where the normalized answers are equal, else 0; accuracy is their mean. Raises ValueError: lengths differ."""
    _same_length(predicted, true)
    return np.array([normalize(a) == normalize(b) for a, b in zip(predicted, true, strict=True)], dtype=np.float64)


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first in the alphabet among equals. Raises ValueError: there is none."""
    if not answers:
        raise ValueError("no answers to take the majority of: give at least one")
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def interval(
    statistic: Callable[[Int[np.ndarray, "i"]], float], n: int, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap over n images (Efron 1979): low and high of a statistic of row indices.

    `interval(lambda rows: bleu(counts[rows]), len(counts))`; CIDEr keeps the rarity of words of the whole corpus.
    Raises ValueError: no image.
    """
    if n < 1:
        raise ValueError(f"no interval over {n} images: give at least one")
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _ngrams(words: list[str]) -> Counter[Ngram]:
    return Counter(tuple(words[i : i + n]) for n in _ORDERS for i in range(len(words) - n + 1))


def _same_length(predicted: Sequence[object], true: Sequence[object]) -> None:
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} images: give one for each, in the same order")


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _same_length(candidates, references)
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"image {i} has references {texts!r}: give a list of at least one sentence")
