"""A conversation read turn by turn, from a cache, is the conversation read in one go."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, tiny_language
from PIL import Image
from torch import Tensor

from bridges.build import Assembled, build
from bridges.config import Recipe
from bridges.data.conversation import Turn
from bridges.data.template import IGNORE_INDEX, Template
from bridges.inference.decoding import Choose, answers, greedy
from bridges.inference.session import Session

QUESTIONS = ["What is in the picture?", "How many birds are there?", "Is this one larger? Look!", "Name it."]
REPLIES = ["Two small birds.", "Two, I think.", "Yes, it is.", "A blue car."]
MARKS_THE_LAST = (
    "{% for m in messages %}{% if loop.last %}[now] {% endif %}" + CHATML.split("{% for m in messages %}")[1]
)
FORGETS_REPLIES = CHATML.replace(
    "<|im_start|>{{ m.role }}", "{% if m.role == 'user' or loop.last %}<|im_start|>{{ m.role }}"
)
FORGETS_REPLIES = FORGETS_REPLIES.replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")


@pytest.fixture
def questions(pictures: list[Image.Image]) -> list[Turn]:
    """Four turns of the user; there are pictures in the first and, two of them, in the third."""
    shown = [pictures[:1], [], pictures[1:], []]
    return [Turn("user", [*images, text]) for images, text in zip(shown, QUESTIONS, strict=True)]


def scripted(ids: Sequence[int], seen: list[Tensor] | None = None) -> Choose:
    """Says these ids, whatever the model would say, and keeps the logits."""
    following = iter(ids)

    def choose(logits: Tensor) -> Tensor:
        if seen is not None:
            seen.append(logits)
        return torch.tensor([next(following)])

    return choose


def ids_of(assembled: Assembled, text: str) -> list[int]:
    tokenizer = assembled.template.tokenizer
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def reply(session: Session, turn: Turn, max_new_tokens: int = 16, choose: Choose = greedy) -> str:
    session.append(turn)
    return "".join(session.stream(max_new_tokens, choose))


def talk(session: Session, questions: Sequence[Turn], seen: list[Tensor] | None = None, space: str = "") -> None:
    """The questions, with the scripted replies; `space` is what the template puts before their words."""
    for turn, text in zip(questions, REPLIES, strict=False):
        assert reply(session, turn, choose=scripted(ids_of(session.assembled, space + text), seen)) == text


def likeliest(into: list[int]) -> Choose:
    """Greedy, and keeps the ids."""

    def choose(logits: Tensor) -> Tensor:
        tokens = greedy(logits)
        into.extend(tokens.tolist())
        return tokens

    return choose


def spoken(session: Session, turn: Turn) -> list[int]:
    """The ids of the session's own reply."""
    ids: list[int] = []
    reply(session, turn, choose=likeliest(ids))
    return ids


def afresh(session: Session, turn: Turn) -> list[int]:
    """The ids that the model says when it reads the whole conversation anew."""
    ids: list[int] = []
    answers(session.assembled, [[*session.turns, turn]], max_new_tokens=16, choose=likeliest(ids))
    return ids


def counted(module: torch.nn.Module, count: Callable[[tuple[Any, ...]], int]) -> list[int]:
    """Grows by one number with each call of the module."""
    numbers: list[int] = []
    module.register_forward_pre_hook(lambda _, args: numbers.append(count(args)))
    return numbers


def same_in_one_go(assembled: Assembled, questions: Sequence[Turn], space: str = "") -> None:
    session, seen = Session(assembled), []
    tokens = counted(assembled.model.language, lambda args: args[0].shape[1])
    talk(session, questions, seen, space)
    model, template, _ = assembled
    text = template.encode(session.turns)
    ids = torch.tensor([text.ids])
    targets = [place for place, label in enumerate(text.labels) if label != IGNORE_INDEX]
    at = (torch.zeros(len(targets), dtype=torch.long), torch.tensor(targets) - 1)
    unread = len(template.tokenize(template.render(session.turns)[0].rpartition(REPLIES[-1])[2])[0])
    assert sum(tokens) == len(text.ids) - unread, "each token is read once; the end of the last reply has not been yet"
    embeds = model.embed(ids, model.see(model.vision.preprocess(text.images)).slots)
    whole = model.language(embeds, torch.ones_like(ids), torch.arange(len(text.ids))[None], at)
    cached = torch.cat(seen)
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
    assert cached.argmax(-1).tolist() == whole.argmax(-1).tolist()
    assert cached.std(0).max() > 0.1, "logits that are all alike would be close to anything"


