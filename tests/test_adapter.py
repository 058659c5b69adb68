"""LoRA: what trains and what stays, that a checkpoint carries it whole, and that plain peft reads it the same."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import (
    LORA,
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bridges import adapter
from bridges.benchmark.ours import open_gates
from bridges.build import Assembled, build, trained
from bridges.checkpoint import CARD, load, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.data.batch import Batch
from bridges.data.conversation import Example, ask
from bridges.objectives.language import language_loss, target_nll
from bridges.recipe import recipe_from
from bridges.towers.encoder_decoder import language_tower
from bridges.towers.language import LanguageTower
from bridges.training.loop import train


@pytest.fixture
def adapted(recipe: Recipe) -> Assembled:
    """A model with an adapter that has been trained: both of its matrices count."""
    recipe.lora = LORA
    assembled = build(recipe)
    disturb(assembled.model.language)
    return assembled


@pytest.fixture
def batch(adapted: Assembled, pictures: list[Image.Image]) -> Batch:
    return batch_of(adapted, examples(pictures))


def gradients(assembled: Assembled, batch: Batch) -> list[Tensor]:
    assembled.model.zero_grad()
    language_loss(assembled.model, batch)[0].backward()
    return [p.grad.clone() for p in trained(assembled) if p.grad is not None]


def ids_of(language: LanguageTower) -> Tensor:
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def read(language: LanguageTower, ids: Tensor) -> Tensor:
    rows = torch.arange(2).repeat_interleave(12)
    positions = torch.arange(12).expand_as(ids)
    return language(language.embed(ids), torch.ones_like(ids), positions, (rows, positions.flatten()))


@pytest.mark.parametrize("lora", [Lora(), Lora(rslora=True), Lora(dora=True)], ids=["lora", "rslora", "dora"])
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(family_folder: Path, lora: Lora) -> None:
    tower = LanguageTower(str(family_folder), dtype=torch.float32)
    ids, mark = ids_of(tower), tower.fingerprint()
    before = read(tower, ids)
    adapter.attach(tower, lora)
    torch.testing.assert_close(read(tower, ids), before, atol=1e-4, rtol=1e-4)
    disturb(tower)
    assert not torch.allclose(read(tower, ids), before, atol=1e-2)
    assert tower.fingerprint() == mark
    assert tower.embedding_rms() > 0
    layers = [m for m in tower.model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == len(tower.adapters) > 4
    assert not hasattr(tower.model.get_output_embeddings(), "lora_A")


def test_both_halves_of_a_t5_are_adapted(tiny_t5: Path) -> None:
    tower = language_tower(str(tiny_t5))
    adapter.attach(tower, Lora(targets=["q", "v"], rank=2))
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    at = (torch.tensor([0, 0, 1]), torch.tensor([8, 9, 6]))
    logits = tower(tower.embed(ids), torch.ones_like(ids), torch.arange(12).expand_as(ids), at)
    logits.pow(2).sum().backward()
    moved = [layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in tower.adapters]
    assert len(moved) == 2 * (2 + 3 + 3)  # encoder, decoder, cross-attention
    assert all(moved)


def test_bridge_and_adapter_train_and_nothing_else_does(adapted: Assembled, batch: Batch) -> None:
    assert_bridge_and_adapter_train(adapted, batch)


def test_an_adapter_is_fp32_beside_a_half_precision_tower(tiny_llama: Path) -> None:
    tower = LanguageTower(str(tiny_llama), dtype=torch.bfloat16)
    adapter.attach(tower, Lora(dora=True))
    assert {p.dtype for p in adapter.parameters(tower)} == {torch.float32}
    assert {p.dtype for p in tower.parameters() if not p.requires_grad} == {torch.bfloat16}
    read(tower, ids_of(tower)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters(tower))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_only_the_adapters_dropout_wakes(recipe: Recipe, pictures: list[Image.Image], dora: bool) -> None:
    recipe.lora = replace(LORA, dropout=0.5, dora=dora)
    assembled = build(recipe)
    disturb(assembled.model.language)
    batch = batch_of(assembled, examples(pictures))
    asleep = target_nll(assembled.model.eval(), batch)
    assert torch.equal(target_nll(assembled.model, batch), asleep)
    awake = target_nll(assembled.model.train(), batch)
    assert not torch.equal(target_nll(assembled.model, batch), awake)
    assert torch.equal(target_nll(assembled.model.eval(), batch), asleep)
    for layer in assembled.model.language.adapters:
        layer.lora_dropout["default"].p = 0.0
    assert torch.allclose(target_nll(assembled.model.train(), batch), asleep, atol=1e-5), "the frozen tower's woke"


def test_a_shared_beginning_has_its_part_in_the_gradient(adapted: Assembled, pictures: list[Image.Image]) -> None:
    """Rows that begin alike, and one that does not: behind the same text stand no constant keys and values."""
    alike, other = examples(pictures), [Example([ask("Is it a cat?", "No.", pictures[1])])]
    parts = [gradients(adapted, batch_of(adapted, some)) for some in (alike, other, [*alike, *other])]
    assert len(parts[0]) == len(trained(adapted))
    for one, more, both in zip(*parts, strict=True):
        torch.testing.assert_close(one + more, both, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_what_was_kept_of_a_beginning_is_not_used_after_a_step(adapted: Assembled, batch: Batch) -> None:
    before = target_nll(adapted.model, batch)
    disturb(adapted.model.language, seed=1)
    after = target_nll(adapted.model, batch)
    assert not torch.allclose(before, after, atol=1e-3)
    never_looked = build(adapted.recipe)
    for seed in (0, 1):
        disturb(never_looked.model.language, seed)
    torch.testing.assert_close(after, target_nll(never_looked.model, batch), atol=1e-5, rtol=1e-5)


def test_blocks_inside_the_language_model_go_on_beside_an_adapter(recipe: Recipe, pictures: list[Image.Image]) -> None:
    recipe.bridge = {"name": "flamingo", "latents": 3, "depth": 1, "resampler_heads": 2, "heads": 2}
    plain = build(recipe)
    recipe.lora = LORA
    assembled = build(recipe)
    batch = batch_of(plain, examples(pictures))
    for one in (plain, assembled):
        open_gates(one.model.bridge, 0.7)
    expected = target_nll(plain.model, batch)
    torch.testing.assert_close(target_nll(assembled.model, batch), expected, atol=1e-5, rtol=1e-5)
    disturb(assembled.model.language)
    assert not torch.allclose(target_nll(assembled.model, batch), expected, atol=1e-3)
    assert len(gradients(assembled, batch)) == len(trained(assembled))
    assert all(gradient.abs().sum() > 0 for gradient in gradients(assembled, batch))


def test_it_is_loaded_with_the_checkpoint_in_a_fresh_process(adapted: Assembled, batch: Batch) -> None:
    assert_a_fresh_process_reads_it_alike(adapted, batch)


def test_its_files_hold_what_trains_and_nothing_frozen(adapted: Assembled) -> None:
    folder = Path(adapted.recipe.output)
    save_checkpoint(folder, adapted)
    size = sum(p.numel() for p in adapter.parameters(adapted.model.language))
    assert (folder / adapter.WEIGHTS["language"]).stat().st_size < 4 * size + 2000
    assert all(".lora_" in name for name in load_file(folder / adapter.WEIGHTS["language"]))
    number = sum(p.numel() for p in trained(adapted))
    assert f"and LoRA on the language model, {number:,} trained parameters" in (folder / CARD).read_text()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_plain_peft_opens_it(recipe: Recipe, tiny_llama: Path, dora: bool) -> None:
    recipe.lora = replace(LORA, dora=dora)
    adapted = build(recipe)
    disturb(adapted.model.language)
    save_checkpoint(Path(recipe.output), adapted)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain: Any = PeftModel.from_pretrained(base, str(Path(recipe.output) / adapter.FOLDERS["language"])).eval()
    ids = ids_of(adapted.model.language)
    expected = read(adapted.model.language, ids)
    torch.testing.assert_close(plain(input_ids=ids).logits.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    said = json.loads((Path(recipe.output) / adapter.FOLDERS["language"] / "adapter_config.json").read_text())
    assert (said["r"], said["base_model_name_or_path"]) == (4, str(tiny_llama))


def test_start_takes_an_alignment_without_adapter_and_one_with(recipe: Recipe, tiny_checkpoint: Path) -> None:
    recipe.start, recipe.lora, recipe.output = str(tiny_checkpoint), LORA, recipe.output + "2"
    second = build(recipe)
    aligned = load_file(tiny_checkpoint / "bridge.safetensors")
    assert all(torch.equal(p, aligned[name]) for name, p in second.model.bridge.state_dict().items())
    disturb(second.model.language)
    save_checkpoint(Path(recipe.output), second)
    recipe.start, state = recipe.output, adapter.state(second.model.language)
    third = adapter.state(build(recipe).model.language)
    assert all(torch.equal(tensor, state[name]) for name, tensor in third.items())
    recipe.lora = None
    with pytest.raises(
        ValueError, match=r"trained beside an adapter; give the recipe the same lora, or .*bridges merge"
    ):
        build(recipe)
    recipe.lora = replace(LORA, rank=3)
    with pytest.raises(ValueError, match=r"has \(4, 32\) in .*lora_A.weight, the recipe's lora \(3, 32\)"):
        build(recipe)
    recipe.lora = replace(LORA, targets=["q_proj"])
    with pytest.raises(ValueError, match=r"other layers than the recipe's lora: 4 differ, such as .*down_proj"):
        build(recipe)


def test_a_checkpoint_without_its_adapter_is_refused(adapted: Assembled) -> None:
    folder = Path(adapted.recipe.output)
    save_checkpoint(folder, adapted)
    weights = load_file(folder / adapter.WEIGHTS["language"])
    save_file(dict(list(weights.items())[1:]), folder / adapter.WEIGHTS["language"])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors has other layers"):
        load(folder)
    (folder / adapter.WEIGHTS["language"]).unlink()
    with pytest.raises(ValueError, match=r"no weights in .*: adapter/adapter_model.safetensors is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"targets": ["query"]},
            r"no linear layer is named 'query'; there are down_proj, gate_proj, .*, up_proj, v_proj$",
        ),
        ({"targets": ["q_proj", "proj"]}, "no linear layer is named 'proj'"),
        ({"targets": ["lm_head"]}, "no linear layer is named 'lm_head'"),
        ({"rank": 0}, r"lora.rank 0: a matrix has a rank of at least 1"),
        ({"dropout": 1.0}, r"lora.dropout 1.0 is no probability"),
        ({"ranks": 8}, r"unknown key lora.ranks; did you mean lora.rank\?"),
        ({"rank": "many"}, "rank"),
        (8, "lora should hold keys such as targets, not 8"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_line(recipe: Recipe, lora: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(recipe_from({**asdict(recipe), "lora": lora}))
    assert "\n" not in str(caught.value)


def test_a_target_may_be_a_longer_path_and_options_may_be_dotted(recipe: Recipe) -> None:
    given = recipe_from({**asdict(recipe), "lora": {"rank": 2}}, ["--lora.targets", '["layers.1.self_attn.q_proj"]'])
    assert given.lora == Lora(targets=["layers.1.self_attn.q_proj"], rank=2)
    assert len(build(given).model.language.adapters) == 1
    assert recipe_from(asdict(recipe), ["--lora.rank", "3"]).lora == Lora(rank=3)
    assert recipe_from({**asdict(recipe), "lora": {}}).lora == Lora()


def test_without_peft_the_extra_is_named(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    recipe.lora = LORA
    with pytest.raises(ValueError, match=r"lora needs peft: pip install 'mm-bridges\[lora\]'"):
        build(recipe)


@pytest.fixture
def run(recipe: Recipe, captions: Path) -> Recipe:
    """Six steps on twelve pictures, with an adapter whose dropout is awake."""
    recipe.data.source, recipe.lora = str(captions), replace(LORA, dropout=0.3, lr=1e-3)
    recipe.train = replace(
        recipe.train, steps=6, batch=4, lr=1e-2, warmup=2, evaluate_every=2, save_every=3, log_every=1
    )
    return recipe


def test_a_resumed_run_equals_an_uninterrupted_one(run: Recipe, tmp_path: Path) -> None:
    first = assert_resumed_equals_uninterrupted(run, tmp_path)
    with pytest.raises(ValueError, match=r"was trained with lora.rank 4, the recipe says 8; resume needs the same"):
        train(replace(first, lora=replace(LORA, rank=8)), resume=True)
    with pytest.raises(ValueError, match=r"was trained with lora.targets \[.*\], the recipe says None"):
        train(replace(first, lora=None), resume=True)


def test_the_adapter_has_its_own_learning_rate(run: Recipe) -> None:
    """The first step of Adam is as long as its rate, in every place that has a gradient."""
    moved = longest_moves(run)
    assert max(m for n, m in moved.items() if n.startswith("bridge.")) == pytest.approx(1e-2, rel=1e-2)
    assert max(m for n, m in moved.items() if "lora_B" in n) == pytest.approx(1e-3, rel=1e-2)
