"""Labels as a tree of tokens: what they have in common is read once, and all are scored in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.data.template import IGNORE_INDEX, Template


class Scores(NamedTuple):
    """Log-probabilities (nats) of c labels after each of b prompts, of all their tokens and for each token of them.

    The total is what the model says; the mean does not put long labels behind.
    """

    total: Float[Tensor, "b c"]
    mean: Float[Tensor, "b c"]


@dataclass(frozen=True)
class Tree:
    """Every token that follows a stem, once for all labels that begin alike; -1 is the stem.

    cat | cat nap | car nap      node       0    1    2    3
                                 token     cat  nap  car  nap
                                 parent    -1    0   -1    2
                                 paths     0 | 0 1 | 2 3
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    paths: tuple[tuple[int, ...], ...] = ()

    @property
    def inner(self) -> list[int]:
        """The nodes that something follows: only these have to be read, the others are only told."""
        return sorted(set(self.parents) - {-1})

    def ancestors(self, node: int) -> list[int]:
        """From the node itself upwards."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found


def tree_of(texts: Sequence[Sequence[int]]) -> Tree:
    """The tree of some labels' tokens."""
    nodes: dict[tuple[int, int], int] = {}  # (parent, token): node; a parent comes before what follows it
    paths = []
    for text in texts:
        path: list[int] = []
        for token in text:
            path.append(nodes.setdefault((path[-1] if path else -1, token), len(nodes)))
        paths.append(tuple(path))
    return Tree(tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes), tuple(paths))


def stem_and_tree(template: Template, text: str, labels: Sequence[str]) -> tuple[list[int], Tree]:
    """Ids that the text has in common with whatever label follows it, and the tree of what comes then.

    Text and label are tokenized together, so that a label takes the space in front of it as it does in a text.
    """
    texts, stem = [], 10**9
    for label in labels:
        ids, marks, _ = template.tokenize(text + label, [(len(text), len(text) + len(label))])
        told = [place for place, mark in enumerate(marks) if mark != IGNORE_INDEX]
        if not told:
            raise ValueError(f"the label {label!r} has no token of its own after {text[-20:]!r}; give it some letters")
        texts.append(ids)
        stem = min(stem, told[0])
    while any(ids[:stem] != texts[0][:stem] for ids in texts):
        stem -= 1
    return texts[0][:stem], tree_of([ids[stem:] for ids in texts])


def check_labels(labels: Sequence[str]) -> None:
    """ValueError for labels that are none, empty, or there twice."""
    if isinstance(labels, str) or not labels:
        raise ValueError(f"labels {labels!r}: give a list of at least one text")
    for place, label in enumerate(labels):
        if not label.strip():
            raise ValueError(f"label {place} of {len(labels)} is empty; give it some letters, or leave it out")
        if label in labels[:place]:
            raise ValueError(f"the label {label!r} is there twice; each label can be the answer once")


def scores_of(logits: Float[Tensor, "s vocab"], trees: Sequence[Tree]) -> Scores:
    """Of every label, from the logits after each text and then after each inner node of its tree."""
    # a few rows at a time stay in a CPU's cache
    everything = torch.cat([some.float().logsumexp(-1) for some in logits.split(64)]) if len(logits) else logits[:, 0]
    totals, lengths, start = [], [], 0
    for tree in trees:
        row = {node: start + 1 + place for place, node in enumerate(tree.inner)} | {-1: start}
        start += len(row)
        rows = torch.tensor([row[parent] for parent in tree.parents], device=logits.device)
        told = logits[rows, torch.tensor(tree.tokens, device=logits.device)].float() - everything[rows]
        lengths.append(torch.tensor([len(path) for path in tree.paths]))
        owner = torch.arange(len(tree.paths)).repeat_interleave(lengths[-1])
        nodes = torch.tensor([node for path in tree.paths for node in path])
        totals.append(torch.zeros(len(tree.paths), dtype=torch.double).index_add(0, owner, told.double().cpu()[nodes]))
    total = torch.stack(totals)
    return Scores(total, total / torch.stack(lengths))
