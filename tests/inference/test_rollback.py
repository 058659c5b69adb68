"""Undo, retry, fork, another past and a full context: what is answered is what the whole history computed afresh says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise, tiny_language
from PIL import Image
from torch import Tensor

from bridges import adapter
from bridges.base import bridge_names
from bridges.benchmark.ours import open_gates
from bridges.build import Assembled, build
from bridges.checkpoint import load, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.data.conversation import Turn
from bridges.data.template import IMAGE_MARK, Template
from bridges.inference.decoding import answers, cut, greedy, held
from bridges.inference.session import Session
from bridges.inference.settings import Settings, changed
from bridges.towers.quantized import Bits

LATENTS: dict[str, Any] = {"latents": 5, "depth": 1}
FUSED: dict[str, Any] = {**LATENTS, "resampler_heads": 2, "resampler_head_dim": 8, "heads": 2, "head_dim": 8}
QUERIES: dict[str, Any] = {"queries": 5, "layers": 2, "width": 32, "heads": 4}
BRIDGES: list[dict[str, Any]] = [
    {"name": "projector", "depth": 2},
    {"name": "qformer", **QUERIES},
    {"name": "qformer", **QUERIES, "reads": "instructions"},
    {"name": "resampler", **LATENTS, "heads": 2, "head_dim": 8},
    {"name": "flamingo", **FUSED},
    {"name": "flamingo", **FUSED, "sees": "all", "tag": "learnt"},
]
QUESTIONS = ["What is it?", "How many?", "And in this?", "Is it a cat?", "Look!", "Name it.", "Is it larger?", "Bye."]
LONG = 8


def speaks_words(assembled: Assembled) -> Assembled:
    """It says whole words only, each with its space: then what was said has, as text, no other tokens."""
    template, language = assembled.template, assembled.model.language
    words = [template.tokenizer.decode([number]) for number in range(len(template.tokenizer))]
    may = [word[:1] == " " and word[1:].isalpha() and word.isascii() for word in words]
    head = language.model.get_output_embeddings().weight
    with torch.no_grad():
        head[: len(may)][~torch.tensor(may)] = 0
    vicuna = Template(template.tokenizer, template.num_slots, "vicuna", instructed=template.instructed)
    return assembled._replace(template=vicuna)


@pytest.fixture
def assembled(assembled: Assembled) -> Assembled:
    return speaks_words(assembled)


def described(options: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in options.items() if key in ("name", "reads", "sees", "tag"))


@pytest.fixture(params=BRIDGES, ids=described)
def model(request: pytest.FixtureRequest, built: Assembled, tiny_bert_folder: Path) -> Assembled:
    """Every weight of the bridge counts; the gates of Flamingo's are open."""
    words = {"words": str(tiny_bert_folder)} if "reads" in request.param else {}
    assembled = build(replace(built.recipe, bridge={**request.param, **words}))
    randomise(assembled.model.bridge)
    open_gates(assembled.model.bridge, 0.6)
    return speaks_words(assembled)


def told(session: Session, turn: Turn, longest: int = LONG) -> str:
    session.append(turn)
    return "".join(session.stream(longest))


def afresh(session: Session, turns: list[Turn], longest: int = LONG) -> str:
    return answers(session.assembled, [turns], max_new_tokens=longest)[0]


def encoded(session: Session) -> int:
    return session.looker.features.encoded


def test_no_bridge_is_left_out() -> None:
    assert {options["name"] for options in BRIDGES} == set(bridge_names())


def test_eight_turns_with_undo_retry_and_fork_say_what_the_whole_history_says(
    model: Assembled, pictures: list[Image.Image]
) -> None:
    shown = {0: pictures[:1], 2: pictures[1:2], 4: pictures[2:]}
    questions = [Turn("user", [*shown.get(place, []), text]) for place, text in enumerate(QUESTIONS)]
    session, cost = Session(model), []
    for place, question in enumerate(questions):
        expected = afresh(session, [*session.turns, question])
        assert told(session, question) == expected
        cost.append(session.spent.read)
        assert place in (1, 2, 3) or session.read_ahead() > 0
        if place in (2, 5):  # undo, with and without a picture, and on another way
            [undone, _] = session.undo()
            assert undone == question
            other = Turn("user", ["Something else"])
            assert told(session, other) == afresh(session, [*session.turns[:-2], other])
            session.undo()
            assert told(session, question) == expected
        if place in (3, 4):  # retry
            assert "".join(session.regenerate(LONG)) == expected
            assert session.spent.read == 0, "the prompt is not read again"
        if place in (1, 6):  # fork
            fork = session.fork()
            other = Turn("user", [pictures[0], "Another?"])
            assert told(fork, other) == afresh(fork, [*session.turns, other])
            assert fork.turns[:-2] == session.turns
    assert len(session.turns) == 16
    assert encoded(session) == 3
    assert max(cost[3], cost[5], cost[6], cost[7]) < 40, "a turn costs what is new in it"


