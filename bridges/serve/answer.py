"""An answer in OpenAI's form: one JSON, or server-sent events as it comes."""

import asyncio
import json
from collections.abc import AsyncIterator
from secrets import token_hex
from time import time
from typing import Any

from bridges.inference.plan import Spent
from bridges.serve.body import Body, Refused
from bridges.serve.engine import Job


class Answer:
    """To `body`, as far as the job brings it; its `first` event is there already."""

    def __init__(self, model: str, body: Body, job: Job, first: str | Spent) -> None:
        self.body, self.job, self.first = body, job, first
        self.head = {"id": f"chatcmpl-{token_hex(12)}", "created": int(time()), "model": model}

    async def whole(self, listening: "asyncio.Task[None]") -> dict[str, Any]:
        """All at once."""
        words, event = "", self.first
        while isinstance(event, str):
            words += event
            event = await self._next()
        listening.cancel()
        message = {"role": "assistant", "content": words, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason(event)}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage(event)}

    async def lines(self, listening: "asyncio.Task[None]") -> AsyncIterator[str]:
        """Server-sent events."""
        event = self.first
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while isinstance(event, str):
                if event:
                    yield self._chunk({"content": event})
                event = await self._next()
            yield self._chunk({}, reason(event))
            if self.body.stream_options.include_usage:
                yield line({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage(event)})
            yield "data: [DONE]\n\n"
        except ValueError as error:  # the status went out long ago
            yield line(told(error))
        finally:
            self.job.stopped = True
            listening.cancel()

    async def _next(self) -> str | Spent:
        event = await self.job.events.get()
        if isinstance(event, ValueError):
            raise event
        return event

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        none = {"usage": None} if self.body.stream_options.include_usage else {}
        return line({**self.head, "object": "chat.completion.chunk", "choices": [choice], **none})


def line(data: dict[str, Any]) -> str:
    """One event; in ASCII, for clients that take more characters than these two for the end of a line."""
    return f"data: {json.dumps(data)}\n\n"


def reason(spent: Spent) -> str:
    return "stop" if spent.ended else "length"


def usage(spent: Spent) -> dict[str, Any]:
    prompt = spent.kept + spent.read
    return {
        "prompt_tokens": prompt,
        "completion_tokens": spent.said,
        "total_tokens": prompt + spent.said,
        "prompt_tokens_details": {"cached_tokens": spent.kept},
    }


def told(error: ValueError) -> dict[str, Any]:
    """In OpenAI's form."""
    status, code = (error.status, error.code) if isinstance(error, Refused) else (400, None)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": " ".join(str(error).split()), "type": kind, "param": None, "code": code}}
