"""The splice: whatever way a text is computed, packed, padded, with a prefix or from a cache, it is the same text."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import chatml_tokenizer, randomise, tiny_language
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from bridges.build import Assembled
from bridges.data.batch import Batch, Row, collate, pack, rows_of
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.layout import attention_mask, in_lines, needed, predecessors, visible
from bridges.model import BridgedModel, fill_slots
from bridges.objectives.language import language_loss, target_nll
from bridges.projector import Projector
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower


@pytest.fixture(scope="module")
def vision(tiny_clip: Path) -> VisionTower:
    return VisionTower(str(tiny_clip), layer=-2, dtype=torch.float32)


def joined(vision: VisionTower, language: LanguageTower) -> tuple[BridgedModel, Template]:
    """Both towers with a bridge between them that makes four slots of an image, and a template with a system turn."""
    bridge = Projector(vision.dim, vision.num_patches, language.dim, language.num_layers, depth=2, merge="shuffle")
    randomise(bridge)
    template = Template(language.tokenizer, bridge.num_slots, system="You are a helpful assistant.")
    return BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID), template


@pytest.fixture
def joint(vision: VisionTower, family: LanguageTower) -> tuple[BridgedModel, Template]:
    """A model of each family of language models."""
    return joined(vision, family)


@pytest.fixture
def examples(pictures: list[Image.Image]) -> list[Example]:
    """Three texts about one picture; two about two of them; one without any."""
    a, b, c = pictures
    first = [ask("Is it a cat?", "No.", a), ask("Name it.", "A small bird, I think.", a), ask("What?", "Yes.", a)]
    dialogue = [Turn("user", ["Is ", b, " larger than ", c, "?"]), Turn("assistant", ["No."]), Turn("user", ["Sure?"])]
    second = [
        Conversation([*dialogue, Turn("assistant", ["Yes."])]),
        Conversation([Turn("user", ["Is ", b, " a cat?"]), Turn("assistant", ["It is a dog."])]),
    ]
    last = Conversation([Turn("user", ["How many birds?"]), Turn("assistant", ["Four."])])
    return [Example(first), Example(second), Example([last])]


def learnt(model: BridgedModel, rows: list[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of every target, and the bridge's gradient of their sum."""
    model.zero_grad()
    nll = target_nll(model, collate(rows, model.vision.preprocess))
    nll.sum().backward()
    return nll.detach(), {name: p.grad.clone() for name, p in model.bridge.named_parameters()}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        size = gradient.abs().max().item()
        assert size > 1e-3, "a gradient of no consequence"
        torch.testing.assert_close(gradient, other[1][name], atol=1e-5 * max(1, size), rtol=1e-5)


def test_packed_texts_are_learnt_as_if_each_stood_alone(joint: tuple[BridgedModel, Template], examples: list[Example]):
    model, template = joint
    packed = [row for example in examples for row in rows_of(example, template)]
    apart = [row for example in examples for row in rows_of(example, template, share=False)]
    assert (len(packed), len(apart)) == (3, 6)
    assert_same(learnt(model, packed), learnt(model, apart))
    nll, _ = learnt(model, packed)
    one_by_one = [learnt(model, [row])[0] for row in apart]
    torch.testing.assert_close(nll, torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [True, False], ids=["packed", "plain"])
def test_rows_end_to_end_are_learnt_as_rows_side_by_side_with_padding(
    joint: tuple[BridgedModel, Template], examples: list[Example], share: bool, monkeypatch: pytest.MonkeyPatch
):
    model, template = joint
    rows = [row for example in examples for row in rows_of(example, template, share=share)]
    in_line = learnt(model, rows)
    monkeypatch.setattr("bridges.model.LONGEST_LINE", 0)
    assert_same(in_line, learnt(model, rows))


