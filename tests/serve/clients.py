"""What the tests of the server share: a server on a port of its own, and clients that talk with it."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import uvicorn
from openai import OpenAI
from PIL import Image

from bridges.build import Assembled
from bridges.data.conversation import Turn
from bridges.inference.session import Session
from bridges.serve.app import Api
from bridges.serve.engine import Engine
from bridges.serve.run import address

Message = dict[str, Any]
QUESTIONS = ["What is in the picture?", "How many birds are there?", "Name it."]


@dataclass
class Served:
    url: str
    engine: Engine

    def client(self, token: str = "none") -> OpenAI:
        return client_of(self.url, token)


def client_of(url: str, token: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=60)


@contextmanager
def serving(
    assembled: Assembled, token: str | None = None, sessions: int = 8, remote: bool = False
) -> Iterator[Served]:
    """A server in this process, whose model is called tiny."""
    engine, opened = Engine(assembled, sessions), address("127.0.0.1", 0)
    app = Api(engine, "tiny", token, remote).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    thread = Thread(target=server.run, args=([opened],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{opened.getsockname()[1]}", engine)
    finally:
        engine.close()
        server.should_exit = True
        thread.join()
        engine.thread.join()


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def user(*parts: str | Image.Image) -> Message:
    """A message with pictures where they stand."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def alone(assembled: Assembled, questions: Sequence[Turn], longest: int = 16) -> list[str]:
    """What a session of its own says to each question."""
    session, said = Session(assembled), []
    for turn in questions:
        session.append(turn)
        said.append("".join(session.stream(longest)))
    return said


def streamed(client: OpenAI, messages: Sequence[Message], model: str = "tiny", **options: Any) -> tuple[str, Any]:
    """The words, and the usage."""
    words, usage = "", None
    given: Any = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16} | options
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        words += "".join(choice.delta.content or "" for choice in chunk.choices)
    return words, usage


def talk(client: OpenAI, picture: Image.Image, model: str = "tiny", longest: int = 16) -> tuple[list[str], int, int]:
    """A conversation about a picture: what was said to `QUESTIONS`, and how many tokens were known and said in all."""
    messages: list[Message] = []
    said, known, spoken = [], 0, 0
    for number, question in enumerate(QUESTIONS):
        messages.append(user(question) if number else user(picture, question))
        words, usage = streamed(client, messages, model, max_tokens=longest)
        messages.append({"role": "assistant", "content": words})
        said.append(words)
        known += usage.prompt_tokens_details.cached_tokens
        spoken += usage.completion_tokens
    return said, known, spoken


def crowd(
    url: str,
    model: str,
    pictures: Sequence[Image.Image],
    expected: Sequence[Sequence[str]],
    seconds: float,
    longest: int,
) -> dict[str, int]:
    """A client for each picture, all at once, each talking again and again about its own until the time is over.

    Counts conversations, tokens known and said, answers that were not the `expected` ones, and errors.
    """
    until = time.monotonic() + seconds

    def one(number: int) -> dict[str, int]:
        count = dict.fromkeys(["conversations", "known", "said", "mixed", "errors"], 0)
        with client_of(url) as client:
            while time.monotonic() < until:
                try:
                    said, known, spoken = talk(client, pictures[number], model, longest)
                except Exception:
                    count["errors"] += 1
                    continue
                count["conversations"] += 1
                count["known"] += known
                count["said"] += spoken
                count["mixed"] += said != list(expected[number])
        return count

    with ThreadPoolExecutor(len(pictures)) as pool:
        counts = list(pool.map(one, range(len(pictures))))
    return {key: sum(count[key] for count in counts) for key in counts[0]}
