"""LoRA on the vision tower: what trains and what stays, that a checkpoint carries it, that peft and a merge agree."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import (
    assert_a_fresh_process_reads_it_alike,
    assert_bridge_and_adapter_train,
    assert_resumed_equals_uninterrupted,
    batch_of,
    disturb,
    examples,
    longest_moves,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, CLIPVisionModel, Dinov2Config, Dinov2Model, ViTImageProcessorPil

from bridges import adapter
from bridges.build import Assembled, build, build_pairs, towers_of, trained
from bridges.checkpoint import CARD, load, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.data.batch import Batch
from bridges.inference.features import Features
from bridges.inference.swap import with_bridge
from bridges.merge import merge
from bridges.objectives.language import language_loss, target_nll
from bridges.recipe import recipe_from
from bridges.saved import CONFIG
from bridges.training.choices import choices
from bridges.training.display import counts
from bridges.training.loop import train
from bridges.training.probe import plan_of
from bridges.training.stage import open_stage

LORA = Lora(targets=["q_proj", "fc2"], rank=4, alpha=8)
WEIGHTS = "vision_adapter/adapter_model.safetensors"


@pytest.fixture
def asked(recipe: Recipe) -> Recipe:
    return replace(recipe, vision=replace(recipe.vision, lora=LORA))


@pytest.fixture
def adapted(asked: Recipe) -> Assembled:
    """A model with an adapter that has been trained: both of its matrices count."""
    assembled = build(asked)
    disturb(assembled.model.vision)
    return assembled


@pytest.fixture
def batch(adapted: Assembled, pictures: list[Image.Image]) -> Batch:
    return batch_of(adapted, examples(pictures))


def seen(assembled: Assembled, pictures: list[Image.Image]) -> Tensor:
    vision = assembled.model.vision
    with torch.no_grad():
        return vision(vision.preprocess(pictures))


def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_does(
    asked: Recipe, built: Assembled, pictures: list[Image.Image]
) -> None:
    fresh, expected = build(asked), seen(built, pictures)
    assert torch.equal(seen(fresh, pictures), expected)
    ours, theirs = fresh.model.bridge.state_dict(), built.model.bridge.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    disturb(fresh.model.vision)
    assert not torch.allclose(seen(fresh, pictures), expected, atol=1e-2)
    assert fresh.model.vision.fingerprint() == built.model.vision.fingerprint()


def test_bridge_and_adapter_train_and_nothing_else_does(adapted: Assembled, batch: Batch) -> None:
    """Every part of the adapter has a gradient: the layer that is not read (the tower's layer is -2) has none of it."""
    moved = assert_bridge_and_adapter_train(adapted, batch)
    gradients = [p.grad for p in adapter.parameters(adapted.model.vision)]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    assert {n.split(".layers.")[1].split(".")[0] for n in moved if ".lora_" in n} == {"0", "1"}
    each = LORA.rank * ((16 + 16) + (32 + 16))  # of a layer: beside q_proj, and beside fc2
    assert f"), vision adapter ({2 * each:,})   frozen: " in counts(adapted)


def test_without_an_adapter_features_keep_no_graph(built: Assembled, pictures: list[Image.Image]) -> None:
    vision = built.model.vision
    assert not vision(vision.preprocess(pictures)).requires_grad


def test_a_batch_without_pictures_has_the_adapter_in_its_graph(adapted: Assembled, pictures: list[Image.Image]) -> None:
    language_loss(adapted.model, batch_of(adapted, examples(pictures)[1:]))[0].backward()
    gradients = [p.grad for p in adapter.parameters(adapted.model.vision)]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@torch.no_grad()
def test_only_the_adapters_dropout_wakes(asked: Recipe, pictures: list[Image.Image]) -> None:
    asked.vision.lora = replace(LORA, dropout=0.5)
    assembled = build(asked)
    disturb(assembled.model.vision)
    asleep = seen(assembled, pictures)
    assembled.model.train()
    assert not torch.equal(seen(assembled, pictures), seen(assembled, pictures))
    for layer in assembled.model.vision.adapters:
        layer.lora_dropout["default"].p = 0.0
    assert torch.equal(seen(assembled, pictures), asleep), "the frozen tower's woke"
    assembled.model.eval()
    assert torch.equal(seen(assembled, pictures), asleep)


@pytest.mark.slow
def test_it_is_loaded_with_the_checkpoint_in_a_fresh_process(adapted: Assembled, batch: Batch) -> None:
    folder = assert_a_fresh_process_reads_it_alike(adapted, batch)
    assert all(".lora_" in name for name in load_file(folder / WEIGHTS))
    number = sum(p.numel() for p in trained(adapted))
    assert f"and LoRA on the vision model, {number:,} trained parameters" in (folder / CARD).read_text()
    assert not Features(load(folder))([Image.new("RGB", (32, 32))]).requires_grad


@torch.no_grad()
def test_plain_peft_opens_it(adapted: Assembled, tiny_clip: Path, pictures: list[Image.Image]) -> None:
    save_checkpoint(Path(adapted.recipe.output), adapted)
    folder = Path(adapted.recipe.output) / "vision_adapter"
    plain: Any = PeftModel.from_pretrained(CLIPVisionModel.from_pretrained(tiny_clip), str(folder)).eval()
    pixels = adapted.model.vision.preprocess(pictures)
    states = plain(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-2][:, 1:], seen(adapted, pictures), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen(adapted, pictures), seen(build(load(folder.parent).recipe), pictures), atol=1e-2)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("both", [False, True], ids=["vision", "both"])