@pytest.mark.parametrize(
    ("lora", "bits"), [(Lora(rank=4, alpha=8), None), (None, "int8"), (None, "nf4")], ids=["lora", "int8", "nf4"]
)
def test_so_it_is_with_an_adapter_and_with_a_quantized_language_model(
    lora: Lora | None, bits: Bits | None, recipe: Recipe, pictures: list[Image.Image]
) -> None:
    recipe.lora, recipe.language.quantize = lora, bits
    trained = build(recipe)
    with torch.no_grad():
        for parameter in adapter.parameters(trained.model.language):
            parameter.normal_(0, 0.2)
    save_checkpoint(Path(recipe.output), trained)
    session = Session(speaks_words(load(recipe.output)))
    language = session.assembled.model.language
    assert (bool(language.adapters), bool(language.quantized)) == (bool(lora), bool(bits))
    told(session, Turn("user", [pictures[0], "What is it?"]))
    for question in (Turn("user", ["And now?"]), Turn("user", [pictures[1], "Or this?"])):
        expected = afresh(session, [*session.turns, question])
        assert told(session, question) == expected
        assert session.spent.kept > session.spent.read / 2


def test_the_logits_are_the_same_too(model: Assembled, pictures: list[Image.Image]) -> None:
    session = Session(model)
    told(session, Turn("user", [pictures[0], "What is it?"]))
    told(session, Turn("user", [pictures[1], "And this?"]))
    session.undo()
    last, ours, theirs = Turn("user", [pictures[2], " or ", pictures[1], "?"]), [], []

    def kept(into: list[Tensor]) -> Any:
        return lambda logits: (into.append(logits), greedy(logits))[1]

    session.append(last)
    asked = list(session.turns)
    list(session.stream(4, kept(ours)))
    answers(model, [asked], max_new_tokens=4, choose=kept(theirs))
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), atol=1e-4, rtol=1e-4)
    assert torch.cat(ours).std(0).max() > 0.01


def test_a_window_that_has_forgotten_is_read_again(recipe: Recipe, pictures: list[Image.Image], tmp_path: Path) -> None:
    recipe.language.name = str(tiny_language("mistral", tmp_path / "mistral", sliding_window=24))
    session = Session(speaks_words(build(recipe)))
    question = Turn("user", [pictures[0], "What is it?"])
    first = told(session, question)
    told(session, Turn("user", ["And now?"]))
    session.undo()
    other = Turn("user", ["Or this?"])
    assert told(session, other) == afresh(session, [question, Turn("assistant", [first]), other])
    assert session.spent.kept == 0
    assert encoded(session) == 1


def test_what_another_hand_wrote_into_the_past_is_read(assembled: Assembled, pictures: list[Image.Image]) -> None:
    session = Session(assembled)
    told(session, Turn("user", [pictures[0], "What is it?"]))
    told(session, Turn("user", ["And now?"]))
    kept = session.spent.kept
    session.turns[2:] = [Turn("user", ["Again."]), Turn("assistant", ["A cat."])]
    last = Turn("user", ["Sure?"])
    expected = afresh(session, [*session.turns, last])
    assert told(session, last) == expected
    assert kept <= session.spent.kept < kept + 12, (
        "the first exchange is still true, and what every message begins with"
    )
    session.turns[0] = Turn("user", [pictures[1], "What is it?"])  # the same words, another picture
    expected = afresh(session, [*session.turns, last])
    assert told(session, last) == expected
    assert session.spent.kept < 8, "the beginning of a conversation, which is everyone's"


def test_a_full_context_drops_the_oldest_turns_but_no_picture_and_not_the_system(
    assembled: Assembled, pictures: list[Image.Image]
) -> None:
    session = Session(assembled)
    session.append(Turn("system", ["You are a helpful assistant."]))
    context = assembled.model.language.context or 0
    told(session, Turn("user", [pictures[0], "What is it?"]))
    for _ in range(12):
        told(session, Turn("user", ["Look at the red house. " * 4]))
    assert session.dropped > 0
    assert len(session.turns) == 27, "nothing of what was said is forgotten"
    assert session.size() + LONG <= context
    last = Turn("user", ["Name it."])
    session.append(last)
    read = [session.turns[0], Turn("user", [pictures[0], *session.turns[1 + session.dropped].content])]
    read += session.turns[2 + session.dropped :]
    before = session.dropped
    assert "".join(session.stream(LONG)) == afresh(session, read)
    assert session.dropped == before, "there is room for some more turns"
    assert session.spent.kept > session.spent.read
    assert encoded(session) == 1


