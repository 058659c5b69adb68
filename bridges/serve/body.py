"""What stands in a request for a chat completion: OpenAI's fields, checked, and its messages with their pictures."""

import base64
import re
from http.client import HTTPException
from time import monotonic
from typing import Annotated, Any, Literal
from urllib.request import urlopen

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bridges.data.conversation import Turn
from bridges.data.pictures import open_picture

PICTURE_BYTES = 20 * 2**20
PIXELS = 50_000_000
"""Of all pictures of a request together: 150 MB once decoded."""
FETCH_SECONDS = 10

DATA_URL = re.compile(r"data:[\w.+/-]*;base64,", re.ASCII)


class Refused(ValueError):
    """A request that is not answered: why, and the HTTP status and OpenAI's code that say so."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Checked(BaseModel):
    """Fields have just these types, there are no others, and null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class Text(Checked):
    type: Literal["text"]
    text: str


class Address(Checked):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # ignored: an encoder knows one size


class Picture(Checked):
    type: Literal["image_url"]
    image_url: Address


class Message(Checked):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[Text | Picture, Field(discriminator="type")]] = []
    name: str = ""  # ignored: no template prints it

    @field_validator("content", mode="before")
    @classmethod
    def _in_parts(cls, given: Any) -> Any:
        return [{"type": "text", "text": given}] if isinstance(given, str) else given


class StreamOptions(Checked):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Checked):
    type: Literal["text"]


class Body(Checked):
    """Of `POST /v1/chat/completions`. What OpenAI has and a bridge has not is refused, unless it asks for nothing."""

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    n: int = Field(1, ge=1, le=1)
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    logprobs: Literal[False] = False
    logit_bias: dict[str, Any] = Field({}, max_length=0)
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] = ["text"]
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"

    # Ignored: they change nothing in the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _in_a_list(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def parse(data: bytes) -> Body:
    """Raises Refused with one line: no JSON, or a field that is missing, unknown, of a wrong type or without a use."""
    try:
        return Body.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = "there is no such field here" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refused((f"{where[:100]}: " if where else "") + " ".join(what.split())[:300]) from None


def turns_of(messages: list[Message], remote: bool = False) -> list[Turn]:
    """The conversation with its pictures opened, which are fetched from elsewhere only if `remote`.

    Raises ValueError for what is not a picture, and for too many bytes or pixels.
    """
    pixels, turns = 0, []
    for message in messages:
        content: list[str | Image.Image] = []
        for part in message.content:
            if isinstance(part, Text):
                content.append(part.text)
                continue
            picture = open_picture(bytes_of(part.image_url.url, remote), PIXELS - pixels)
            pixels += picture.width * picture.height
            content.append(picture)
        turns.append(Turn("system" if message.role == "developer" else message.role, content))
    return turns


def bytes_of(url: str, remote: bool) -> bytes:
    """What a data URL holds, or an address."""
    if url[:5].lower() != "data:":
        return fetched(url, remote)
    head = DATA_URL.match(url)
    if not head:
        raise Refused("image_url: a data URL begins with data:image/png;base64, or the like")
    if (len(url) - head.end()) * 3 // 4 > PICTURE_BYTES:
        raise too_big()
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:
        raise Refused(f"image_url: no base64 ({error})") from None


def fetched(url: str, remote: bool) -> bytes:
    """From the web, if that is allowed."""
    if not remote:
        raise Refused(
            "image_url: only data URLs (data:image/png;base64,…) are read; other addresses are fetched if the server "
            "is started with --remote-images"
        )
    if not re.match("https?://", url, re.IGNORECASE):
        raise Refused("image_url: neither a data URL nor one that begins with http:// or https://")
    until, data = monotonic() + FETCH_SECONDS, bytearray()
    try:
        with urlopen(url, timeout=FETCH_SECONDS) as answer:
            while piece := answer.read1(2**16):
                data += piece
                if len(data) > PICTURE_BYTES:
                    raise too_big()
                if monotonic() > until:
                    raise TimeoutError(f"it takes longer than {FETCH_SECONDS} s")
    except (OSError, HTTPException, UnicodeError) as error:
        raise Refused(f"image_url: cannot fetch {url[:100]}: {' '.join(str(error).split())[:200]}") from None
    return bytes(data)


def too_big() -> Refused:
    return Refused(f"image_url: a picture of more than {PICTURE_BYTES / 2**20:.0f} MiB", 413)
