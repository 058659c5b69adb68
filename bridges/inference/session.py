"""A conversation that goes on: what was read is kept, so that a turn costs only what is new in it."""

import re
from collections.abc import Generator, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.checkpoint import Assembled
from bridges.data.conversation import Turn, images_of
from bridges.inference.decoding import Choose, decode, greedy, room, spoken
from bridges.sight import Sight


class Session:
    """`append` a turn, `stream` the reply, and again. Each image is encoded once, each token read once (once a turn
    where the language model has an encoder).

    `turns` is what was said so far. A reply that is broken off stays in the conversation as far as it came.
    """

    def __init__(self, assembled: Assembled) -> None:
        self.assembled = assembled
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.turns: list[Turn] = []
        self._features = self._encode([])  # of every image so far, in reading order
        self._reread()

    def append(self, turn: Turn) -> None:
        """Add what the user (or the system) says."""
        self.turns.append(turn)

    @torch.no_grad()
    def stream(self, max_new_tokens: int = 256, choose: Choose = greedy) -> Generator[str, None, None]:
        """The reply, a piece for each token, empty until a character is whole. At its end it becomes a turn of its own.

        Raises ValueError where it does not fit the context; the conversation is then as before the last turn.
        """
        assert self.turns, "append a turn before its reply"
        asked = len(self.turns)
        try:
            ids, looks, text = self._new_ids()
            room(self.assembled.model.language, self._read + len(ids), max_new_tokens)
            yield from self._reply(ids, looks, text, max_new_tokens, choose)
        except BaseException as error:
            if len(self.turns) == asked:  # not a word was said
                self.turns.pop()
                self._features = self._features[: len(images_of(self.turns))]
            if not isinstance(error, (GeneratorExit, ValueError)):  # amid a step: nobody knows what the cache holds
                self._reread()
            raise

    def _reply(
        self, ids: Sequence[int], looks: Sequence[int], text: str, max_new_tokens: int, choose: Choose
    ) -> Generator[str, None, None]:
        """Read the new `ids`, speak, and write down what was said. `text` is all that is then read."""
        language = self.assembled.model.language
        logits, sight = self._prefill(ids, looks)
        mask = torch.ones(1, self._read, dtype=torch.long, device=language.device)
        position = torch.tensor([self._read], device=language.device)
        said: list[int] = []
        shown = ""
        try:
            for token in decode(language, logits, mask, position, self._cache, choose, sight):
                said.append(int(token))
                piece = spoken(language, said)[len(shown) :]
                shown += piece
                yield piece
                if said[-1] in language.end_ids or len(said) == max_new_tokens:
                    break
        finally:  # also when the listener stops listening
            if said:
                self.turns.append(Turn("assistant", [shown]))
                self._looks += [self._seen] * (len(said) - 1)
                self._unread = [i for i in said[-1:] if i not in language.end_ids]  # the template prints the end itself
                self._prompt, self._said = text, shown
            if language.decode(said).endswith("\N{REPLACEMENT CHARACTER}"):  # half a character is in no turn,
                self._reread()  # so it must not be in the cache

    def _reread(self) -> None:
        """Empty the cache: the next reply begins with reading the whole conversation."""
        self._cache = self.assembled.model.language.empty_cache()
        self._looks: list[int] = []  # the last image before each token in the cache
        self._seen = 0  # images among them
        self._unread: list[int] = []  # said by the assistant, not yet in the cache
        self._prompt = self._said = ""  # what the tokens in the cache and in `_unread` are the text of

    @property
    def _read(self) -> int:
        """Tokens in the cache."""
        return len(self._looks)

    def _new_ids(self) -> tuple[list[int], list[int], str]:
        """What has to be read before the reply, the last image before each token of it, and the whole conversation as
        text, which begins with what was read."""
        template = self.assembled.template
        text, _ = template.render(self.turns, reply=True)
        # A template may put a space before the words of a turn that the first of them took with it in the reply.
        keeps = self._prompt and not self.assembled.model.language.has_encoder
        known = re.match(f"{re.escape(self._prompt)} *{re.escape(self._said)}", text) if keeps else None
        if known is None:  # nothing was read that can be kept, or the template rewrites the past
            self._reread()
        ids, _, looks = template.tokenize(text[known.end() if known else 0 :])
        looks = [self._seen + look for look in [0] * len(self._unread) + looks]
        return self._unread + ids, looks, text

    def _prefill(self, ids: Sequence[int], looks: Sequence[int]) -> tuple[Float[Tensor, "1 vocab"], Sight | None]:
        """Read new ids and the images among them into the cache; logits after the last, and what is seen from there."""
        model = self.assembled.model
        device = model.language.device
        images = images_of(self.turns)
        self._features = torch.cat([self._features, self._encode(images[len(self._features) :])])
        first = 0 if model.bridge.blocks else self._seen  # blocks look at old images too
        slots, memory = model.see(
            features=self._features[first:], asked=self.assembled.template.asked(self.turns)[first:]
        )
        embeds = model.embed(torch.tensor([ids], device=device), slots[self._seen - first :])
        count = self._read + len(ids)
        every = torch.tensor([[*self._looks, *looks]], device=device)
        sight = model.sight(memory, every, torch.zeros_like(every))
        positions = torch.arange(self._read, count, device=device)[None]
        mask = torch.ones(1, count, dtype=torch.long, device=device)
        last = (torch.zeros(1, dtype=torch.long, device=device), torch.tensor([len(ids) - 1], device=device))
        new = sight.of(slice(self._read, None)) if sight else None
        logits = model.language(embeds, mask, positions, last, self._cache, new)
        self._looks, self._seen = every[0].tolist(), len(images)
        return logits, sight.of(slice(-1, None)) if sight else None

    def _encode(self, images: Sequence[Image.Image]) -> Float[Tensor, "n p v"]:
        model = self.assembled.model
        return model.vision(model.vision.preprocess(images).to(model.language.device))