def test_undo_of_nothing_and_a_retry_of_nothing_are_told(assembled: Assembled) -> None:
    session = Session(assembled)
    with pytest.raises(ValueError, match="nothing to take back"):
        session.undo()
    with pytest.raises(ValueError, match="no answer to give anew"):
        next(session.regenerate())


def test_a_retry_that_fails_keeps_the_old_answer(assembled: Assembled) -> None:
    session = Session(assembled)
    told(session, Turn("user", ["Hello"]))
    before = list(session.turns)
    with pytest.raises(ValueError, match="exceed"):
        next(session.regenerate(5000))
    assert session.turns == before
    pieces = session.regenerate(LONG)
    pieces.close()
    assert session.turns == before


def test_an_answer_ends_before_a_stop_text_none_of_which_is_shown(assembled: Assembled) -> None:
    session, language = Session(assembled), assembled.model.language
    ids = iter([*language.tokenizer(" A cat. Q: No")["input_ids"]] * 2)
    session.append(Turn("user", ["Hello"]))
    pieces = list(session.stream(99, lambda _: torch.tensor([next(ids)]), [" Q:", "zzz"]))
    assert "".join(pieces) == "A cat."
    assert session.turns[-1] == Turn("assistant", ["A cat."])
    last = Turn("user", ["And?"])
    expected = afresh(session, [*session.turns, last])
    assert told(session, last) == expected
    assert session.spent.kept > 0


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    assert [held(words, ["##", "#a"]) for words in ("a", "a#", "##", "a# ")] == [0, 1, 2, 0]
    assert cut("one ## two", ["two", "##"]) == "one "


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -4.0]])


def draws(**options: Any) -> set[int]:
    return set(Settings(temperature=2.0, **options).chooser()(LOGITS.expand(500, -1)).tolist())


def test_top_k_and_min_p_leave_the_likeliest() -> None:
    assert draws() == {0, 1, 2, 3, 4}
    assert draws(top_k=2) == {0, 1}
    assert draws(min_p=0.4) == {0, 1}, "exp(-1) = 0.37 is below, exp(-0.5) = 0.61 above"


def test_a_penalty_makes_what_was_said_less_likely_whatever_its_sign() -> None:
    choose = Settings(repetition_penalty=4.0).chooser()
    assert [int(choose(LOGITS)) for _ in range(3)] == [0, 1, 0]
    choose = Settings(repetition_penalty=4.0).chooser()
    assert [int(choose(LOGITS - 3)) for _ in range(2)] == [0, 1]


def test_settings_are_set_as_people_write_them() -> None:
    assert changed(Settings(), "top_k", "5").top_k == 5
    assert changed(Settings(), "stop", "##").stops == ["##"]
    for name, value, message in [
        ("temprature", "1", "did you mean temperature"),
        ("x", "1", "there are temperature"),
        ("top_k", "1.5", "number without a point"),
        ("top_p", "2", "at most 1"),
        ("temperature", "nan", "temperature nan"),
        ("min_p", "-1", "between 0"),
        ("max_new_tokens", "0", "at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            changed(Settings(), name, value)


def test_a_private_mark_in_a_message_is_refused(assembled: Assembled) -> None:
    session = Session(assembled)
    with pytest.raises(ValueError, match="private character"):
        told(session, Turn("user", [IMAGE_MARK]))
    assert session.turns == []


def test_another_conversation_about_the_same_pictures_reads_only_what_is_asked(
    model: Assembled, pictures: list[Image.Image]
) -> None:
    session, template, shown = Session(model), model.template, ["Look at ", pictures[0], pictures[1]]
    pieces = template.render([Turn("user", shown)], reply=True)[0].split(IMAGE_MARK)
    first, both = (len(template.tokenize(IMAGE_MARK.join([*pieces[:count], ""]))[0]) for count in (1, 2))
    told(session, Turn("user", [*shown, "What is it?"]))
    for asked in ("How many are there?", "What is it, I think?", ""):
        session.turns = []
        question = Turn("user", [*shown, asked])
        expected = afresh(session, [question])
        assert told(session, question) == expected
        assert template.instructed or session.spent.kept >= both  # else pictures look different with every question
    session.turns = []
    question = Turn("user", ["Look at ", pictures[0], pictures[2], "How many?"])
    expected = afresh(session, [question])
    assert told(session, question) == expected
    assert template.instructed or first <= session.spent.kept < both, "up to the end of the first picture"
