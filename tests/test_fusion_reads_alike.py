"""Blocks inside the language model: however a text is laid out, kept or cut, it is read and learnt the same."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from fusing import (
    BARE,
    CLOSE,
    SMALL,
    alone,
    assert_same,
    batch_of,
    fused,
    logits_of,
    opened,
    questions,
    side_by_side,
    ways_of_seeing,
)
from PIL import Image
from torch import Tensor

from bridges.build import Assembled, build
from bridges.data.batch import Row, cut, pack
from bridges.data.conversation import Turn, images_of
from bridges.data.template import Encoded, Template
from bridges.flamingo import Flamingo
from bridges.inference.decoding import decode
from bridges.inference.session import Session
from bridges.model import BridgedModel
from bridges.objectives.language import language_loss, target_nll
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

pytest_plugins = ["fusing"]


@ways_of_seeing
@pytest.mark.parametrize("pictures_first", [True, False])
def test_what_all_rows_begin_with_is_read_once_in_a_line_and_learnt_alike(
    vision: VisionTower,
    llama: LanguageTower,
    conversations: list[list[Turn]],
    sees: Any,
    pictures_first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks train, so it is no constant; and rows that begin with a picture begin with the same words, its tag."""
    model, template = fused(vision, llama, every=1, sees=sees)
    template.system = "You are a helpful assistant."
    turns = [conversations[0], *conversations[:1]] if pictures_first else conversations
    batch = batch_of(model, [pack([template.encode(turn)]) for turn in turns])
    read = []
    model.language.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    gradients = []
    for keeps in (True, False):
        monkeypatch.setattr(model, "keeps_prefix", keeps)
        model.zero_grad()
        language_loss(model, batch)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.bridge.named_parameters() if p.grad is not None})
    assert read[0] < read[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


class Told(NamedTuple):
    """A model, texts, and their logits where each is read alone and in one pass."""

    model: BridgedModel
    texts: list[Encoded]
    logits: list[Tensor]


@pytest.fixture(scope="module", params=["last", "all"])
def told(request: Any, vision: VisionTower, tower: LanguageTower, conversations: list[list[Turn]]) -> Told:
    model, template = fused(vision, tower, sees=request.param)
    texts = [template.encode(turns) for turns in conversations]
    with torch.no_grad():
        return Told(model, texts, alone(model, texts))


@torch.no_grad()
def test_texts_side_by_side_or_end_to_end_are_read_as_if_each_stood_alone(told: Told, request: pytest.FixtureRequest):
    model, texts, logits = told
    rows, expected = [pack([text]) for text in texts], torch.cat(logits)
    assert len({len(row.ids) for row in rows}) > 3
    assert_same(logits_of(model, batch_of(model, rows)), expected)  # end to end, in families that can
    request.getfixturevalue("in_rows")
    assert_same(logits_of(model, batch_of(model, rows)), expected)
    assert_same(logits_of(model, batch_of(model, rows, left=True, share=False)), expected)
    if model.language.takes_positions:  # padding then stands after the word that both begin with
        batch = batch_of(model, rows[1:3], left=True)
        assert batch.segments[:, 0].tolist() == [0, 0]
        assert -1 in batch.segments
        assert_same(logits_of(model, batch), torch.cat(logits[1:3]))


def test_texts_in_one_row_are_read_and_learnt_as_if_each_stood_alone(told: Told):
    model, texts, logits = told
    order = [0, 1, 4, 2, 3]
    rows = [side_by_side([texts[i] for i in some]) for some in (order[:2], order[2:])]
    if not model.language.takes_positions:
        with pytest.raises(ValueError, match=r"no positions to restart.*give it plain rows"):
            logits_of(model, batch_of(model, rows))
        return
    with torch.no_grad():
        assert_same(logits_of(model, batch_of(model, rows)), torch.cat([logits[i] for i in order]))
        assert_same(logits_of(model, batch_of(model, rows[:1])), torch.cat([logits[i] for i in order[:2]]))
    assert_learnt_the_same(model, rows, [pack([texts[i]]) for i in order])


def assert_learnt_the_same(model: BridgedModel, rows: Sequence[Row], others: Sequence[Row]) -> None:
    """The same negative log-likelihood of every target, and the same gradients of their sum."""
    (nll, gradients), (expected, wanted) = (learnt(model, each) for each in (rows, others))
    close = CLOSE[expected.dtype]
    torch.testing.assert_close(nll, expected, atol=close, rtol=close)
    for name, gradient in gradients.items():
        size = wanted[name].abs().max().item()
        assert size > 1e-4, f"{name}: a gradient of no consequence"
        torch.testing.assert_close(gradient, wanted[name], atol=close * max(1, size), rtol=close)


def learnt(model: BridgedModel, rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    nll = target_nll(model, batch_of(model, rows))
    nll.sum().backward()
    return nll.detach(), {name: p.grad.clone() for name, p in model.bridge.named_parameters() if p.grad is not None}


@ways_of_seeing
def test_questions_about_a_picture_share_it_and_are_learnt_as_if_each_stood_alone(
    vision: VisionTower, llama: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, llama, sees=sees)
    a, b, c = pictures
    first = questions(template, [a, "Is it a cat?"], [a, "Is it red?"], [a, "Is it a ", b, " or ", c, "?"])
    second = questions(template, ["In ", b, " is a cat?"], ["In ", b, " is no cat?"])
    packed = [pack(first), pack(second)]
    assert all(row.segments.count(0) > 1 for row in packed)
    assert_learnt_the_same(model, packed, [pack([text]) for text in [*first, *second]])


@ways_of_seeing
def test_questions_about_different_pictures_share_nothing_that_saw_one(
    vision: VisionTower, llama: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, llama, sees=sees)
    a, b, c = pictures
    texts = questions(template, ["Is ", a, " a cat?"], ["Is ", b, " a cat?"], ["Is ", c, " a dog?"])
    assert_learnt_the_same(model, [pack(texts)], [pack([text]) for text in texts])


def test_a_picture_that_questions_share_is_encoded_once(llama: LanguageTower, pictures: list[Image.Image]):
    template = Template(llama.tokenizer, 0, BARE)
    texts = questions(template, [pictures[0], "Is it a cat?"], [pictures[0], "Is it red?"], [pictures[0], "Is it?"])
    assert pack(texts).images == pictures[:1]


@torch.no_grad()
def test_what_is_said_from_the_cache_is_what_is_read_in_one_pass(told: Told):
    model, texts, whole = told
    tower, more = model.language, 4
    rows = [pack([cut(text, len(text.ids) - more)]) for text in texts]
    batch = batch_of(model, rows, left=True, share=tower.takes_positions)
    read = (batch.input_ids, batch.segments, batch.positions, batch.pixel_values)
    logits, cache, seen = model.prefill(*read, looks=batch.looks)
    mask, lengths = (batch.segments >= 0).long(), torch.tensor([len(row.ids) for row in rows])
    steps: list[Tensor] = []

    def choose(given: Tensor) -> Tensor:
        steps.append(given)
        return torch.tensor([text.ids[len(steps) - 1 - more] for text in texts])

    for _ in zip(range(more), decode(tower, logits, mask, lengths, cache, choose, seen), strict=False):
        pass
    expected = torch.cat([logits[-more - 1 : -1] for logits in whole])
    assert_same(torch.stack(steps, dim=1).flatten(0, 1), expected)


@torch.no_grad()
def test_a_text_read_in_pieces_is_what_is_read_in_one_pass(told: Told):
    model, tower = told.model, told.model.language
    for text, logits in zip(told.texts, told.logits, strict=True):
        if len(text.images) < 2:
            continue
        ids, looks = torch.tensor([text.ids]), torch.tensor([text.looks])
        whole = model.sight(model.see(model.vision.preprocess(text.images)).memory, looks, torch.zeros_like(ids))
        assert whole is not None
        cache, found = tower.empty_cache(), []
        for begin, end in ((0, 1), (1, 5), (5, len(text.ids))):
            at = (torch.zeros(end - begin, dtype=torch.long), torch.arange(end - begin))
            read, positions = torch.ones(1, end, dtype=torch.long), torch.arange(begin, end)[None]
            piece = slice(begin, end)
            found.append(tower(tower.embed(ids[:, piece]), read, positions, at, cache, whole.of(piece)))
        assert_same(torch.cat(found), logits)


@torch.no_grad()
@ways_of_seeing
def test_turns_of_a_session_are_read_as_the_conversation_in_one_go(
    built: Assembled, pictures: list[Image.Image], sees: str
):
    assembled = build(replace(built.recipe, bridge={"name": "flamingo", "sees": sees, **SMALL}))
    model, template, _ = assembled
    assert isinstance(model.bridge, Flamingo)
    opened(model.bridge)
    a, b, c = pictures
    replies, steps = ["Two small birds.", "Yes, it is.", "A blue car.", "No."], []
    session = Session(assembled)
    asked = [[a, "What is it?"], ["Is it a cat?"], ["Look: ", b, " and ", c, ". Name it."], ["Is ", a, " larger?"]]
    for words, reply in zip(asked, replies, strict=True):
        ids = iter([*template.tokenizer(reply, add_special_tokens=False)["input_ids"], template.tokenizer.eos_token_id])

        def choose(logits: Tensor, ids: Any = ids) -> Tensor:
            steps.append(logits)
            return torch.tensor([next(ids)])

        session.append(Turn("user", words))
        assert "".join(session.stream(16, choose)) == reply
    text = template.encode(session.turns)
    targets = [place for place, label in enumerate(text.labels) if label >= 0]
    assert len(targets) > 12
    assert_same(torch.cat(steps), alone(model, [text])[0][torch.tensor(targets) - 1])
    assert len(images_of(session.turns)) == 4
