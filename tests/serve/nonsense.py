"""Bodies of requests that are sound, and others that are not."""

import json
import random
from copy import deepcopy
from typing import Any

from clients import data_url
from PIL import Image

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


BODY = sound()


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
