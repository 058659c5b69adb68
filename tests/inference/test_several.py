"""Several answers to a prompt that is read once: beams as transformers has them, draws as one by one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import randomise
from PIL import Image

from bridges.build import Assembled, build
from bridges.data.batch import collate, pack
from bridges.data.conversation import Turn
from bridges.inference.decoding import answers
from bridges.inference.sampling import sampler
from bridges.inference.several import beam_search, several
from bridges.objectives.language import target_nll

FLAMINGO: dict[str, Any] = dict(
    name="flamingo", latents=3, depth=1, resampler_heads=2, resampler_head_dim=8, heads=2, head_dim=8
)


@pytest.fixture(scope="module", params=[{"name": "projector"}, FLAMINGO], ids=["projector", "flamingo"])
def seeing(request: Any, built: Assembled) -> Assembled:
    assembled = build(replace(built.recipe, bridge=request.param))
    randomise(assembled.model.bridge)
    return assembled


@pytest.fixture
def turns(pictures: list[Image.Image]) -> list[Turn]:
    return [Turn("user", [pictures[0], "Is it larger than ", pictures[1], "?"])]


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("longest", [1, 6, 12])
@torch.no_grad()
def test_beams_are_those_of_transformers(built: Assembled, beams: int, longest: int) -> None:
    language = built.model.language
    ids = torch.tensor([[5, 9, 11, 3, 17]])
    # any token may end an answer of random weights; make it one that does so now and then
    mask = torch.ones_like(ids).expand(beams, -1)
    cache = language.empty_cache()
    at = (torch.tensor([0]), torch.tensor([4]))
    logits = language(language.embed(ids), mask[:1], torch.arange(5)[None], at, cache)
    end = int(logits[0].topk(3).indices[2])
    language.end_ids, before = frozenset([end]), language.end_ids
    try:
        cache.batch_repeat_interleave(beams)
        found = beam_search(language, logits.expand(beams, -1), mask, mask.sum(1), cache, longest)
    finally:
        language.end_ids = before
    theirs = language.model.generate(
        ids,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    expected = [row[5:].tolist() for row in theirs]
    assert [ids + [0] * (len(expected[0]) - len(ids)) for ids in found] == expected


@torch.no_grad()
def test_one_beam_is_greedy_and_more_find_no_worse(seeing: Assembled, turns: list[Turn]) -> None:
    greedy = answers(seeing, [turns], max_new_tokens=6)[0]
    assert several(seeing, turns, 1, 6) == [greedy]
    told = several(seeing, turns, 4, 6)
    assert len(set(told)) > 1
    scores = [mean_nll(seeing, turns, answer) for answer in told]
    assert scores[0] <= mean_nll(seeing, turns, greedy) + 1e-5


def mean_nll(assembled: Assembled, turns: Sequence[Turn], answer: str) -> float:
    """Nats a token of an answer, read in one pass."""
    text = assembled.template.encode([*turns, Turn("assistant", [answer])])
    batch = collate([pack([text])], assembled.model.vision.preprocess)
    return float(target_nll(assembled.model, batch).mean())


def test_draws_are_those_of_as_many_prompts(seeing: Assembled, turns: list[Turn]) -> None:
    told = several(seeing, turns, 3, 5, sampler(1.0, 1.0, seed=4))
    assert told == answers(seeing, [turns] * 3, max_new_tokens=5, choose=sampler(1.0, 1.0, seed=4))
    assert len(set(told)) > 1


def test_no_answers_are_refused(built: Assembled) -> None:
    with pytest.raises(ValueError, match=r"^0 answers: ask for at least 1"):
        several(built, [Turn("user", ["?"])], 0)