def test_a_merge_folds_it_into_an_encoder(
    asked: Recipe, pictures: list[Image.Image], tmp_path: Path, both: bool, dora: bool
) -> None:
    asked.vision.lora = replace(LORA, dora=dora)
    asked.lora = Lora(rank=2) if both else None
    before = build(asked)
    disturb(before.model.vision)
    disturb(before.model.language)
    save_checkpoint(Path(asked.output), before)
    folders = merge(asked.output, tmp_path / "merged")
    after = load(tmp_path / "merged")
    assert {folder.name for folder in folders} == {"vision", *(["language"] if both else [])}
    assert (after.recipe.vision.lora, after.recipe.lora, after.model.vision.adapters) == (None, None, [])
    assert after.recipe.language.name == (str(tmp_path / "merged" / "language") if both else asked.language.name)
    batch = batch_of(before, examples(pictures))
    with torch.no_grad():
        expected = target_nll(before.model, batch)
        torch.testing.assert_close(target_nll(after.model, batch), expected, atol=1e-5, rtol=1e-5)
        plain: Any = CLIPVisionModel.from_pretrained(tmp_path / "merged" / "vision").eval()
        states = plain(after.model.vision.preprocess(pictures), output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-2][:, 1:], seen(before, pictures), atol=1e-5, rtol=1e-5)
    assert after.model.vision.fingerprint() != before.model.vision.fingerprint()
    (tmp_path / "merged" / CONFIG).unlink()
    with pytest.raises(ValueError, match="already holds a checkpoint or a model"):
        merge(asked.output, tmp_path / "merged")


def test_start_takes_an_alignment_without_adapter_and_one_with(asked: Recipe, tiny_checkpoint: Path) -> None:
    asked.start, asked.output = str(tiny_checkpoint), asked.output + "2"
    second = build(asked)
    disturb(second.model.vision)
    save_checkpoint(Path(asked.output), second)
    state = adapter.state(second.model.vision)
    asked.start, asked.lora = asked.output, Lora(rank=2)
    third = adapter.state(build(asked).model.vision)
    assert all(torch.equal(tensor, state[name]) for name, tensor in third.items())
    asked.vision.lora = replace(LORA, rank=3)
    with pytest.raises(ValueError, match=r"has \(4, 16\) in .*lora_A.weight, the recipe's vision.lora \(3, 16\)"):
        build(asked)
    asked.vision.lora = None
    message = (
        r"beside an adapter; give the recipe the same vision.lora, or fold it into the vision model first: bridges"
    )
    with pytest.raises(ValueError, match=message):
        build(asked)


@pytest.fixture
def run(asked: Recipe, captions: Path) -> Recipe:
    """Six steps on twelve pictures, with an adapter on each tower whose dropout is awake."""
    asked.data.source, asked.lora = str(captions), Lora(rank=2, lr=2e-3)
    asked.vision.lora = replace(LORA, dropout=0.3, lr=1e-3)
    asked.train = replace(asked.train, steps=4, batch=4, lr=1e-2, warmup=1, evaluate_every=2, save_every=2, log_every=1)
    return asked


