"""The body of a request: whatever comes, it is read or refused with one line, at once."""

import json
import random
import time

import pytest
from clients import data_url
from nonsense import RED, distorted, sound
from PIL import Image

from bridges.data.conversation import images_of
from bridges.serve.body import Refused, parse, turns_of


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
