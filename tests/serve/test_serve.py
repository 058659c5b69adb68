"""The server, asked by OpenAI's own client: it says what a session says, to everyone their own, and survives everything."""

import http.client
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import openai
import pytest
from clients import QUESTIONS, Served, alone, data_url, serving, streamed, talk, user
from nonsense import distorted
from openai import OpenAI
from PIL import Image

from bridges.build import Assembled, build
from bridges.data.conversation import Turn
from bridges.recipe import recipe_from
from bridges.serve import app, body
from bridges.serve.engine import Job


@pytest.fixture(scope="module")
def served(built: Assembled) -> Iterator[Served]:
    with serving(built) as one:
        yield one


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with served.client() as one:
        yield one


@pytest.fixture
def tokens(built: Assembled) -> Iterator[list[int]]:
    """How many tokens the language model reads at a time."""
    numbers: list[int] = []
    hook = built.model.language.register_forward_pre_hook(lambda _, args: numbers.append(args[0].shape[1]))
    yield numbers
    hook.remove()


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def post(served: Served, data: bytes | str, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    """Without any client's care."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    connection.request("POST", path, data.encode() if isinstance(data, str) else data)
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    return answer.status, told


def ask(**fields: Any) -> str:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 2} | fields)


def test_a_streamed_conversation_about_two_pictures_is_what_a_session_says(
    built: Assembled, client: OpenAI, tokens: list[int], pictures: list[Image.Image]
) -> None:
    first = ["Is ", pictures[0], " like ", pictures[1], "?"]
    system = {"role": "system", "content": "You are a helpful assistant."}
    said, usage = streamed(client, [system, user(*first)])
    told = [Turn("system", ["You are a helpful assistant."]), Turn("user", first)]
    text = built.template.encode(told, reply=True)
    assert usage.prompt_tokens == len(text.ids) == tokens[0]
    assert usage.completion_tokens == 16
    before = sum(tokens)
    history = [system, user(*first), {"role": "assistant", "content": said}, user("Why?")]
    again, usage = streamed(client, history)
    new = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
    assert new == tokens[16] < 24, "what was said ends, the question, the beginning of the reply; no picture"
    assert sum(tokens) == before + new + 15
    from bridges.inference.session import Session

    session = Session(built)
    session.append(told[0])
    for turn, words in ((told[1], said), (Turn("user", ["Why?"]), again)):
        session.append(turn)
        assert "".join(session.stream(16)) == words


def test_all_at_once_is_what_comes_in_pieces(client: OpenAI, pictures: list[Image.Image]) -> None:
    messages: Any = [user(pictures[2], "What is it?")]
    words, usage = streamed(client, messages)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=16)
    assert whole.choices[0].message.content == words
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.total_tokens == usage.total_tokens
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens, "the same again: all is known"


def test_without_include_usage_no_chunk_has_it_and_the_last_says_why_it_ended(served: Served) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/chat/completions", ask(stream=True))
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    *chunks, done, rest = answer.read().decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    read = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert read[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in read] == [None] * (len(read) - 1) + ["length"]
    assert not any("usage" in chunk for chunk in read)


def test_eight_clients_at_once_each_hear_what_they_hear_alone(built: Assembled) -> None:
    """With room for all that they begin: what is forgotten is read again from its words, and those of random weights
    are broken characters, which are not the tokens that were said."""
    pictures = [noise(seed) for seed in range(8)]
    with serving(built, sessions=24) as served, ThreadPoolExecutor(8) as pool:

        def one(picture: Image.Image) -> list[str]:
            with served.client() as client:
                return talk(client, picture)[0]

        heard = list(pool.map(one, pictures))
    turns = [
        [Turn("user", [picture, QUESTIONS[0]]), *(Turn("user", [q]) for q in QUESTIONS[1:])] for picture in pictures
    ]
    assert heard == [alone(built, questions) for questions in turns]
    assert len({tuple(said) for said in heard}) == 8, "each picture has an answer of its own, or mixing would not show"


def test_two_conversations_from_one_beginning_both_go_on(client: OpenAI, pictures: list[Image.Image]) -> None:
    start = [user(pictures[0], "Look, and count.")]
    said, _ = streamed(client, start)
    start.append({"role": "assistant", "content": said})
    for question in ("Is it red?", "Is it blue?", "Is it red?"):
        _, usage = streamed(client, [*start, user(question)])
        assert usage.prompt_tokens_details.cached_tokens > 0.5 * usage.prompt_tokens
    _, usage = streamed(client, [*start, user("Is it blue?")])
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens, "the second one was not lost to the third"


def test_another_question_about_a_picture_reads_only_the_question(client: OpenAI, pictures: list[Image.Image]) -> None:
    system = {"role": "system", "content": "Name it. I think there is a house."}
    streamed(client, [system, user(pictures[1], pictures[2], "Which is larger?")])
    _, usage = streamed(client, [system, user(pictures[1], pictures[2], "Which is red?")])
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens < 20
    _, usage = streamed(client, [system, user(pictures[1], pictures[0], "Which is red?")])
    assert 16 < usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens < 36, "a picture has 16 tokens"


def test_no_more_conversations_are_kept_than_allowed(built: Assembled) -> None:
    with serving(built, sessions=2) as served, served.client() as client:
        for number in range(4):
            streamed(client, [user(f"Say {number}.")], max_tokens=2)
        assert len(served.engine.resting) == 2
        _, usage = streamed(client, [user("Say 3.")], max_tokens=2)
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens
        _, usage = streamed(client, [user("Say 0.")], max_tokens=2)
        assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_who_asks_the_same_again_and_again_costs_nobody_else_their_conversation(built: Assembled) -> None:
    with serving(built, sessions=3) as served, served.client() as client:
        streamed(client, [user("Name the bird.")], max_tokens=2)
        for _ in range(4):
            streamed(client, [user("Look at the house, and count what is in it.")], max_tokens=2)
        _, usage = streamed(client, [user("Name the bird.")], max_tokens=2)
        assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens


def test_a_short_answer_need_not_wait_for_the_end_of_a_long_one(client: OpenAI) -> None:
    long: Any = client.chat.completions.create(model="tiny", messages=[user("Long.")], max_tokens=400, stream=True)  # pyright: ignore
    next(iter(long))
    began = time.monotonic()
    streamed(client, [user("Short.")], max_tokens=2)
    short = time.monotonic() - began
    list(long)
    assert short < time.monotonic() - began


def test_sampling_is_repeated_with_its_seed(client: OpenAI) -> None:
    said = [streamed(client, [user("Hi.")], temperature=1.5, top_p=0.9, seed=seed)[0] for seed in (7, 7, -8)]
    assert said[0] == said[1] != said[2]
    unseeded = {streamed(client, [user("Hi.")], temperature=1.5)[0] for _ in range(3)}
    assert len(unseeded) > 1


def test_an_answer_ends_before_its_stop(client: OpenAI, pictures: list[Image.Image]) -> None:
    messages: Any = [user(pictures[0], "Stop.")]
    whole, _ = streamed(client, messages)
    stop = whole[3:5]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, temperature=0, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models_and_health(client: OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
        streamed(client, [user("Hi.")], model="gpt")
    assert post(served, "", "/v1/nothing") == (404, post(served, "", "/v1/nothing")[1])
    assert post(served, "", "/health")[0] == 405


def test_the_token_is_asked_of_everyone(built: Assembled) -> None:
    with serving(built, token="s3cret") as served:
        for wrong in ("none", "s3cre", "s3cret2"):
            with served.client(wrong) as client, pytest.raises(openai.AuthenticationError, match="token"):
                streamed(client, [user("Hi.")])
        assert post(served, ask())[0] == 401
        with served.client("s3cret") as client:
            streamed(client, [user("Hi.")])
            assert client.models.list().data


def test_a_conversation_that_is_too_long_is_refused_and_not_shortened(client: OpenAI) -> None:
    for length, longest in ((4, 600), (600, 4)):
        with pytest.raises(openai.BadRequestError, match="exceed the 512 positions") as told:
            streamed(client, [user("Yes. " * length)], max_tokens=longest)
        assert told.value.code == "context_length_exceeded"
    given: Any = [user("Yes. " * 100)]
    answer = client.chat.completions.create(model="tiny", messages=given)
    assert answer.usage is not None
    assert answer.usage.total_tokens <= 512, "without a limit of its own an answer takes what room there is"


TOO_MANY = [{"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (600, 500)))}}] * 4
REFUSED: list[tuple[bytes | str, int, str]] = [
    (b"", 400, "JSON"),
    (b"{", 400, "JSON"),
    (b"\xff\xfe", 400, "JSON"),
    (b"[" * 100_000, 400, "JSON"),
    ("[]", 400, "object"),
    (ask(model=3), 400, "model"),
    (ask(model="x"), 404, "no model"),
    (ask(messages=[]), 400, "messages"),
    (ask(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
    (ask(messages=[{"role": "user", "content": 5}]), 400, "messages.0.content"),
    (ask(messages=[{"role": "user", "content": [{"type": "audio"}]}]), 400, "'audio'"),
    (ask(messages=[{"role": "user", "content": "\ufdd0"}]), 400, "private character"),
    (ask(temperature="hot"), 400, "temperature"),
    (ask(temperature=-1), 400, "temperature"),
    (ask(top_p=0), 400, "top_p"),
    (ask(max_tokens=0), 400, "max_tokens"),
    (ask(max_tokens=10**30), 400, "exceed"),
    (ask(n=2), 400, "n: "),
    (ask(tools=[{}]), 400, "tools"),
    (ask(logprobs=True), 400, "logprobs"),
    (ask(stop=["a"] * 5), 400, "stop"),
    (ask(stop=""), 400, "stop"),
    (ask(max_token=3), 400, "max_token: there is no such field"),
    (ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]), 400, "--remote-images"),
    (ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,????"}}]}]), 400, "base64"),
    (ask(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGFsbG8="}}]}]), 400, "not a picture"),
    (ask(messages=[{"role": "user", "content": TOO_MANY}]), 400, "at most 0 are opened"),
    (ask(messages=[{"role": "user", "content": "x" * 2**21}]), 413, "at most 1048576"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status", "message"), REFUSED)
def test_what_is_wrong_is_told_in_openais_form(
    served: Served, monkeypatch: pytest.MonkeyPatch, data: bytes | str, status: int, message: str
) -> None:
    monkeypatch.setattr(app, "BODY_BYTES", 2**20)
    monkeypatch.setattr(body, "PIXELS", 1_000_000)
    got, told = post(served, data)
    assert got == status, told
    assert message in told["error"]["message"], told
    assert "\n" not in told["error"]["message"]
    assert told["error"]["type"] == "invalid_request_error"
    assert post(served, ask())[0] == 200, "and it lives on"


def test_fields_that_change_nothing_are_taken(served: Served) -> None:
    harmless = {
        "n": 1,
        "presence_penalty": 0,
        "user": "me",
        "metadata": {},
        "stop": None,
        "response_format": {"type": "text"},
    }
    assert post(served, ask(**harmless))[0] == 200
    echoed = {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None}
    assert (
        post(served, ask(messages=[{"role": "developer", "content": "Be."}, user("Hi."), echoed, user("So?")]))[0]
        == 200
    )


def test_a_picture_of_too_many_bytes_is_refused(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "PICTURE_BYTES", 1000)
    with pytest.raises(openai.APIStatusError, match="a picture of more than") as told:
        streamed(client, [user(noise(1))])
    assert told.value.status_code == 413


def test_wrong_bodies_get_an_answer_or_a_refusal_and_nothing_else(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridges.serve.engine.LONGEST", 4)
    draw, found = random.Random(2), set()
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    for _ in range(300):
        connection.request("POST", "/v1/chat/completions", distorted(draw))
        answer = connection.getresponse()
        found.add(answer.status)
        answer.read()
    assert {200, 400} <= found <= {200, 400, 404}


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_stops_the_answer(served: Served, stream: bool, tokens: list[int]) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    data = ask(stream=stream, max_tokens=450, messages=[{"role": "user", "content": f"Hang up {stream}."}])
    with socket.create_connection((host, int(port))) as line:
        line.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n{data}".encode()
        )
        while not tokens:
            time.sleep(0.001)
    while served.engine.speaking:
        time.sleep(0.001)
    assert len(tokens) < 400
    assert post(served, ask())[0] == 200


def test_who_hangs_up_in_the_queue_is_not_answered(built: Assembled, tokens: list[int]) -> None:
    with serving(built, sessions=1) as served, served.client() as client:
        long: Any = client.chat.completions.create(model="tiny", messages=[user("Long.")], max_tokens=400, stream=True)  # pyright: ignore
        next(iter(long))
        queued, noticed = kept_busy(served)
        host, port = served.url.removeprefix("http://").split(":")
        data = ask(messages=[{"role": "user", "content": "Yes. " * 50}])
        with socket.create_connection((host, int(port))) as line:
            line.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n{data}".encode()
            )
            while not queued:
                time.sleep(0.001)
        while not queued[0].stopped:
            time.sleep(0.001)
        noticed.set()
        list(long)
        streamed(client, [user("Short.")])
    assert max(tokens) < 40, "the one who hung up asked something longer"


def kept_busy(served: Served) -> tuple[list[Job], Event]:
    """Jobs that come from now on, and until when whoever is being answered gets no further token."""
    queued: list[Job] = []
    noticed, engine = Event(), served.engine
    submit, go_on = engine.submit, engine._go_on
    engine.submit = lambda job: (queued.append(job), submit(job))[1]
    engine._go_on = lambda talk: (noticed.wait(30), go_on(talk))[1]
    return queued, noticed


def test_a_failure_of_the_model_is_told_and_the_server_lives_on(built: Assembled, client: OpenAI) -> None:
    failures = iter([RuntimeError("out of memory")])

    def fail(*_: Any) -> None:
        for error in failures:
            raise error

    hook = built.model.language.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.InternalServerError, match="RuntimeError"):
            streamed(client, [user("Fail.")])
        assert streamed(client, [user("Fail.")])[0] == alone(built, [Turn("user", ["Fail."])])[0]
    finally:
        hook.remove()


def test_pictures_are_fetched_from_the_web_where_that_is_allowed(built: Assembled, pictures: list[Image.Image]) -> None:
    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            if self.path == "/a.png":
                pictures[0].save(self.wfile, "PNG")

        def log_message(self, *_: Any) -> None:
            pass

    web = HTTPServer(("127.0.0.1", 0), Pictures)
    Thread(target=web.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{web.server_port}"
    with serving(built, remote=True) as served, served.client() as client:
        message = user("What?")
        message["content"].insert(0, {"type": "image_url", "image_url": {"url": f"{at}/a.png"}})
        assert streamed(client, [message])[0] == alone(built, [Turn("user", [pictures[0], "What?"])])[0]
        for url, why in ((f"{at}/b.png", "404"), ("file:///etc/hosts", "neither"), ("http://127.0.0.1:1/", "refused")):
            message["content"][0]["image_url"]["url"] = url
            with pytest.raises(openai.BadRequestError, match=why):
                streamed(client, [message])
    web.shutdown()
    web.server_close()


def test_a_language_model_with_an_encoder_is_served_too(
    tiny_clip: Path, tiny_t5: Path, pictures: list[Image.Image]
) -> None:
    towers = {"vision": {"name": str(tiny_clip)}, "language": {"name": str(tiny_t5), "template": "t5"}}
    t5 = build(recipe_from({"output": "nowhere", **towers}))
    with serving(t5) as served, served.client() as client:
        said = talk(client, pictures[0])[0]
    turns = [Turn("user", [pictures[0], QUESTIONS[0]]), *(Turn("user", [question]) for question in QUESTIONS[1:])]
    assert said == alone(t5, turns)


def test_too_many_in_the_queue_are_sent_away(built: Assembled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridges.serve.engine.WAITING", 1)
    go = Event()
    hook = built.model.language.register_forward_pre_hook(lambda *_: go.wait(20) and None)
    try:
        with serving(built, sessions=1) as served, ThreadPoolExecutor(4) as pool:
            answers = []
            for _ in range(3):
                answers.append(pool.submit(post, served, ask()))
                time.sleep(0.2)
            assert answers[2].result()[0] == 503
            go.set()
            assert [answer.result()[0] for answer in answers] == [200, 200, 503]
    finally:
        go.set()
        hook.remove()
