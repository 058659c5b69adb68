"""What is read before it is asked changes no answer: it only makes the next one begin sooner."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, randomise, tiny_language
from PIL import Image

from bridges.base import bridge_names
from bridges.benchmark.ours import open_gates
from bridges.build import Assembled, build
from bridges.config import Recipe
from bridges.data.conversation import Turn
from bridges.data.template import TEMPLATES, Template
from bridges.inference.decoding import answers
from bridges.inference.session import Session
from bridges.recipe import recipe_from

SMALL: dict[str, dict[str, Any]] = {
    "projector": {},
    "qformer": {"queries": 5, "layers": 2, "width": 32, "heads": 4},
    "resampler": {"latents": 5, "depth": 1, "heads": 2, "head_dim": 8},
    "flamingo": {"latents": 5, "depth": 1, "resampler_heads": 2, "resampler_head_dim": 8, "heads": 2, "head_dim": 8},
}
OTHERS = {
    "marks the last": "{% for m in messages %}{% if loop.last %}[now] {% endif %}"
    + CHATML.removeprefix("{% for m in messages %}"),
    "begins as the tests do": CHATML.replace("{{ m.role }}\n", "{{ m.role }} A"),
}
WORDS = ["What is it?", "\nA cat", " 1 or two?", "A", "", "1", "<|im_end|>", "Name it."]
LONG = 6


def told(session: Session, turn: Turn) -> str:
    session.append(turn)
    return "".join(session.stream(LONG))


def talk(session: Session, pictures: list[Image.Image], between: Callable[[Session], object]) -> list[str]:
    """What is said in eight turns, with pictures before, amid and without words, with undo, retry and fork; and
    something done between any two steps."""
    said, shown = [], {0: [pictures[0]], 2: [pictures[1], pictures[0]], 5: [pictures[2]]}
    between(session)
    for place, words in enumerate(WORDS):
        said.append(told(session, Turn("user", [*shown.get(place, []), words])))
        between(session)
        if place in (1, 5):
            session.undo()
            between(session)
            said.append(told(session, Turn("user", [pictures[1], words])))
            between(session)
        if place in (2, 4):
            said.append("".join(session.regenerate(LONG)))
            between(session)
        if place in (0, 3):
            fork = session.fork()
            between(fork)
            said.append(told(fork, Turn("user", ["Another?"])))
    return said


def same_with_and_without(assembled: Assembled, pictures: list[Image.Image]) -> list[int]:
    """How much was read ahead, each time."""
    counts: list[int] = []
    without = talk(Session(assembled), pictures, lambda _: None)
    assert talk(Session(assembled), pictures, lambda session: counts.append(session.read_ahead())) == without
    assert len(set(without)) > 4, "answers that are all alike would be the same anyway"
    return counts


@pytest.fixture(params=bridge_names())
def model(request: pytest.FixtureRequest, built: Assembled) -> Assembled:
    """Every weight of the bridge counts; the gates of Flamingo's are open."""
    assembled = build(replace(built.recipe, bridge={"name": request.param, **SMALL[request.param]}))
    randomise(assembled.model.bridge)
    open_gates(assembled.model.bridge, 0.6)
    return assembled


def test_no_answer_changes_for_any_bridge(model: Assembled, pictures: list[Image.Image]) -> None:
    assert max(same_with_and_without(model, pictures)) > 3


@pytest.mark.parametrize("source", [*TEMPLATES, *OTHERS])
def test_no_answer_changes_with_any_template(assembled: Assembled, pictures: list[Image.Image], source: str) -> None:
    template = Template(assembled.template.tokenizer, assembled.template.num_slots, OTHERS.get(source, source))
    assert max(same_with_and_without(assembled._replace(template=template), pictures)) > 0


def test_of_a_text_that_begins_with_the_last_message_nothing_is_known(
    assembled: Assembled, pictures: list[Image.Image]
) -> None:
    last_first = "{% if messages | length > 2 %}Now: {{ messages[-1].content }}{% endif %}" + CHATML
    session = Session(assembled._replace(template=Template(assembled.template.tokenizer, 16, last_first)))
    told(session, Turn("user", [pictures[0], "What is it?"]))
    assert session.read_ahead() == 0
    other = session.fork()
    assert told(session, Turn("user", ["And now?"])) == told(other, Turn("user", ["And now?"]))


