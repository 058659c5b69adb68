"""The body of a request: whatever comes, it is read or refused with one line, at once."""

import json
import random
import time
from copy import deepcopy
from typing import Any

import pytest
from clients import data_url
from PIL import Image

from bridges.data.conversation import images_of
from bridges.serve.body import Refused, parse, turns_of

RED = Image.new("RGB", (4, 4), "red")
WORDS = [
    "",
    "user",
    "system",
    "text",
    "image_url",
    "tiny",
    "\0",
    "\ufdd0",
    "é" * 50,
    "data:image/png;base64,",
    "data:,",
    "1e999",
]


def sound() -> dict[str, Any]:
    """A body with nearly everything in it."""
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image_url", "image_url": {"url": data_url(RED), "detail": "low"}},
        {"type": "text", "text": " red?"},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": "Yes.", "refusal": None},
        {"role": "user", "content": "And now?"},
    ]
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a", "b"], "max_completion_tokens": 5}
    return {
        "model": "tiny",
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
    }


def test_messages_become_turns_with_pictures_where_they_stand() -> None:
    body = parse(json.dumps(sound()).encode())
    turns = turns_of(body.messages)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    before, picture, after = turns[1].content
    assert (before, after) == ("Is ", " red?")
    assert isinstance(picture, Image.Image)
    assert picture.tobytes() == RED.tobytes()
    assert (body.longest, body.stop) == (5, ["a", "b"])


def test_the_newer_name_of_the_longest_answer_wins() -> None:
    assert parse(b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}').longest == 3
    both = b'{"model": "m", "messages": [{"role": "user"}], "max_tokens": 3, "max_completion_tokens": 4, "seed": null}'
    assert parse(both).longest == 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_usual_kind_of_picture_is_read(kind: str) -> None:
    body = sound()
    body["messages"][1]["content"][1]["image_url"]["url"] = data_url(RED, kind)
    assert images_of(turns_of(parse(json.dumps(body).encode()).messages))[0].size == (4, 4)


def anything(draw: random.Random, depth: int = 0) -> Any:
    """Some JSON value."""
    kind = draw.randrange(8 if depth < 4 else 6)
    if kind == 6:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {draw.choice(WORDS): anything(draw, depth + 1) for _ in range(draw.randrange(4))}
    one = draw.choice([None, True, False, 0, -1, 1, 2**63, 10**40, 0.5, 1e308, float("nan"), float("-inf"), [], {}])
    return draw.choice(WORDS) if kind < 2 else one


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def distorted(draw: random.Random) -> bytes:
    """A sound body with a few things wrong in it, or something else altogether."""
    body = deepcopy(BODY) if draw.random() < 0.9 else anything(draw)
    for _ in range(draw.randrange(1, 4)):
        if not (found := places(body)):
            break
        container, key = draw.choice(found)
        what = draw.randrange(4)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[draw.choice(["n", "tools", "role", "type", "text", "url", *WORDS])] = anything(draw)
        else:
            container[key] = anything(draw)
    data = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.5).encode())
    for _ in range(draw.randrange(4) if draw.random() < 0.3 else 0):
        place = draw.randrange(len(data) + 1)
        data[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(data)


BODY = sound()


def refusal(data: bytes) -> str | None:
    """What is told about it, if it is not read."""
    try:
        turns_of(parse(data).messages)
    except ValueError as error:
        return str(error)
    return None


def fuzz(seed: int, count: int) -> tuple[int, int]:
    """How many bodies were read, and refused. Nothing else happens to any, and none takes long."""
    draw, read, refused = random.Random(seed), 0, 0
    for _ in range(count):
        data = distorted(draw)
        began = time.perf_counter()
        told = refusal(data)
        if told is None:
            read += 1
        else:
            assert told.strip(), data
            assert len(told) < 500, data
            assert "\n" not in told, data
            refused += 1
        assert time.perf_counter() - began < 2, data
    return read, refused


def test_two_thousand_wrong_bodies_are_read_or_refused() -> None:
    read, refused = fuzz(0, 2000)
    assert read > 100
    assert refused > 1000


@pytest.mark.slow
def test_ten_thousand_wrong_bodies_are_read_or_refused() -> None:
    assert sum(fuzz(1, 10_000)) == 10_000


def test_deep_and_long_bodies_are_refused_at_once() -> None:
    began = time.perf_counter()
    for data in (b"[" * 10**6, b'{"a":' * 10**6, b'{"model":"' + b"\\u0000" * 10**6, b"9" * 10**6, b'"\\ud800"'):
        with pytest.raises(Refused):
            parse(data)
    assert time.perf_counter() - began < 5
