"""A conversation that goes on: what was read is kept, so that a turn costs only what is new in it."""

from collections.abc import Generator, Sequence
from copy import copy
from math import inf
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from bridges.build import Assembled
from bridges.data.conversation import Turn, images_of
from bridges.inference.decoding import Choose, cut, decode, greedy, held, room, spoken, until_end
from bridges.inference.looking import Looker, Seen
from bridges.inference.memory import Mark, Memory, same
from bridges.inference.plan import Known, Plan, Spent
from bridges.sight import Sight, sight_of_one
from bridges.towers.precision import for_few_tokens

SLACK = 0.75
"""Of the context is left filled when the oldest turns are dropped, so that the next turn need not drop again."""


class Session:
    """`append` a turn, `stream` the reply, and again. Each picture is encoded once, each token read once (once a turn
    where the language model has an encoder).

    `turns` is what was said so far, and may be changed: the next reply keeps as much of what was read as is still
    true. A reply that is broken off stays as far as it came. Where the context is full the oldest turns are no longer
    read, `dropped` of them after the system's; their pictures are, in front of the next turn. `spent` is what the last
    reply cost.
    """

    def __init__(self, assembled: Assembled, looker: Looker | None = None) -> None:
        self.assembled, self.looker = assembled, looker or Looker(assembled)
        for_few_tokens(assembled.model.language.model)
        self.clear()

    def clear(self) -> None:
        """Forget everything but what the tower saw."""
        self.turns: list[Turn] = []
        self.dropped = 0
        self.spent = Spent()
        self._memory = Memory(self.assembled.model.language)

    def append(self, turn: Turn) -> None:
        """Add what the user (or the system) says."""
        self.turns.append(turn)

    def undo(self) -> list[Turn]:
        """Take back the last message and what was said to it. ValueError where there is none."""
        asked = [place for place, turn in enumerate(self.turns) if turn.role == "user"]
        if not asked:
            raise ValueError("there is nothing to take back: nothing was said")
        taken, self.turns[asked[-1] :] = self.turns[asked[-1] :], []
        return taken

    def fork(self) -> "Session":
        """Another conversation that begins like this one; nothing is read twice, and neither changes the other."""
        other = copy(self)
        other.turns, other._memory = list(self.turns), self._memory.fork()
        return other

    def regenerate(
        self, max_new_tokens: int = 256, choose: Choose = greedy, stops: Sequence[str] = ()
    ) -> Generator[str, None, None]:
        """`stream` another reply instead of the last one, which stays where not a word comes of it."""
        if not self.turns or self.turns[-1].role != "assistant":
            raise ValueError("there is no answer to give anew")
        before = list(self.turns)
        self.turns.pop()
        try:
            yield from self.stream(max_new_tokens, choose, stops)
        finally:
            if len(self.turns) < len(before):
                self.turns[:] = before

    @torch.no_grad()
    def stream(
        self, max_new_tokens: int = 256, choose: Choose = greedy, stops: Sequence[str] = ()
    ) -> Generator[str, None, None]:
        """The reply, a piece for each token, empty until a character is whole and is not the beginning of one of
        `stops`, before which it ends. At its end it becomes a turn of its own.

        Raises ValueError where the last turn alone does not fit the context; the conversation is then as before it.
        """
        assert self.turns, "append a turn before its reply"
        asked, began = len(self.turns), perf_counter()
        encoded, hits = self.looker.features.encoded, self.looker.hits
        try:
            plan = self._fitting(max_new_tokens)
            self.spent = Spent(len(plan.ids), plan.mark.read)
            logits, seen = self._read_new(plan)
            if plan.ids:
                self._memory.mark(Mark(plan.text, "", plan.size, (), plan.keys, logits))
            self.spent.encoded = self.looker.features.encoded - encoded
            self.spent.reused = self.looker.hits - hits
            for piece in self._reply(plan, logits, seen, max_new_tokens, choose, stops):
                self.spent.said += 1
                self.spent.seconds = perf_counter() - began
                self.spent.first = self.spent.first or self.spent.seconds
                yield piece
        except BaseException as error:
            if len(self.turns) == asked:  # not a word was said
                self.turns.pop()
            if not isinstance(error, (GeneratorExit, ValueError)):  # amid a step: nobody knows what the cache holds
                self._memory.forget()
            raise

    @torch.no_grad()
    def read_ahead(self) -> int:
        """Read what the next message begins with whatever it says, while nobody waits: the template's words before it.
        How many tokens that were.

        None where the words cannot be told from the message, where the context is full, and where the model could not
        forget them again, as it does when the talk goes on otherwise.
        """
        language, turns = self.assembled.model.language, self.turns_read()
        try:
            one, other = (self._plan([*turns, Turn("user", [words])]) for words in ("A", "1"))
        except ValueError:  # the template refuses any next message, and says so when there is one
            return 0
        count = same(one.ids, other.ids) if one.mark.read == other.mark.read else 0
        ahead = one._replace(ids=one.ids[:count], looks=one.looks[:count])
        full = language.context is not None and one.size >= language.context
        forgets = language.has_encoder or not self._memory.can_roll_back(ahead.size)
        if full or forgets or ahead.looks[-1:] != [len(one.keys)]:
            return 0
        try:
            self._read_new(ahead)
        except BaseException:  # amid a step: nobody knows what the cache holds
            self._memory.forget()
            raise
        return count

    def size(self) -> int:
        """Tokens that the language model reads of the conversation, if a reply is to follow."""
        return self._plan(self.turns_read()).size if self.turns else 0

    def known(self, turns: Sequence[Turn]) -> Known:
        """What it would take to answer another conversation here."""
        plan = self._plan(turns)
        return Known(plan.size, plan.mark.read, len(self._memory.looks) - plan.mark.read)

    def turns_read(self, dropped: int | None = None) -> list[Turn]:
        """Without the first turns of the talk, `dropped` by default, but with their pictures."""
        dropped, talk = self.dropped if dropped is None else dropped, self._talk()
        if not 0 < dropped < len(talk):
            return list(self.turns)
        first, *others = talk[dropped:]
        first = Turn(first.role, [*images_of(talk[:dropped]), *first.content])
        return [*self.turns[: len(self.turns) - len(talk)], first, *others]

    def _fitting(self, wanted: int) -> Plan:
        """What to read, so that there is room for the answer; leaves out the oldest turns where there is none."""
        language = self.assembled.model.language
        starts = [place for place, turn in enumerate(self._talk()) if turn.role == "user"]
        self.dropped = self.dropped if self.dropped in starts else 0
        context, plans = language.context, {self.dropped: self._plan(self.turns_read())}
        if context is not None and plans[self.dropped].size + wanted > context:
            later = [start for start in starts if start > self.dropped]
            plans = {start: self._plan(self.turns_read(start)) for start in later} or plans
        limits = [share * (context or inf) for share in (SLACK, 1.0)]
        fits = [start for limit in limits for start, plan in plans.items() if plan.size + wanted <= limit]
        start = fits[0] if fits else max(plans)
        room(language, plans[start].size, wanted)
        self.dropped = start
        return plans[start]

    def _talk(self) -> list[Turn]:
        """All but what the system says first."""
        return self.turns[bool(self.turns) and self.turns[0].role == "system" :]

    def _plan(self, turns: Sequence[Turn]) -> Plan:
        """Of a conversation, as far as it is to be read."""
        template = self.assembled.template
        keys = tuple(self.looker.keys(template.images(turns), template.asked(turns)))
        text, _ = template.render(turns, reply=True)
        mark, end = self._memory.latest(text, keys)
        ids, _, looks = template.tokenize(text[end:])
        ids, looks = [*mark.unread, *ids], [len(mark.keys) + look for look in [0] * len(mark.unread) + looks]
        further = self._memory.further(mark, ids, looks, keys)
        new = slice(further.read - mark.read, None)
        return Plan(further, ids[new], looks[new], text, list(turns), keys)

    def _read_new(self, plan: Plan) -> tuple[Float[Tensor, "1 vocab"], Seen]:
        """Roll back, read new ids and the pictures among them; logits after the last, and what is seen of all."""
        model, mark, device = self.assembled.model, plan.mark, self.assembled.model.language.device
        self._memory.roll_back(mark)
        seen = self.looker(self.assembled.template.images(plan.turns), plan.keys)
        if mark.logits is not None:
            return mark.logits, seen
        embeds = model.embed(torch.tensor([plan.ids], device=device), seen.slots[len(mark.keys) :])
        positions = torch.arange(mark.read, plan.size, device=device)[None]
        mask = torch.ones(1, plan.size, dtype=torch.long, device=device)
        last = (torch.zeros(1, dtype=torch.long, device=device), torch.tensor([len(plan.ids) - 1], device=device))
        logits = model.language(embeds, mask, positions, last, self._memory.cache, self._sight(seen, plan.looks))
        self._memory.add(plan.ids, plan.looks, plan.keys)
        return logits, seen

    def _reply(
        self,
        plan: Plan,
        logits: Float[Tensor, "1 vocab"],
        seen: Seen,
        longest: int,
        choose: Choose,
        stops: Sequence[str],
    ) -> Generator[str, None, None]:
        """Speak, and write down what was said."""
        language = self.assembled.model.language
        mask = torch.ones(1, plan.size, dtype=torch.long, device=language.device)
        position = torch.tensor([plan.size], device=language.device)
        sight = self._sight(seen, [len(plan.keys)])
        said: list[int] = []
        shown = ""
        try:
            for token in decode(language, logits, mask, position, self._memory.cache, choose, sight):
                said.append(int(token))
                whole = spoken(language, said)
                words = cut(whole, stops)
                self.spent.ended = said[-1] in language.end_ids or words != whole
                last = self.spent.ended or len(said) == longest
                piece = words[len(shown) : None if last else len(words) - held(words, stops)]
                shown += piece
                yield piece
                if last:
                    break
        finally:  # also when the listener stops listening
            if said:
                self._write_down(plan, said, shown)

    def _write_down(self, plan: Plan, said: Sequence[int], shown: str) -> None:
        """A turn, and a mark after as many of the ids as say just that: half a character is in no turn, for one."""
        language = self.assembled.model.language
        self.turns.append(Turn("assistant", [shown]))
        self._memory.add(said[:-1], [len(plan.keys)] * (len(said) - 1), plan.keys)
        ids = until_end(said, language.end_ids)  # the template prints the end itself
        for count in range(len(ids), -1, -1):
            if language.decode(ids[:count]).lstrip(" ") == shown:
                read = min(count, len(said) - 1)
                self._memory.mark(Mark(plan.text, shown, plan.size + read, tuple(ids[read:count]), plan.keys))
                break

    def _sight(self, seen: Seen, looks: Sequence[int]) -> Sight | None:
        """What tokens see that look at these pictures."""
        model = self.assembled.model
        if not model.bridge.blocks:
            return None
        return sight_of_one(model.bridge, seen.kept, torch.tensor([looks], device=model.language.device))
