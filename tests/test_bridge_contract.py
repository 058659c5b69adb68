"""What every bridge keeps to, whoever wrote it: each file in bridges/ that defines one is tried here."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from bridges.base import bridge_names
from bridges.build import Assembled, build, build_bridge
from bridges.checkpoint import load, save_checkpoint
from bridges.config import Recipe
from bridges.data.batch import Batch, collate, rows_of
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.inference.decoding import answers
from bridges.objectives.language import language_loss
from bridges.recipe import read_recipe
from bridges.training.engine import Engine
from bridges.training.feed import Share
from bridges.training.loop import train_step
from bridges.training.stage import said_loss

LATENTS = {"latents": 3, "depth": 2}
FUSED = {"resampler_heads": 2, "resampler_head_dim": 8, "heads": 2, "head_dim": 8, "gate_speed": 2.0}
SMALL = {"queries": 5, "layers": 2, "width": 32, "heads": 4}
# A bridge without an entry is tried with its defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "projector": [
        {},
        {"depth": 2},
        {"depth": 3, "bias": False},
        {"merge": "average", "factor": 3},
        {"merge": "shuffle", "factor": 2, "norm": True},
        {"merge": "strip", "factor": 4, "depth": 2, "norm": True},
    ],
    "qformer": [
        {**SMALL},
        {**SMALL, "queries": 3, "layers": 3, "cross_every": 1, "inner": 20},
    ],
    "resampler": [
        {**LATENTS, "heads": 2, "head_dim": 8},
        {**LATENTS, "heads": 2, "head_dim": 8, "activation": "squared_relu", "qk_norm": True},
    ],
    "flamingo": [
        {**LATENTS, **FUSED},
        {
            **LATENTS,
            **FUSED,
            "every": 2,
            "offset": 1,
            "gate": "vector",
            "sees": "all",
            "tag": "learnt",
            "activation": "relu",
        },
        {**LATENTS, **FUSED, "depth": 0, "words": True},
        {**LATENTS, **FUSED, "gate": "none", "swiglu": True, "norm": "rms", "qk_norm": True, "inner": 24},
    ],
}
CASES = [{"name": name, **options} for name in bridge_names() for options in OPTIONS.get(name, [{}])]
OWN = '''
from torch import nn
from bridges.base import Bridge, Visual

class Pooled(Bridge):
    """Two slots from the mean of all patches."""

    def __init__(self, vision_dim, num_patches, language_dim, num_layers, *, width: int = 8):
        super().__init__()
        self.num_slots = 2
        self.layers = nn.Sequential(nn.Linear(vision_dim, width), nn.Tanh(), nn.Linear(width, 2 * language_dim))

    def forward(self, features):
        return Visual(self.layers(features.mean(1)).unflatten(1, (2, -1)))
'''


def described(options: dict[str, Any]) -> str:
    return " ".join(str(value) if key == "name" else f"{key}={value}" for key, value in options.items())


@pytest.fixture(scope="module", params=CASES, ids=described)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Name and options of a bridge, as its YAML says them."""
    return request.param


@pytest.fixture(scope="module")
def built_with(options: dict[str, Any], built: Assembled) -> Assembled:
    return opened(build(replace(built.recipe, bridge=options)))