def test_a_resumed_run_equals_an_uninterrupted_one(run: Recipe, tmp_path: Path) -> None:
    first = assert_resumed_equals_uninterrupted(run, tmp_path)
    first.vision.lora = replace(LORA, rank=8)
    with pytest.raises(ValueError, match=r"was trained with vision.lora.rank 4, the recipe says 8; resume needs"):
        train(first, resume=True)
    first.vision.lora = None
    with pytest.raises(ValueError, match=r"was trained with vision.lora.targets \[.*\], the recipe says None"):
        train(first, resume=True)


def test_each_adapter_has_its_own_learning_rate(run: Recipe) -> None:
    """The first step of Adam is as long as its rate, in every place that has a gradient."""
    moved = longest_moves(run)
    for part, rate in {"bridge.": 1e-2, "language.": 2e-3, "vision.": 1e-3}.items():
        longest = max(m for n, m in moved.items() if n.startswith(part) and ("lora_B" in n or part == "bridge."))
        assert longest == pytest.approx(rate, rel=1e-2), part
    assert not any(m for n, m in moved.items() if not n.startswith("bridge.") and ".lora_" not in n)


@pytest.mark.slow
def test_a_plan_counts_it(run: Recipe, tmp_path: Path) -> None:
    """Larger pictures too: this encoder takes them, and has the same adapter then."""
    sizes: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2)
    Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "dino")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dino")
    run.vision = replace(run.vision, name=str(tmp_path / "dino"), lora=Lora(rank=2))
    stage = open_stage(run)
    assert isinstance(stage.built, Assembled)
    found = plan_of(run, stage)
    bridge, *adapters = stage.built.model.bridge, *map(adapter.parameters, towers_of(stage.built).values())
    size = sum(p.numel() for p in (*bridge.parameters(), *adapters[0], *adapters[1]))
    assert (found.trained, len(adapters[0]) > 0) == (size, True)
    assert found.frozen[run.vision.name] == sum(
        p.numel() for p in AutoModel.from_pretrained(run.vision.name).parameters()
    )
    others = dict(choices(run, stage, found))
    assert others["vision.image_size 64"].trained == size


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (
            {"lora": {"targets": ["query"]}},
            r"vision.lora.targets: no linear layer is named 'query'; there are fc1, fc2, k_proj, out_proj, q_proj, v_p",
        ),
        ({"lora": {"targets": ["layers.2.mlp.fc1"]}}, r"no linear layer is named 'layers.2.mlp.fc1'"),
        ({"lora": {"rank": 0}}, r"vision.lora.rank 0: a matrix has a rank of at least 1; leave vision.lora out"),
        ({"lora": {"dropout": 1.0}}, r"vision.lora.dropout 1.0 is no probability"),
        ({"lora": {"ranks": 8}}, r"unknown key vision.lora.ranks; did you mean vision.lora.rank\?"),
        ({"lora": {}, "layer": 0}, r"vision.lora: features of .* come through no linear layer"),
        ({"lora": {}, "cache": "fp32"}, r"vision.cache keeps what a frozen encoder sees, and vision.lora trains it"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_line(recipe: Recipe, vision: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        open_stage(recipe_from({**asdict(recipe), "vision": {**asdict(recipe.vision), **vision}}))
    assert "\n" not in str(caught.value)


def test_a_first_stage_and_another_bridge_between_the_same_towers_are_refused(
    adapted: Assembled, built: Assembled, tiny_checkpoint: Path
) -> None:
    with pytest.raises(ValueError, match=r"vision.lora: .*; leave it out for objectives"):
        build_pairs(replace(adapted.recipe, objectives={"contrastive": 1.0}))
    with pytest.raises(ValueError, match="the checkpoint in use has LoRA on its vision model"):
        with_bridge(adapted, tiny_checkpoint)
    save_checkpoint(tiny_checkpoint, adapted)
    with pytest.raises(ValueError, match=rf"{tiny_checkpoint} has LoRA on its vision model, .*bridges chat"):
        with_bridge(built, tiny_checkpoint)


def test_options_may_be_dotted(recipe: Recipe) -> None:
    given = recipe_from(asdict(recipe), ["--vision.lora.rank", "3", "--vision.lora.targets", '["layers.1.mlp.fc1"]'])
    assert given.vision.lora == Lora(rank=3, targets=["layers.1.mlp.fc1"])
    assert len(build(given).model.vision.adapters) == 1
    assert recipe_from({**asdict(recipe), "vision": {"name": recipe.vision.name, "lora": {}}}).vision.lora == Lora()
