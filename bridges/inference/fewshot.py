"""Few-shot prompting: demonstrations are read once, and a query that follows them costs only what is new in it.

Flamingo (arXiv 2204.14198, section 2.5). OpenFlamingo (2308.01390) scores labels one token at a time; here they are a
tree, and one pass. It works for every bridge, whether it fills slots or is read by blocks inside the language model.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf

import torch

from bridges.build import Assembled
from bridges.data.batch import collate, pack
from bridges.data.template import IGNORE_INDEX, Encoded
from bridges.inference.decoding import begin, room, say, until_end
from bridges.inference.features import Features
from bridges.inference.lines import lay, parts
from bridges.inference.prompts import Plain, Prompt, follow, join
from bridges.inference.reading import Kept, begin_after, keep, read
from bridges.inference.scoring import Scores, Tree, check_labels, scores_of
from bridges.objectives.language import target_nll

LINE = 256  # columns of a line
AT_ONCE = 2048  # columns of lines that are read side by side

Ended = Callable[[Sequence[int]], bool]


def complete(
    assembled: Assembled,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 32,
    stop: str | Sequence[str] = (),
    features: Features | None = None,
) -> list[str]:
    """What follows prompts such as `["This is a cat.", picture, "This is a", other, "This is"]`; see FewShot."""
    return FewShot(assembled, features=features).complete(prompts, max_new_tokens, stop)


def score(
    assembled: Assembled, prompts: Sequence[Prompt], labels: Sequence[str], features: Features | None = None
) -> Scores:
    """Log-probabilities of labels after each prompt; see FewShot."""
    return FewShot(assembled, features=features).score(prompts, labels)


class FewShot:
    """Answers queries that follow the same demonstrations, `shots`, or none: then each query brings its own.

    Every text is read once and every picture encoded once, however many queries come, in one call or in several;
    `features` may be shared with others. `batch` prompts are answered at once, or as many queries after what is kept
    as take no more room. Answers are as if each prompt was read alone and from its beginning, which is what happens
    without `reuse`, and where the language model cannot share a beginning.
    """

    def __init__(
        self,
        assembled: Assembled,
        shots: Sequence[Prompt] = (),
        features: Features | None = None,
        batch: int = 32,
        reuse: bool = True,
    ) -> None:
        self.model, self.batch, self.reuse = assembled.model, batch, reuse
        self.plain, self.features = Plain(assembled), features or Features(assembled)
        self.shots = [self.plain.encode(shot, first=not place, last=False) for place, shot in enumerate(shots)]
        self._kept: Kept | None = None

    @torch.no_grad()
    def complete(
        self, queries: Sequence[Prompt], max_new_tokens: int = 32, stop: str | Sequence[str] = ()
    ) -> list[str]:
        """What follows each query, up to the end token or a `stop` text, which is cut off; greedy.

        Raises ValueError where a prompt is empty or does not fit the context; how many demonstrations would is said.
        """
        stops = [stop] if isinstance(stop, str) else list(stop)
        if "" in stops:
            raise ValueError("a stop text is empty; give it a character, such as a line break, or leave it out")
        texts = [self.plain.encode(query, first=not self.shots) for query in queries]
        self._fit(texts, max_new_tokens)
        texts, kept = self._after_shots(texts, max_new_tokens)
        said: list[list[int]] = []
        sizes = [len(text.ids) for text in texts]
        for part in parts(sizes, self._abreast(max(sizes, default=1) + max_new_tokens, kept), inf):
            said += self._say(texts[part], kept, max_new_tokens, lambda ids: self._ended(ids, stops))
        return [self._words(ids, stops) for ids in said]

    @torch.no_grad()
    def score(self, queries: Sequence[Prompt], labels: Sequence[str]) -> Scores:
        """How likely each of the labels follows each query, in one pass over the tree of their tokens.

        Raises ValueError for labels that are empty or there twice, and for prompts as `complete`.
        """
        check_labels(labels)
        grown = [self.plain.with_labels(query, labels, first=not self.shots) for query in queries]
        texts, trees = [text for text, _ in grown], [tree for _, tree in grown]
        self._fit(texts, max((len(path) for tree in trees for path in tree.paths), default=1))
        texts, kept = self._after_shots(texts, max((len(tree.inner) for tree in trees), default=0))
        sizes = [len(text.ids) + len(tree.inner) for text, tree in zip(texts, trees, strict=True)]
        in_line = self.model.language.shares(max(sizes, default=0) + (len(kept) if kept else 0))
        found = [Scores(*(torch.zeros(0, len(labels), dtype=torch.double) for _ in range(2)))]
        for part in parts(sizes, self.batch, AT_ONCE if in_line else inf):
            scored = self._score_in_lines if in_line else self._score_in_rows
            found.append(scored(texts[part], trees[part], kept))
        return Scores(*(torch.cat(each) for each in zip(*found, strict=True)))

    def check(self, queries: Sequence[Prompt], wanted: int) -> None:
        """ValueError unless the demonstrations, each of the queries and `wanted` more tokens fit the context."""
        self._fit([self.plain.encode(query, first=not self.shots) for query in queries], wanted)

    def _fit(self, texts: Sequence[Encoded], wanted: int) -> None:
        language, lengths = self.model.language, [len(shot.ids) for shot in self.shots]
        longest = max((len(text.ids) for text in texts), default=0)
        if self.shots and language.context is not None and sum(lengths) + longest + wanted > language.context:
            fit = sum(length <= language.context - longest - wanted for length in accumulate(lengths))
            raise ValueError(
                f"{len(lengths)} demonstrations of {sum(lengths)} tokens, a query of {longest} and an answer of "
                f"{wanted} exceed the {language.context} positions that {language.name} knows; {fit} of them fit"
            )
        for text in texts:
            room(language, len(text.ids), wanted)

    def _after_shots(self, texts: list[Encoded], more: int) -> tuple[list[Encoded], Kept | None]:
        """Texts to read after what is kept of the demonstrations; or with them in front, where nothing is kept."""
        if not self.shots or not texts:
            return texts, None
        joined = [join([*self.shots, text]) for text in texts]
        shares = self.model.language.shares(max(len(text.ids) for text in joined) + more)
        if not shares or not self.reuse or not any(shot.ids for shot in self.shots):
            return joined, None
        self._kept = self._kept or keep(self.model, self.features, join(self.shots))
        return texts, self._kept

    def _abreast(self, own: int, kept: Kept | None) -> int:
        """How many texts of at most `own` tokens are read and answered side by side.

        What is kept is there once, not `batch` times, and leaves its room to more of them: where reading the weights
        takes longest, twice as many take little longer.
        """
        return self.batch * ((len(kept) if kept else 0) + own) // own

    def _left(self, kept: Kept | None) -> int | float:
        """Columns that a line may have after what is kept, so that it is not longer than a window."""
        window = self.model.language.window
        return inf if window is None else window - (len(kept) if kept else 0)

    def _say(self, texts: Sequence[Encoded], kept: Kept | None, longest: int, ended: Ended) -> list[list[int]]:
        """What follows each text. With nothing reused rows that have ended are read on, as elsewhere."""
        if kept:
            begun = begin_after(self.model, self.features, texts, kept)
        else:
            pictures = [image for text in texts for image in text.images]
            begun = begin(self.model, texts, self.features(pictures), longest)
        return say(self.model.language, begun, longest, ended, drop=self.reuse)

    def _ended(self, ids: Sequence[int], stops: Sequence[str]) -> bool:
        language = self.model.language
        return ids[-1] in language.end_ids or (bool(stops) and any(stop in language.decode(ids) for stop in stops))

    def _words(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        """Of an answer, without the space that its first token takes with it, or half a character at its end."""
        words = self.model.language.decode(until_end(ids, self.model.language.end_ids))
        cut = min((words.find(stop) for stop in stops if stop in words), default=len(words))
        return words[:cut].lstrip(" ").rstrip("\N{REPLACEMENT CHARACTER}")

    def _score_in_lines(self, texts: Sequence[Encoded], trees: Sequence[Tree], kept: Kept | None) -> Scores:
        lines = lay(texts, trees, len(kept) if kept else 0, self.features.device, min(LINE, self._left(kept)))
        return scores_of(read(self.model, self.features, texts, lines, kept).logits, trees)

    def _score_in_rows(self, texts: Sequence[Encoded], trees: Sequence[Tree], kept: Kept | None) -> Scores:
        """A row for each label, where texts cannot share one."""
        assert kept is None
        totals, lengths = [], []
        for text, tree in zip(texts, trees, strict=True):
            rows = [pack([follow(text, [tree.tokens[node] for node in path])]) for path in tree.paths]
            lengths.append(torch.tensor([len(path) for path in tree.paths]))
            for start in range(0, len(rows), self.batch):
                batch = collate(rows[start : start + self.batch]).to(self.features.device)
                batch.features = self.features(text.images * len(batch.labels))
                whose = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)[0].cpu()
                told = -target_nll(self.model, batch).double().cpu()
                totals.append(torch.zeros(len(batch.labels), dtype=torch.double).index_add(0, whose, told))
        total, length = torch.cat(totals).view(len(texts), -1), torch.stack(lengths)
        return Scores(total, total / length)
