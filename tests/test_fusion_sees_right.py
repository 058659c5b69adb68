"""Blocks inside the language model: a position sees the pictures that it should, and no others."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fusing import (
    BARE,
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
from transformers import AutoModelForCausalLM

from bridges.data.batch import pack
from bridges.data.conversation import Turn
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.flamingo import Flamingo, Gate
from bridges.layout import visible
from bridges.model import BridgedModel
from bridges.sight import sight
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

pytest_plugins = ["fusing"]


@torch.no_grad()
def test_with_closed_gates_the_language_model_says_to_the_bit_what_it_says_alone(
    vision: VisionTower, tower: LanguageTower, conversations: list[list[Turn]]
):
    text = Template(tower.tokenizer, 0, BARE).encode(conversations[2])
    itself = AutoModelForCausalLM.from_pretrained(tower.name, dtype=tower.dtype).eval()
    expected = itself(torch.tensor([text.ids])).logits[0]
    kinds: list[Gate] = ["scalar", "vector", "none"]
    for gate in kinds:
        bridge = Flamingo(vision.dim, vision.num_patches, tower.dim, tower.num_layers, gate=gate, **SMALL)
        model = BridgedModel(vision, bridge.to(tower.dtype), tower, IMAGE_TOKEN_ID)
        assert torch.equal(alone(model, [text])[0], expected), gate


@torch.no_grad()
@ways_of_seeing
def test_every_picture_of_several_in_a_row_tells_something(
    vision: VisionTower, llama: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, llama, sees=sees)
    a, b, c = pictures
    one, other = alone(model, questions(template, [a, b, "Which is larger?"], [c, b, "Which is larger?"]))
    assert (one[-1] - other[-1]).abs().max() > 1e-3


@torch.no_grad()
@ways_of_seeing
def test_what_stands_before_a_picture_does_not_know_it(
    vision: VisionTower, tower: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, tower, sees=sees)
    a, b, c = pictures
    first, second, other = questions(
        template,
        ["Is ", a, " larger than ", b, "?"],
        ["Is ", a, " larger than ", c, "?"],
        ["Is ", c, " larger than ", b, "?"],
    )
    one, two, three = alone(model, [first, second, other])
    begin, again = first.looks.index(1), first.looks.index(2)
    assert begin > 0
    assert len({len(text.ids) for text in (first, second, other)}) == 1
    assert torch.equal(one[:again], two[:again])
    assert torch.equal(one[:begin], three[:begin])
    assert ((one[again:] - two[again:]).abs().amax(1) > 1e-3).all(), "a picture of no consequence"
    assert ((one[begin:again] - three[begin:again]).abs().amax(1) > 1e-3).all(), "a picture of no consequence"


@torch.no_grad()
@ways_of_seeing
def test_a_text_does_not_see_the_pictures_of_those_beside_it(
    vision: VisionTower, family: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, family, sees=sees)
    a, b, c = pictures
    middle = questions(template, ["Is ", a, " larger?"])[0]

    def between(before: Image.Image, after: Image.Image) -> Tensor:
        left, right = questions(template, [before, "Name it."], ["Is ", after, " a cat?"])
        logits = logits_of(model, batch_of(model, [side_by_side([left, middle, right])]))
        return logits[len(left.ids) : -len(right.ids)]

    found = between(b, b)
    assert torch.equal(found, between(c, c))
    assert_same(found, alone(model, [middle])[0])


@torch.no_grad()
def test_the_attention_gives_exactly_nothing_where_there_is_nothing_to_see():
    block: Any = opened(Flamingo(16, 4, 32, 2, **SMALL)).blocks["0"]
    hidden, memory = torch.randn(2, 6, 32), torch.randn(2, 3, 16)
    mask = torch.zeros(2, 1, 6, 3, dtype=torch.bool)
    mask[0, :, 4:] = True
    found = block(hidden, block.keys_values(memory), mask)
    block.attention_gate.zero_()
    nothing = block(hidden, block.keys_values(memory), mask)
    assert torch.equal(found[1], nothing[1])
    assert torch.equal(found[0, :4], nothing[0, :4])
    assert ((found - nothing)[0, 4:].abs().amax(1) > 1e-3).all()
    assert ((found - hidden).abs().amax(2) > 1e-3).all(), "the feed-forward works on every token"


def seen_by(sees: Any, looks: list[int], segments: list[int], pictures: int) -> list[set[int]]:
    """The numbers of the pictures that each position of a row sees."""
    bridge = Flamingo(16, 4, 32, 1, sees=sees, **{**SMALL, "latents": 1})
    row = torch.tensor([looks])
    found = sight(bridge, torch.randn(pictures, 1, 16), row, visible(torch.tensor([segments])))
    there = row[row > 0].unique().tolist() or [0]
    return [{there[i] for i in places.nonzero()[:, 0].tolist()} for places in found.mask[0, 0]]


def test_a_position_sees_the_last_picture_or_all_of_its_own_text():
    plain = ([0, 3, 3, 4, 4, 0], [0, 0, 0, 0, 0, -1])
    assert seen_by("last", *plain, 5)[:-1] == [set(), {3}, {3}, {4}, {4}]
    assert seen_by("all", *plain, 5)[:-1] == [set(), {3}, {3}, {3, 4}, {3, 4}]
    packed = ([0, 1, 1, 2, 1, 3, 0], [0, 0, 1, 1, 2, 2, -1])
    assert seen_by("last", *packed, 3)[:-1] == [set(), {1}, {1}, {2}, {1}, {3}]
    assert seen_by("all", *packed, 3)[:-1] == [set(), {1}, {1}, {1, 2}, {1}, {1, 3}]
    assert seen_by("all", [0, 1, 0, 0, 2], [1, 1, 2, 2, 2], 2) == [set(), {1}, set(), set(), {2}]


@ways_of_seeing
def test_markers_and_pictures_of_other_numbers_are_refused_both_ways(
    vision: VisionTower, conversations: list[list[Turn]], llama: LanguageTower, sees: str
):
    model, template = fused(vision, llama, sees=sees)
    batch = batch_of(model, [pack([template.encode(turns)]) for turns in conversations])
    pixels = batch.pixel_values
    assert pixels is not None
    for given, number in ((pixels[:-1], 6), (None, 0), (torch.cat([pixels, pixels[:2]]), 9)):
        with pytest.raises(ValueError, match=rf"^the texts look at 7 pictures, and there are {number};"):
            logits_of(model, replace(batch, pixel_values=given))