def test_four_turns_from_the_cache_have_the_logits_of_the_conversation_in_one_go(
    assembled: Assembled, questions: list[Turn]
) -> None:
    same_in_one_go(assembled, questions)


def test_so_do_those_of_a_model_with_a_window_shorter_than_a_turn(
    recipe: Recipe, questions: list[Turn], tmp_path: Path
) -> None:
    recipe.language.name = str(tiny_language("mistral", tmp_path / "mistral", sliding_window=24))
    same_in_one_go(build(recipe), questions)


def test_turns_are_what_was_said(assembled: Assembled, questions: list[Turn]) -> None:
    session = Session(assembled)
    talk(session, questions)
    expected = [t for q, r in zip(questions, REPLIES, strict=True) for t in (q, Turn("assistant", [r]))]
    assert session.turns == expected


def test_so_do_those_of_a_template_that_puts_a_space_before_the_words(
    assembled: Assembled, questions: list[Turn]
) -> None:
    template = Template(assembled.template.tokenizer, assembled.template.num_slots, "vicuna")
    same_in_one_go(assembled._replace(template=template), questions, space=" ")


def test_each_image_is_encoded_once(assembled: Assembled, questions: list[Turn]) -> None:
    session = Session(assembled)
    images = counted(assembled.model.vision, lambda args: len(args[0]))
    talk(session, questions)
    assert [count for count in images if count] == [1, 2]


def test_a_reply_that_is_broken_off_stays_and_the_talk_goes_on(assembled: Assembled, questions: list[Turn]) -> None:
    session = Session(assembled)
    session.append(questions[0])
    pieces = session.stream(16, scripted(ids_of(assembled, "Two small birds sit")))
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert "Two small birds sit".startswith(heard)
    assert session.turns == [questions[0], Turn("assistant", [heard])]
    expected = afresh(session, questions[2])
    assert spoken(session, questions[2]) == expected


def test_a_reply_cut_by_its_limit_is_gone_on_from(assembled: Assembled, questions: list[Turn]) -> None:
    session = Session(assembled)
    ids = ids_of(assembled, "Two small birds sit above the blue car.")
    heard = reply(session, questions[0], 3, scripted(ids))
    assert heard == assembled.model.language.decode(ids[:3])
    expected = afresh(session, questions[1])
    assert spoken(session, questions[1]) == expected


def test_a_reply_ended_by_another_token_than_the_template_s_goes_on_as_the_template_says(
    assembled: Assembled, questions: list[Turn]
) -> None:
    session, language = Session(assembled), assembled.model.language
    other = assembled.template.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    language.end_ids |= {other}
    said = [*ids_of(assembled, "A cat.")[:-1], other]
    assert reply(session, questions[0], choose=scripted(said)) == "A cat."
    expected = afresh(session, questions[1])
    assert spoken(session, questions[1]) == expected


def test_clear_forgets_everything(assembled: Assembled, questions: list[Turn]) -> None:
    session = Session(assembled)
    talk(session, questions)
    session.clear()
    assert session.turns == []
    assert spoken(session, questions[2]) == spoken(Session(assembled), questions[2])


def test_a_template_that_rewrites_the_past_costs_time_but_not_the_answer(
    assembled: Assembled, questions: list[Turn]
) -> None:
    template = Template(assembled.template.tokenizer, assembled.template.num_slots, MARKS_THE_LAST)
    session = Session(assembled._replace(template=template))
    images = counted(assembled.model.vision, lambda args: len(args[0]))
    talk(session, questions[:3])
    assert sum(images) == 3, "the words are read again, the images are not"
    expected = afresh(session, questions[3])
    assert spoken(session, questions[3]) == expected


