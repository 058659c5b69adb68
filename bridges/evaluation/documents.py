"""Does a document go on about the picture before the words, or about another one of its pictures?"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.build import Assembled
from bridges.data.batch import cut
from bridges.data.conversation import Conversation, Example
from bridges.data.documents import END
from bridges.data.template import Encoded, Template
from bridges.inference.decoding import go_on, spoken
from bridges.towers.framing import wholes

LONGEST = 24  # new tokens after a picture


def document_of(example: Example) -> Conversation | None:
    """The document of an example, if it has one."""
    return next((c for c in example.conversations if c.kind == "document"), None)


def pieces(example: Example) -> list[str]:
    """What its document says after each picture."""
    document = document_of(example)
    return [] if document is None else [part for part in document.turns[-1].content if isinstance(part, str)]


def continued(
    assembled: Assembled, examples: Sequence[Example], seen: Callable[[Sequence[Image.Image]], Float[Tensor, "n p v"]]
) -> list[list[str]]:
    """With what each document goes on after each of its pictures but the first, the true text of those before read."""
    documents = [document_of(example) for example in examples]
    prompts = [[] if d is None else up_to_pictures(assembled.template, d) for d in documents]
    flat = [prompt for some in prompts for prompt in some]
    if not flat:
        return [[] for _ in examples]
    language = assembled.model.language
    said = go_on(assembled, flat, seen([image for prompt in flat for image in prompt.images]), LONGEST)
    told = iter(spoken(language, ids).split(END)[0] for ids in said)
    return [[next(told) for _ in some] for some in prompts]


def up_to_pictures(template: Template, document: Conversation) -> list[Encoded]:
    """The document up to and with each of its pictures but the first, all of it where it is cut into tiles."""
    text = template.encode(document.turns)
    lasts = [n for n, image in enumerate(text.images, 1) if wholes([image])]
    return [cut(text, text.looks.index(n) + len(template.tag)) for n in lasts[1:]]


def right_picture(said: frozenset[str], shown: Sequence[frozenset[str]], place: int) -> bool:
    """Whether more of what is said is in that picture than in any other."""
    shared = [len(said & names) for names in shown]
    return shared[place] > max((n for other, n in enumerate(shared) if other != place), default=0)