def test_the_next_turn_reads_so_much_less(assembled: Assembled, pictures: list[Image.Image]) -> None:
    session = Session(assembled)
    told(session, Turn("user", [pictures[0], "What is it?"]))
    other = session.fork()
    count = other.read_ahead()
    beginning = assembled.template.tokenizer("<|im_end|>\n<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    assert len(beginning) <= count <= len(beginning) + 1, "of a reply that was cut the last token was not read yet"
    assert other.read_ahead() == 0, "once"
    next_turn = Turn("user", [pictures[1], "And this?"])
    assert told(other, next_turn) == told(session, next_turn)
    assert other.spent.read == session.spent.read - count
    assert other.spent.kept == session.spent.kept + count
    assert other.looker.features.encoded == 2


def test_an_encoder_reads_nothing_ahead(tiny_clip: Path, tiny_t5: Path, pictures: list[Image.Image]) -> None:
    towers = {"vision": {"name": str(tiny_clip)}, "language": {"name": str(tiny_t5), "template": "t5"}}
    session = Session(build(recipe_from({"output": "nowhere", **towers})))
    told(session, Turn("user", [pictures[0], "What is it?"]))
    assert session.read_ahead() == 0


def test_a_window_that_would_forget_reads_nothing_ahead(
    recipe: Recipe, pictures: list[Image.Image], tmp_path: Path
) -> None:
    def windowed(window: int) -> Session:
        recipe.language.name = str(tiny_language("mistral", tmp_path / f"{window}", sliding_window=window))
        return Session(build(recipe))

    short = windowed(48)
    counts = same_with_and_without(short.assembled, pictures)
    assert counts[0] > 0
    assert counts[-1] == 0
    told(short, Turn("user", ["Hi"]))
    just_enough = windowed(short.spent.read + short.spent.said + 2)
    told(just_enough, Turn("user", ["Hi"]))
    assert just_enough.read_ahead() == 0


def test_a_full_context_reads_nothing_ahead_and_the_oldest_turns_are_dropped_as_ever(assembled: Assembled) -> None:
    session, other = Session(assembled), Session(assembled)
    for _ in range(12):
        turn = Turn("user", ["Look at the red house. " * 4])
        assert told(session, turn) == told(other, turn)
        assert session.read_ahead() > 0
    assert session.dropped == other.dropped > 0
    session = Session(assembled)
    session.turns = [Turn("user", [""])]
    room = (assembled.model.language.context or 0) - LONG - session.size()
    session.clear()
    told(session, Turn("user", ["!" * room]))
    assert session.spent.read + session.spent.said == assembled.model.language.context
    assert session.read_ahead() == 0


def test_a_refusing_template_is_no_error_yet(assembled: Assembled) -> None:
    refuses = "{% if messages | length > 2 %}{{ raise_exception('once only') }}{% endif %}" + CHATML
    template = Template(assembled.template.tokenizer, assembled.template.num_slots, refuses)
    session = Session(assembled._replace(template=template))
    told(session, Turn("user", ["What is it?"]))
    assert session.read_ahead() == 0
    with pytest.raises(ValueError, match="once only"):
        told(session, Turn("user", ["And now?"]))


def test_ctrl_c_amid_it_leaves_a_session_that_can_go_on(assembled: Assembled, pictures: list[Image.Image]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    session = Session(assembled)
    told(session, Turn("user", [pictures[0], "What is it?"]))
    hook = assembled.model.language.model.model.layers[1].register_forward_pre_hook(
        interrupt
    )  # the first layer is done
    with pytest.raises(KeyboardInterrupt):
        session.read_ahead()
    hook.remove()
    question = Turn("user", ["And now?"])
    expected = answers(assembled, [[*session.turns, question]], max_new_tokens=LONG)[0]
    assert told(session, question) == expected
    assert session.looker.features.encoded == 1