def test_a_template_that_drops_what_was_said_is_refused_and_the_session_stays(
    assembled: Assembled, questions: list[Turn]
) -> None:
    template = Template(assembled.template.tokenizer, assembled.template.num_slots, FORGETS_REPLIES)
    session = Session(assembled._replace(template=template))
    talk(session, questions[:1])
    before = list(session.turns)
    with pytest.raises(ValueError, match="leaves out what the assistant says"):
        reply(session, questions[1])
    assert session.turns == before


def test_a_prompt_beyond_the_context_is_refused_and_leaves_the_session_as_it_was(
    assembled: Assembled, questions: list[Turn], pictures: list[Image.Image]
) -> None:
    session, other = Session(assembled), Session(assembled)
    talk(session, questions[:2])
    talk(other, questions[:2])
    before = list(session.turns)
    with pytest.raises(ValueError, match="exceed the 512 positions"):
        reply(session, Turn("user", [*pictures, "the house " * 300]))
    assert session.turns == before
    for turn in questions[2:]:
        assert spoken(session, turn) == spoken(other, turn)


@pytest.mark.parametrize("steps", [0, 3], ids=["while it reads the prompt", "while it speaks"])
def test_an_exception_amid_a_step_leaves_a_session_that_can_go_on(
    assembled: Assembled, questions: list[Turn], steps: int
) -> None:
    def interrupt(*_: object) -> None:
        if next(countdown) == 0:
            raise KeyboardInterrupt

    session = Session(assembled)
    talk(session, questions[:1])
    countdown: Iterator[int] = iter(range(steps, -100, -1))
    hook = assembled.model.language.model.model.layers[1].register_forward_pre_hook(
        interrupt
    )  # the first layer is done
    with pytest.raises(KeyboardInterrupt):
        reply(session, questions[2], choose=scripted(ids_of(assembled, REPLIES[2])))
    hook.remove()
    said = assembled.model.language.decode(ids_of(assembled, REPLIES[2])[:steps])
    assert session.turns[2:] == ([questions[2], Turn("assistant", [said])] if steps else [])
    other = Turn("user", [*reversed(questions[2].content[:-1]), "And these?"])
    expected = afresh(session, other)
    assert spoken(session, other) == expected


def test_no_piece_splits_a_character(assembled: Assembled, questions: list[Turn]) -> None:
    text = "Hé 🙂, 👨‍👩‍👧 and 你好!"
    ids = ids_of(assembled, text)
    assert len(ids) > len(text) + 10, "the tiny tokenizer gives such characters several tokens each"
    session = Session(assembled)
    session.append(questions[0])
    pieces = list(session.stream(99, scripted(ids)))
    assert "".join(pieces) == text
    assert len(pieces) == len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_half_a_character_is_dropped_from_the_turn_and_from_what_is_remembered(
    assembled: Assembled, questions: list[Turn]
) -> None:
    ids = ids_of(assembled, "Yes 🙂")
    session = Session(assembled)
    heard = reply(session, questions[0], len(ids) - 2, scripted(ids))
    assert heard == "Yes "
    expected = afresh(session, questions[1])
    assert spoken(session, questions[1]) == expected


def test_where_nothing_was_said_another_answer_can_be_given(assembled: Assembled, questions: list[Turn]) -> None:
    half = assembled.template.tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    session = Session(assembled)
    assert reply(session, questions[0], 1, scripted(half)) == "", "half a character is nothing"
    ids: list[int] = []
    said = "".join(session.regenerate(16, likeliest(ids)))
    assert session.spent.read == 0, "the prompt is known"
    other: list[int] = []
    assert answers(assembled, [questions[:1]], max_new_tokens=16, choose=likeliest(other)) == [said]
    assert ids == other