def test_only_what_a_wanted_position_sees_is_needed() -> None:
    """Drawn in the docstring; and the same as the mask says, in random layouts."""
    drawn = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    labelled = predecessors(drawn)[:, [3, 4, 5]]  # of the second token of text 1, and of both of text 2
    found = needed(drawn, (torch.zeros(3, dtype=torch.long), labelled[0]))
    assert found.tolist() == [[True, True, True, False, True, False, False]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        texts = torch.randint(0, 4, (3, 12), generator=generator).sort(1).values
        texts[0, 10:] = -1
        wanted = torch.rand(3, 12, generator=generator) < 0.15
        wanted[0, 10:] = False
        expected = (visible(texts) & wanted[:, :, None]).any(1)
        assert torch.equal(needed(texts, wanted.nonzero(as_tuple=True)), expected)


def test_rows_in_lines_lose_nothing_and_cost_little() -> None:
    lengths = [30, 41, 28, 60, 35, 50, 33, 29]
    index = in_lines(lengths, 576)
    starts = np.cumsum([0, *lengths])
    assert sorted(index[index >= 0].tolist()) == list(range(sum(lengths)))
    for start, length in zip(starts, lengths, strict=False):  # a row stays in one line, in order
        line, place = (index == start).nonzero()[0].tolist()
        assert index[line, place : place + length].tolist() == list(range(start, start + length))
    assert 1 < len(index) < len(lengths)
    assert index.numel() < 1.1 * sum(lengths)
    assert len(in_lines([20, 18, 5], 10_000)) == 1, "a wide model hardly feels the attention"
    assert in_lines([30] * 5, 1).shape == (5, 30), "side by side where attention is nearly all that is paid for"
    assert in_lines([7], 32).tolist() == [list(range(7))]


@pytest.mark.parametrize("share", [True, False], ids=["packed", "plain"])
def test_a_constant_prefix_is_computed_once_and_changes_nothing(
    joint: tuple[BridgedModel, Template], examples: list[Example], share: bool, monkeypatch: pytest.MonkeyPatch
):
    model, template = joint
    rows = [row for example in examples for row in rows_of(example, template, share=share)]
    with_prefix = learnt(model, rows)
    system = template.encode([Turn("system", ["You are a helpful assistant."])]).ids
    assert model._prefix.ids[: len(system)] == tuple(system)
    kept = model._prefix
    assert_same(with_prefix, learnt(model, rows))
    assert model._prefix is kept, "computed twice"
    monkeypatch.setattr(model, "keeps_prefix", False)
    assert_same(with_prefix, learnt(model, rows))


def test_another_prefix_replaces_the_one_that_was_kept(joint: tuple[BridgedModel, Template], examples: list[Example]):
    model, template = joint
    rows = [row for example in examples for row in rows_of(example, template)]
    expected = learnt(model, rows)
    template.system = "Yes. No."
    learnt(model, [row for example in examples for row in rows_of(example, template)])
    assert_same(expected, learnt(model, rows))


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(joint: tuple[BridgedModel, Template], examples: list[Example]):
    model, template = joint
    turns = [c.turns[:-1] for e in examples for c in e.conversations]
    rows = [pack([template.encode(t, reply=True)]) for t in turns]
    assert len({len(row.ids) for row in rows}) > 3
    alone = torch.cat([prefill(model, [row]) for row in rows])
    torch.testing.assert_close(prefill(model, rows), alone, atol=1e-5, rtol=1e-5)
    right = collate(rows, model.vision.preprocess)
    ends = (torch.arange(len(rows)), torch.tensor([len(row.ids) - 1 for row in rows]))
    padded = model(right.input_ids, right.segments, right.positions, ends, right.pixel_values)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def prefill(model: BridgedModel, rows: list[Row], share: bool = True) -> Tensor:
    batch = collate(rows, model.vision.preprocess, left=True, share=share)
    return model.prefill(batch.input_ids, batch.segments, batch.positions, batch.pixel_values)[0]


@torch.no_grad()
def test_padding_in_front_of_everything_changes_nothing(
    joint: tuple[BridgedModel, Template], pictures: list[Image.Image]
):
    model, template = joint
    rows = [pack([template.encode([Turn("user", ["Name it.", pictures[0]])], reply=True)])]
    tail = rows[0].ids[3:]  # begins otherwise, so that nothing is common
    rows.append(Row(tail, tail, [0] * len(tail), list(range(len(tail))), rows[0].images))
    assert prefill(model, rows).shape[0] == 2
    torch.testing.assert_close(
        prefill(model, rows), torch.cat([prefill(model, [row]) for row in rows]), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_what_is_read_token_by_token_from_the_cache_is_what_is_read_in_one_pass(
    joint: tuple[BridgedModel, Template], examples: list[Example]
):
    model, template = joint
    rows = [pack([template.encode(e.conversations[0].turns)]) for e in examples]
    more = 5
    heads = [Row(r.ids[:-more], [], r.segments[:-more], r.positions[:-more], r.images) for r in rows]
    batch = collate(heads, model.vision.preprocess, left=True)
    logits, cache, _ = model.prefill(batch.input_ids, batch.segments, batch.positions, batch.pixel_values)
    mask, steps = (batch.segments >= 0).long(), [logits]
    at = (torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.long))
    for step in range(more - 1):
        tokens = torch.tensor([[row.ids[step - more]] for row in rows])
        positions = torch.tensor([[row.positions[step - more]] for row in rows])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        steps.append(model.language(model.language.embed(tokens), mask, positions, at, cache))
    for place, row in enumerate(rows):
        whole = collate([row], model.vision.preprocess)
        last = torch.arange(len(row.ids) - more - 1, len(row.ids) - 1)
        expected = model(whole.input_ids, whole.segments, whole.positions, (last * 0, last), whole.pixel_values)
        torch.testing.assert_close(torch.stack([s[place] for s in steps]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3"])
def test_a_text_that_fits_the_window_is_learnt_packed_and_a_longer_one_alone(
    vision: VisionTower, name: str, examples: list[Example], tmp_path: Path
):
    """The window of a sliding attention is counted in columns, which gaps and other texts shift."""
    window = LanguageTower(str(tiny_language(name, tmp_path / "window", sliding_window=24)), dtype=torch.float32)
    wide = LanguageTower(str(tiny_language(name, tmp_path / "wide", sliding_window=64)), dtype=torch.float32)
    whole, template = joined(vision, wide)
    packed = [row for e in examples for row in rows_of(e, template)]
    apart = [row for e in examples for row in rows_of(e, template, share=False)]
    assert max(len(row.ids) for row in packed) > 64 > max(len(row.ids) for row in apart), "not what is to be tried"
    assert_same(learnt(whole, packed), learnt(whole, apart))

    model, _ = joined(vision, window)
    alone = [learnt(model, [row])[0] for row in apart]
    torch.testing.assert_close(torch.cat(alone), learnt(model, apart)[0], atol=1e-5, rtol=1e-5)
    assert (torch.cat(alone) - learnt(whole, apart)[0]).abs().max() > 1e-2, "the window shuts nothing out"
    with pytest.raises(ValueError, match=r"cannot read texts of \d+ tokens packed.* window of 24 .*give it plain rows"):
        learnt(model, packed)
    with pytest.raises(ValueError, match=r"padded amid a row"):
        prefill(model, apart)
    prompts = torch.cat([prefill(model, [row]) for row in apart])
    torch.testing.assert_close(prefill(model, apart, share=False), prompts, atol=1e-5, rtol=1e-5)
    row = collate(apart[:1], model.vision.preprocess)
    reference = window.model(inputs_embeds=model.embed(row.input_ids, model.see(row.pixel_values).slots)).logits
    at = (torch.zeros(1, dtype=torch.long), torch.tensor([len(apart[0].ids) - 1]))
    ours = model(row.input_ids, row.segments, row.positions, at, row.pixel_values)
    torch.testing.assert_close(ours, reference[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config", [BloomConfig(hidden_size=32, n_layer=2, n_head=4), MptConfig(d_model=32, n_layers=2, n_heads=4)]
)
def test_a_family_without_positions_learns_and_reads_plain_rows(
    vision: VisionTower, config: Any, examples: list[Example], tmp_path: Path
):
    tokenizer = chatml_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config.vocab_size = len(tokenizer)
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    model, template = joined(vision, LanguageTower(str(tmp_path), dtype=torch.float32))
    apart = [row for e in examples for row in rows_of(e, template, share=False)]
    alone = [learnt(model, [row])[0] for row in apart]
    torch.testing.assert_close(learnt(model, apart)[0], torch.cat(alone), atol=1e-5, rtol=1e-5)
    prompts = torch.cat([prefill(model, [row]) for row in apart])
    torch.testing.assert_close(prefill(model, apart, share=False), prompts, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"no positions to restart.*give it plain rows"):
        learnt(model, [row for e in examples for row in rows_of(e, template)])
    with pytest.raises(ValueError, match=r"padded amid a row"):
        prefill(model, apart)


@torch.no_grad()
def test_features_may_stand_for_pixels(assembled: Assembled, examples: list[Example]):
    model, template, _ = assembled
    batch = collate([row for e in examples for row in rows_of(e, template)], model.vision.preprocess)
    assert batch.pixel_values is not None
    features = model.vision(batch.pixel_values)
    again = Batch(**{**vars(batch), "pixel_values": None, "features": features})
    assert torch.equal(target_nll(model, batch), target_nll(model, again))


def test_a_batch_without_pictures_keeps_the_bridge_in_the_graph(assembled: Assembled, examples: list[Example]):
    model, template, _ = assembled
    loss, targets = language_loss(model, collate(rows_of(examples[-1], template)))
    assert targets > 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.bridge.parameters())


@torch.no_grad()
def test_logits_after_padding_or_of_no_position_are_none(assembled: Assembled, examples: list[Example]):
    model, template, _ = assembled
    batch = collate(rows_of(examples[0], template), model.vision.preprocess)
    nowhere = (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    logits = model(batch.input_ids, batch.segments, batch.positions, nowhere, batch.pixel_values)
    assert logits.shape == (0, model.language.model.config.vocab_size)


def test_too_many_or_too_few_pictures_are_refused_with_both_numbers(assembled: Assembled, examples: list[Example]):
    model, template, _ = assembled
    batch = collate(rows_of(examples[0], template), model.vision.preprocess)
    assert batch.pixel_values is not None
    with pytest.raises(ValueError, match=r"the text has 16 image positions, but 2 images x 16 slots = 32"):
        model.embed(batch.input_ids, model.see(batch.pixel_values.repeat(2, 1, 1, 1)).slots)
    with pytest.raises(ValueError, match=r"the text has 16 image positions, but 0 images x 16 slots = 0"):
        model.embed(batch.input_ids, model.see().slots)


def test_slots_are_filled_in_reading_order_and_words_stay():
    embeds, is_image = torch.zeros(2, 4, 1), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    slots = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert fill_slots(embeds, is_image, slots)[..., 0].tolist() == [[0, 1, 2, 0], [3, 4, 0, 0]]


def test_the_drawing_of_the_mask_is_the_mask():
    lines = [line.split() for line in (attention_mask.__doc__ or "").splitlines()]
    header = next(line[1:] for line in lines if line[:1] == ["segment"])
    rows = [line[1:] for line in lines if len(line) == len(header) + 1 and set(line[1:]) <= {"x", "."}]
    names = [line[0] for line in lines if len(line) == len(header) + 1 and set(line[1:]) <= {"x", "."}]
    assert names == header
    assert len(rows) == 7
    segments = torch.tensor([[-1 if s == "-" else int(s) for s in header]])
    mask = attention_mask(segments, torch.float32)
    assert mask.shape == (1, 1, 7, 7)
    drawn = torch.tensor([[mark == "x" for mark in row] for row in rows])
    assert torch.equal(mask[0, 0] == 0, drawn)
    assert (mask[0, 0][~drawn] == torch.finfo(torch.float32).min).all()
    assert torch.equal(attention_mask(segments, torch.float32, skip=3), mask[:, :, 3:])


def test_rows_end_to_end_do_not_see_each_other():
    segments, rows = torch.tensor([[0, 1, 2, 0, 0, 1]]), torch.tensor([[0, 0, 0, 1, 2, 2]])
    whole = attention_mask(segments, torch.float32, rows=rows)[0, 0] == 0
    for row, columns in enumerate(([0, 1, 2], [3], [4, 5])):
        own = attention_mask(segments[:, columns], torch.float32, rows=torch.full((1, len(columns)), row))[0, 0] == 0
        assert torch.equal(whole[columns][:, columns], own)
        whole[columns[0] : columns[-1] + 1, columns[0] : columns[-1] + 1] = False
    assert not whole.any()


def test_plain_rows_have_the_usual_mask():
    segments = torch.tensor([[0, 0, 0, -1], [0, -1, 0, 0]])
    assert torch.equal(attention_mask(segments, torch.float32), torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]]))


def test_the_drawing_of_the_predecessors_is_what_they_are():
    drawn = re.search(r"segment\s+([\d ]+?)\s+->\s+([\d ]+)", predecessors.__doc__ or "")
    assert drawn
    segments, columns = ([int(i) for i in figures.split()] for figures in drawn.groups())
    assert predecessors(torch.tensor([segments, [0] * len(segments)])).tolist() == [columns, [0, 0, 1, 2, 3, 4]]
