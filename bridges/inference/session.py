"""A conversation that goes on: what was read is kept, so that a turn costs only what is new in it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bridges.checkpoint import Assembled
from bridges.data.conversation import Turn, images_of
from bridges.inference.decoding import Choose, decode, greedy, room, until_end


class Session:
    """`append` a turn, `stream` the reply, and again. Each image is encoded once, each token read once.

    `turns` is what was said so far. A reply that is broken off stays in the conversation as far as it came.
    """

    def __init__(self, assembled: Assembled) -> None:
        self.assembled = assembled
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.turns: list[Turn] = []
        self._cache = self.assembled.model.language.empty_cache()
        self._read = 0  # tokens in the cache
        self._text = ""  # what those tokens, and those in `_unread`, are the text of
        self._unread: list[int] = []  # said by the assistant, not yet in the cache
        self._seen = 0  # images in the cache

    def append(self, turn: Turn) -> None:
        """Add what the user (or the system) says."""
        self.turns.append(turn)

    @torch.no_grad()
    def stream(self, max_new_tokens: int = 256, choose: Choose = greedy) -> Iterator[str]:
        """The reply, piece by piece, never splitting a character. It becomes a turn of its own when it ends.

        Raises ValueError where it does not fit the context; the conversation is then as before the last turn.
        """
        language = self.assembled.model.language
        try:
            ids, text = self._new_ids()
            room(language, self._read + len(ids), max_new_tokens)
        except ValueError:
            self.turns.pop()
            raise
        logits = self._prefill(ids)
        mask = torch.ones(1, self._read, dtype=torch.long, device=language.device)
        position = torch.tensor([self._read], device=language.device)
        said: list[int] = []
        shown = ""
        try:
            for token in decode(language, logits, mask, position, self._cache, choose):
                said.append(int(token))
                words = language.decode(until_end(said, language.end_ids))
                if not words.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield words[len(shown) :]
                    shown = words
                if said[-1] in language.end_ids or len(said) == max_new_tokens:
                    break
        finally:  # also when the listener stops listening
            self._read += len(said) - 1 if said else 0
            self._unread = said[-1:]
            self.turns.append(Turn("assistant", [shown]))
            ended = said[-1:] if said and said[-1] in language.end_ids else []
            self._text = text + shown + language.tokenizer.decode(ended)

    def _new_ids(self) -> tuple[list[int], str]:
        """What has to be read before the reply: the rendered conversation beyond what was read already."""
        template = self.assembled.template
        text, _ = template.render(self.turns, reply=True)
        if not text.startswith(self._text):  # a template that rewrites the past: read it all again
            turns = self.turns
            self.clear()
            self.turns = turns
        ids, _ = template.tokenize(text[len(self._text) :])
        return self._unread + ids, text

    def _prefill(self, ids: list[int]) -> Tensor:
        """Read new ids and the images among them into the cache; logits after the last."""
        model = self.assembled.model
        images = images_of(self.turns)[self._seen :]
        device = model.language.device
        tokens = torch.tensor([ids], device=device)
        embeds = model.embed(tokens, model.vision.preprocess(images).to(device))
        count = self._read + len(ids)
        positions = torch.arange(self._read, count, device=device)[None]
        mask = torch.ones(1, count, dtype=torch.long, device=device)
        last = (torch.zeros(1, dtype=torch.long, device=device), torch.tensor([len(ids) - 1], device=device))
        logits = model.language(embeds, mask, positions, last, self._cache)
        self._read, self._seen = count, self._seen + len(images)
        return logits
