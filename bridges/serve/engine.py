"""One thread that answers everyone: a token each in turn for those who are being answered; the others queue."""

import asyncio
import logging
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

from bridges.build import Assembled
from bridges.data.conversation import Turn, images_of
from bridges.inference.decoding import Choose, room
from bridges.inference.features import Features
from bridges.inference.looking import Looker
from bridges.inference.plan import Spent
from bridges.inference.session import Session
from bridges.serve.body import Refused

LONGEST = 1024
"""Tokens of an answer whose length nobody gave; fewer where the context has no room for them."""
WAITING = 256
"""Requests that may stand in the queue: each holds its pictures."""

log = logging.getLogger(__name__)

Event = str | Spent | ValueError
"""A piece of the answer; its end; or what came in between, which is the end too."""


@dataclass(eq=False)
class Job:
    """A conversation that waits for its reply. `events` are filled by the engine, on the `loop` of who listens.

    Whoever no longer listens sets `stopped`.
    """

    turns: list[Turn]
    choose: Choose
    longest: int | None = None
    stops: Sequence[str] = ()
    stopped: bool = False
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def tell(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server was stopped meanwhile
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Talk(NamedTuple):
    """A reply in the making."""

    job: Job
    session: Session
    pieces: Generator[str, None, None]


class Engine:
    """Answers jobs in the order in which they come, `most` of them at once, a token each in turn.

    As many conversations are kept in memory at once: those that are being answered and, of the others, the latest.
    A new one goes on from the one with which it shares most of its beginning; what they share is not read again.
    """

    def __init__(self, assembled: Assembled, most: int = 8) -> None:
        if most < 1:
            raise ValueError(f"{most} conversations at once: at least 1 is needed to answer anyone")
        self.assembled, self.most = assembled, most
        self.looker = Looker(
            assembled, Features(assembled, keep=False)
        )  # else it would hold every picture there ever was
        self.resting: list[Session] = []
        self.speaking: deque[Talk] = deque()
        self.closing = False
        self._waiting: SimpleQueue[Job | None] = SimpleQueue()
        self.thread = Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Refused where too many wait, or the server is being stopped."""
        if self.closing or not self.thread.is_alive():
            raise Refused("the server is being stopped", 503)
        if self._waiting.qsize() >= WAITING:
            raise Refused(f"{WAITING} requests are waiting already; try again later", 503)
        self._waiting.put(job)

    def close(self) -> None:
        """Break off every answer; whoever waits is told."""
        self.closing = True
        self._waiting.put(None)

    def _run(self) -> None:
        while not self.closing:
            while len(self.speaking) < self.most and (job := self._next()):
                self._begin(job)
            if self.speaking:
                self._go_on(self.speaking.popleft())
        stopping = Refused("the server is being stopped", 503)
        for talk in self.speaking:
            talk.job.tell(stopping)
        while not self._waiting.empty():
            if job := self._waiting.get():
                job.tell(stopping)

    def _next(self) -> Job | None:
        """The next in the queue, if there is one; waits for one where there is nothing else to do."""
        try:
            return self._waiting.get(block=not self.speaking)
        except Empty:
            return None

    def _begin(self, job: Job) -> None:
        try:
            if job.stopped:
                raise Refused("nobody waits for the answer any more")
            session, longest = self._session(job)
        except Exception as error:
            job.tell(self._explained(error))
            return
        session.turns = list(job.turns)
        self.speaking.append(Talk(job, session, session.stream(longest, job.choose, job.stops)))
        self._forget_the_oldest()

    def _session(self, job: Job) -> tuple[Session, int]:
        """The one that knows most of a conversation, and how long the answer may be.

        Where it would have to forget something for it, another one that begins like it. Raises ValueError where the
        answer does not fit.
        """
        sessions = [Session(self.assembled, self.looker), *self.resting]
        known = [session.known(job.turns) for session in sessions]
        place = max(range(len(sessions)), key=lambda place: known[place].kept)
        session, (size, kept, lost) = sessions[place], known[place]
        language = self.assembled.model.language
        longest = job.longest or (
            LONGEST if language.context is None else max(1, min(LONGEST, language.context - size))
        )
        try:
            room(language, size, longest)
        except ValueError as error:
            raise Refused(str(error), code="context_length_exceeded") from None
        if 0 < lost < kept:  # most of it is in its fork too: it is the first that may be forgotten
            self.resting.insert(0, self.resting.pop(place - 1))
        if lost:
            return session.fork(), longest
        if place:
            self.resting.remove(session)
        return session, longest

    def _go_on(self, talk: Talk) -> None:
        """The next token of a reply, or its end."""
        job, session, pieces = talk
        end: Event | None = None
        try:
            if not job.stopped:
                job.tell(next(pieces))
                self.speaking.append(talk)
                return
            pieces.close()
        except StopIteration:
            log.info("%s", told(job, session.spent))
        except Exception as error:
            end = self._explained(error)
        if job.stopped:
            log.info("hung up after %d tokens", session.spent.said)
        if end is None and session.spent.said:
            self.resting.append(session)
            self._forget_the_oldest()
        job.tell(end or session.spent)  # last of all: the next message may follow at once

    def _forget_the_oldest(self) -> None:
        del self.resting[: max(0, len(self.resting) + len(self.speaking) - self.most)]

    def _explained(self, error: Exception) -> ValueError:
        """For the one who asked; what is not their fault goes to the log too, and the server lives on."""
        if isinstance(error, ValueError):
            log.info("refused: %s", " ".join(str(error).split()))
            return error
        log.error("an answer failed; every conversation is forgotten", exc_info=error)
        self.resting.clear()  # it may have been the memory
        return Refused(f"the answer failed: {type(error).__name__}", 500)


def told(job: Job, spent: Spent) -> str:
    """One line about an answer."""
    what = f"{len(job.turns)} messages, {len(images_of(job.turns))} pictures"
    tokens = f"{spent.kept} tokens known, {spent.read} read, {spent.said} said{'' if spent.ended else ' (cut)'}"
    return f"{what}: {tokens}; first after {spent.first:.2f} s, {spent.seconds:.2f} s in all"
