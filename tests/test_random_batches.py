"""Random batches: packed, grouped, in lines, after a kept prefix or plain, a text is learnt as if it stood alone."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, tiny_recipe
from PIL import Image
from torch import Tensor

from bridges.benchmark.ours import open_gates
from bridges.build import Assembled, build
from bridges.data.batch import Batch, Row, collate, rows_of
from bridges.data.conversation import Conversation, Example, Turn, images_of
from bridges.objectives.language import target_nll

GATED: dict[str, Any] = dict(name="flamingo", latents=3, depth=1, resampler_heads=2, heads=2, head_dim=8, inner=24)
BRIDGES: dict[str, dict[str, Any]] = {
    "projector": {"name": "projector", "merge": "shuffle", "depth": 2},
    "qformer": {"name": "qformer", "queries": 3, "layers": 2, "width": 32, "heads": 4, "inner": 48},
    "resampler": {"name": "resampler", "latents": 3, "depth": 2, "heads": 2, "head_dim": 8},
    "flamingo": GATED,
    "flamingo, all seen": {**GATED, "sees": "all", "tag": "learnt"},
}
WORDS = " ".join(SENTENCES).split()
SEEDS = (0, 1, 3, 4)


@pytest.fixture(scope="module", params=BRIDGES)
def model(request: pytest.FixtureRequest, tiny_clip: Path, tiny_llama: Path) -> Assembled:
    recipe = tiny_recipe(tiny_clip, tiny_llama, Path("unused"))
    recipe.bridge, recipe.language.system = BRIDGES[request.param], "You are a helpful assistant."
    assembled = build(recipe)
    open_gates(assembled.model.bridge, 0.7)
    return assembled


def drawn(rng: Random, pictures: list[Image.Image]) -> list[Example]:
    """One to four examples of one to six texts; a text has none to four pictures, some of them those of the others."""

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def turn(shown: list[Image.Image]) -> Turn:
        return Turn("user", [part for picture in shown for part in (picture, words(4))] + [words(12)])

    examples = []
    for _ in range(rng.randint(1, 4)):
        shared = rng.sample(pictures, rng.randint(0, 4))
        begin = [part for picture in shared for part in (picture, words(3))]
        texts = []
        for _ in range(rng.randint(1, 6)):
            first = Turn("user", [*begin, words(12)]) if rng.random() < 0.7 else turn(rng.sample(pictures, 2))
            turns = [first, Turn("assistant", [words(20)])]
            if rng.random() < 0.3:
                turns += [turn(rng.sample(pictures, rng.randint(0, 1))), Turn("assistant", [words(9)])]
            texts.append(Conversation(turns))
        examples.append(Example(texts))
    return examples


def learnt(model: Assembled, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every target, and the bridge's gradient of their sum."""
    model.model.zero_grad()
    found = []
    for batch in batches:
        nll = target_nll(model.model, batch)
        nll.sum().backward()
        found.append(nll.detach())
    gradients = [p.grad.flatten() for p in model.model.bridge.parameters() if p.grad is not None]
    return torch.cat(found), torch.cat(gradients).clone()


def seeded(seed: int) -> list[Example]:
    """Examples with pictures of noise, of different sizes."""
    rng, noise = Random(seed), np.random.default_rng(seed)
    sizes = [(rng.randint(20, 50), rng.randint(20, 50), 3) for _ in range(5)]
    pictures = [Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)) for size in sizes]
    return drawn(rng, pictures)


def test_the_seeds_draw_every_number_of_texts_and_pictures() -> None:
    examples = [example for seed in SEEDS for example in seeded(seed)]
    assert {len(example.conversations) for example in examples} == set(range(1, 7))
    pictures = {len(images_of(text.turns)) for example in examples for text in example.conversations}
    assert pictures >= set(range(5))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_way_to_compute_a_batch_has_the_same_losses_and_gradients(
    model: Assembled, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = seeded(seed)
    vision = model.model.vision

    def batch(rows: list[Row]) -> Batch:
        return collate(rows, vision.preprocess)

    grouped = [row for example in examples for row in rows_of(example, model.template)]
    plain = [row for example in examples for row in rows_of(example, model.template, share=False)]
    monkeypatch.setattr("bridges.model.LONGEST_LINE", 0)
    monkeypatch.setattr(model.model, "keeps_prefix", False)
    expected = learnt(model, [batch([row]) for row in plain])
    size = expected[1].abs().max().item()
    assert size > 1e-3 or not any(row.images for row in plain), "a gradient of no consequence"

    ways = {"padded": [batch(plain)], "grouped": [batch(grouped)], "apart": [batch([row]) for row in grouped]}
    features = collate(grouped)
    features.features = vision(vision.preprocess([image for row in grouped for image in row.images]))
    ways["features"] = [features]
    for longest in (0, 1024):  # rows side by side; or end to end, in lines
        for keeps in (False, True):
            monkeypatch.setattr("bridges.model.LONGEST_LINE", longest)
            monkeypatch.setattr(model.model, "keeps_prefix", keeps)
            for name, batches in ways.items():
                nll, gradient = learnt(model, batches)
                told = f"{name}, {longest or 'no'} lines, {'kept' if keeps else 'no'} prefix"
                torch.testing.assert_close(nll, expected[0], atol=1e-5, rtol=1e-5, msg=lambda m, t=told: f"{t}: {m}")
                far = (gradient - expected[1]).abs().max().item()
                assert far < 1e-5 * max(1, size), f"{told}: gradients of {size:.2g} differ by {far:.2g}"