def opened(assembled: Assembled) -> Assembled:
    """With every weight of zero made a small one: a gate of zero hides what stands behind it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in assembled.model.bridge.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return assembled


@pytest.fixture
def assembled(built_with: Assembled, recipe: Recipe) -> Assembled:
    return deepcopy(built_with)._replace(recipe=replace(recipe, bridge=built_with.recipe.bridge))


def features_of(count: int) -> Tensor:
    """Features of variance 1 of 16 patches, where those of one picture look somewhat alike, as they do."""
    generator = torch.Generator().manual_seed(0)
    common, own = (torch.randn(count, n, 24, generator=generator) for n in (1, 16))
    return (common + own) / 2**0.5


def batch_of(assembled: Assembled, pictures: list[Image.Image]) -> Batch:
    examples = [
        Example([ask("What is it?", "A cat.", picture), ask("Name it.", "Cat.", picture)]) for picture in pictures
    ]
    rows = [row for example in examples for row in rows_of(example, assembled.template)]
    return collate(rows, assembled.model.vision.preprocess)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_slots_are_as_many_and_as_wide_as_promised(options: dict[str, Any], count: int):
    bridge = build_bridge(options, 24, 16, 32, 4)
    slots, memory = bridge(features_of(count))
    assert slots.shape == (count, bridge.num_slots, 32)
    assert bridge.num_slots or memory is not None, "nothing that the language model could read"
    assert memory is None or len(memory) == count
    assert (memory is not None) == bool(bridge.blocks), "memory is what blocks read"


def test_pictures_do_not_mix(options: dict[str, Any]):
    bridge, features = build_bridge(options, 24, 16, 32, 4).eval(), features_of(3)
    together = bridge(features)
    for number in range(3):
        alone = bridge(features[number : number + 1])
        for whole, part in zip(together, alone, strict=True):
            assert (whole is None) == (part is None)
            if whole is not None:
                torch.testing.assert_close(whole[number], part[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rms", [0.03, 1.0])
def test_slots_start_at_the_size_of_the_language_models_embeddings(options: dict[str, Any], rms: float):
    torch.manual_seed(0)
    bridge = build_bridge(options, 24, 16, 64, 4)
    bridge.match_scale(rms)
    slots = bridge(features_of(32)).slots
    assert bridge.num_slots == 0 or rms / 2 < slots.pow(2).mean().sqrt() < rms * 2


def test_one_step_changes_the_bridge_and_nothing_else(assembled: Assembled, pictures: list[Image.Image]):
    model = assembled.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=1e-2)
    language_loss(model, batch_of(assembled, pictures))[0].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("bridge."):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("bridge."), name


def test_without_pictures_every_parameter_has_a_gradient_of_zeros(assembled: Assembled):
    language_loss(assembled.model, text_only(assembled))[0].backward()
    for name, parameter in assembled.model.bridge.named_parameters():
        assert parameter.grad is not None, name
        # blocks in the language model work on its text, pictures or not
        assert name.startswith("blocks.") or not parameter.grad.any(), name


def text_only(assembled: Assembled) -> Batch:
    turns = [Turn("user", ["How many birds?"]), Turn("assistant", ["Four."])]
    return collate(rows_of(Example([Conversation(turns)]), assembled.template))


def test_a_saved_bridge_is_loaded_to_the_bit(assembled: Assembled, pictures: list[Image.Image]):
    model = assembled.model
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=1e-2)
    batch = batch_of(assembled, pictures)
    language_loss(model, batch)[0].backward()
    optimizer.step()
    save_checkpoint(Path(assembled.recipe.output), assembled)
    again = load(assembled.recipe.output)
    saved, loaded = model.bridge.state_dict(), again.model.bridge.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert torch.equal(language_loss(model, batch)[0], language_loss(again.model, batch)[0])


def test_options_survive_yaml_and_checkpoint(options: dict[str, Any], recipe: Recipe, tmp_path: Path):
    given = {
        "output": recipe.output,
        "vision": vars(recipe.vision),
        "language": vars(recipe.language),
        "bridge": options,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    read = read_recipe(tmp_path / "recipe.yaml")
    assert read.bridge == options
    save_checkpoint(Path(read.output), build(read))
    assert load(read.output).recipe.bridge == options


@torch.no_grad()
def test_a_picture_is_seen_by_what_follows_and_not_by_what_precedes(assembled: Assembled, pictures: list[Image.Image]):
    model, template, _ = assembled
    turns = [Turn("user", ["Is there a ", pictures[0], " in the picture?"]), Turn("assistant", ["Yes."])]
    (row,) = rows_of(Example([Conversation(turns)]), template)
    batch = collate([row], model.vision.preprocess)
    everywhere = (torch.zeros(len(row.ids), dtype=torch.long), torch.arange(len(row.ids)))

    def logits(picture: Image.Image) -> Tensor:
        pixels = model.vision.preprocess([picture])
        return model(batch.input_ids, batch.segments, batch.positions, everywhere, pixels, looks=batch.looks)

    one, other = logits(pictures[0]), logits(pictures[1])
    first = row.looks.index(1)
    assert 0 < first < len(row.ids) - 1
    assert torch.equal(one[:first], other[:first])
    assert (one[-1] - other[-1]).abs().max() > 1e-4


@torch.no_grad()
def test_an_answer_from_the_cache_is_the_answer_computed_anew(assembled: Assembled, pictures: list[Image.Image]):
    model, template, _ = assembled
    turns = [Turn("user", [pictures[0], "What is it, and ", pictures[1], "?"])]
    encoded = template.encode(turns, reply=True)
    batch = collate(rows_of(Example([Conversation(turns)]), template), model.vision.preprocess)
    ids, said = list(encoded.ids), []
    for _ in range(6):
        length = len(ids)
        tokens, positions = torch.tensor([ids]), torch.arange(length)[None]
        at = (torch.tensor([0]), torch.tensor([length - 1]))
        looks = torch.tensor([encoded.looks + [encoded.looks[-1]] * (length - len(encoded.looks))])
        logits = model(tokens, torch.zeros_like(tokens), positions, at, batch.pixel_values, looks=looks)
        said.append(int(logits.argmax()))
        ids.append(said[-1])
    cached: list[int] = []

    def choose(logits: Tensor) -> Tensor:
        cached.append(int(logits.argmax()))
        return torch.tensor(cached[-1:])

    answers(assembled, [turns], max_new_tokens=6, choose=choose)
    assert cached == said[: len(cached)]
    assert len(cached) > 1


def test_a_users_own_bridge_needs_a_name_with_a_dot_and_nothing_else(
    recipe: Recipe, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pooled.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    given = {"output": recipe.output, "vision": vars(recipe.vision), "language": vars(recipe.language)}
    given["bridge"] = {"name": "mine.pooled", "width": 6}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))

    assembled = build(read_recipe(tmp_path / "recipe.yaml", ["--bridge.width", "12"]))
    model = assembled.model
    before = {name: p.detach().clone() for name, p in model.bridge.named_parameters()}
    assert before["layers.0.weight"].shape == (12, 16)
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=1e-2)
    shares = [Share("pictures", 1.0, [batch_of(assembled, pictures)])]
    figures = train_step(Engine(Accelerator(), model, optimizer), shares, 1.0, said_loss)
    assert figures["loss"] > 0
    assert figures["targets"] > 0
    assert all(not torch.equal(p, before[name]) for name, p in model.bridge.named_parameters())
    save_checkpoint(Path(assembled.recipe.output), assembled)
    again = load(assembled.recipe.output)
    asked = [[Turn("user", [picture, "What is it?"])] for picture in pictures]
    assert answers(again, asked, max_new_tokens=8) == answers(assembled, asked, max_new_tokens=8)
