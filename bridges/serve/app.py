"""OpenAI's interface for chats: what goes over HTTP, and in which form."""

import asyncio
from contextlib import suppress
from secrets import compare_digest, randbits
from time import time
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bridges.inference.sampling import sampler
from bridges.serve.answer import Answer, told
from bridges.serve.body import Refused, parse, turns_of
from bridges.serve.engine import Engine, Job

BODY_BYTES = 32 * 2**20
BODY_SECONDS = 60


class Api:
    """The addresses of a server for one model, known to clients as `name`. With a `token`, all but /health ask for it.

    Pictures that stand somewhere else in the web are fetched only if `remote`.
    """

    def __init__(self, engine: Engine, name: str, token: str | None = None, remote: bool = False) -> None:
        self.engine, self.name, self.token, self.remote = engine, name, token, remote
        self.began = int(time())
        self.opening = asyncio.Semaphore(4)  # requests whose pictures are opened: each takes much memory then

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        told: dict[Any, Any] = {
            ValueError: refusal,
            HTTPException: no_such_address,
            ClientDisconnect: nobody_listens,
            Exception: broken,
        }
        return Starlette(routes=routes, exception_handlers=told)

    async def health(self, _: Request) -> Response:
        alive = self.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._admit(request)
        self._known(request.path_params["name"])
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        """The answer as one JSON, or as it comes; a client that hangs up stops it."""
        self._admit(request)
        data = await received(request)
        async with self.opening:
            body = await run_in_threadpool(parse, data)
            self._known(body.model)
            turns = await run_in_threadpool(turns_of, body.messages, self.remote)
        seed = randbits(63) if body.seed is None else body.seed
        job = Job(turns, sampler(body.temperature, body.top_p, seed), body.longest, body.stop)
        self.engine.submit(job)
        listening = asyncio.create_task(until_hung_up(request, job))
        event = await job.events.get()  # a refusal has its status only before the first piece
        if isinstance(event, ValueError):
            listening.cancel()
            raise event
        answer = Answer(self.name, body, job, event)
        if body.stream:
            return StreamingResponse(answer.lines(listening), media_type="text/event-stream")
        return JSONResponse(await answer.whole(listening))

    def _admit(self, request: Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1")
        if not compare_digest(given, f"Bearer {self.token}".encode()):
            raise Refused("this server wants its token: Authorization: Bearer TOKEN", 401, "invalid_api_key")

    def _known(self, name: str) -> None:
        if name != self.name:
            raise Refused(f"no model {name[:100]!r} here, only {self.name!r}", 404, "model_not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.began, "owned_by": "bridges"}


async def received(request: Request) -> bytes:
    """The body. One that is too long is read to its end, and forgotten: else its sender would not hear why."""
    size, data = 0, bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= BODY_BYTES:
                    data += piece
    except TimeoutError:
        raise Refused(f"the body took longer than {BODY_SECONDS} s", 408) from None
    if size > BODY_BYTES:
        raise Refused(f"a body of {size} bytes: at most {BODY_BYTES} are read; use fewer or smaller pictures", 413)
    return bytes(data)


async def until_hung_up(request: Request, job: Job) -> None:
    """Nobody listens then, and nothing more is to be said."""
    with suppress(asyncio.CancelledError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.stopped = True


def refusal(_: Request, error: ValueError) -> Response:
    return JSONResponse(told(error), error.status if isinstance(error, Refused) else 400)


def no_such_address(request: Request, error: HTTPException) -> Response:
    return refusal(request, Refused(f"{request.method} {request.url.path}: {error.detail}", error.status_code))


def broken(request: Request, error: Exception) -> Response:
    """Our own fault; the log has the rest."""
    return refusal(request, Refused(f"the server failed: {type(error).__name__}", 500))


def nobody_listens(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=499)
