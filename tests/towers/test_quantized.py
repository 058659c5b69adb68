"""A quantized tower is the model with rounded weights, in logits and gradients; what trains beside it is not rounded."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from conftest import said_afresh, tiny_language
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bridges import adapter
from bridges.build import Assembled, build, trained
from bridges.checkpoint import load, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.data.batch import Batch
from bridges.data.conversation import Example, ask
from bridges.objectives.language import language_loss, target_nll
from bridges.recipe import recipe_from
from bridges.towers.encoder_decoder import language_tower
from bridges.towers.language import LanguageTower
from bridges.towers.quantized import Bits
from bridges.training.stage import make_batch

BITS = ["int8", "nf4"]
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
AT = (torch.tensor([0, 0, 1]), torch.tensor([8, 9, 6]))


def read(tower: LanguageTower) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient in what was put in."""
    embeds = tower.embed(IDS).detach().requires_grad_()
    logits = tower(embeds, torch.ones_like(IDS), torch.arange(12).expand_as(IDS), AT)
    logits.pow(2).sum().backward()
    assert embeds.grad is not None
    return logits.detach(), embeds.grad


@pytest.fixture(params=BITS)
def bits(request: pytest.FixtureRequest) -> Bits:
    return request.param


@pytest.mark.parametrize("model", ["llama", "gemma3", "gpt_neox", "opt", "t5"])
def test_it_is_the_model_with_rounded_weights(bits: Bits, model: str, tiny_t5: Path, tmp_path: Path) -> None:
    path = str(tiny_t5 if model == "t5" else tiny_language(model, tmp_path))
    full, quantized = language_tower(path), language_tower(path, quantized=bits)
    head = quantized.model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert len(quantized.quantized) == sum(type(m) in (Linear4bit, Linear8bitLt) for m in quantized.model.modules())
    assert len(quantized.quantized) >= 8
    for name, layer in quantized.model.named_modules():
        if type(layer) in (Linear4bit, Linear8bitLt):
            full.model.get_submodule(name).weight.data = dequantize_module_weight(layer).float()
    assert full.fingerprint() == quantized.fingerprint()
    with torch.no_grad():  # a look in between must not cost the gradient
        read_in_peace = quantized(quantized.embed(IDS), torch.ones_like(IDS), torch.arange(12).expand_as(IDS), AT)
    (logits, gradient), (expected, expected_gradient) = read(quantized), read(full)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-3)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-3 * float(expected_gradient.abs().max()), rtol=2e-3)
    torch.testing.assert_close(read_in_peace, expected, atol=2e-4, rtol=2e-3)


def test_nf4_is_quantized_twice_and_never_asleep(tiny_llama: Path) -> None:
    tower = LanguageTower(str(tiny_llama), quantized="nf4")
    for layer in tower.eval().quantized:
        assert isinstance(layer, Linear4bit)
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.training, "bitsandbytes would pack it for CPUs with AVX512-BF16, and lose the gradient"


@pytest.fixture
def adapted(recipe: Recipe, bits: Bits) -> Assembled:
    recipe.language.quantize, recipe.lora = bits, Lora(rank=4, alpha=8)
    return build(recipe)


@pytest.fixture
def batch(adapted: Assembled, pictures: list[Image.Image]) -> Batch:
    return make_batch(adapted, [Example([ask(f"Is it a {w}?", "Yes.", pictures[0]) for w in ("cat", "dog")])])


def test_train_save_and_load_in_a_fresh_process(adapted: Assembled, batch: Batch, bits: Bits) -> None:
    model, folder = adapted.model, Path(adapted.recipe.output)
    assert {p.dtype for p in trained(adapted)} == {torch.float32}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained(adapted), lr=1e-2)
    for _ in range(2):  # the first moves only one of LoRA's matrices
        optimizer.zero_grad()
        language_loss(model.train(), batch)[0].backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {n for n in before if n.startswith("bridge.") or ".lora_" in n}
    save_checkpoint(folder, adapted)
    with torch.no_grad():
        expected = target_nll(model.eval(), batch)
    torch.testing.assert_close(said_afresh(folder, batch), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_same_checkpoint_is_read_without_quantization_and_by_plain_peft(
    adapted: Assembled, batch: Batch, tiny_llama: Path
) -> None:
    folder = Path(adapted.recipe.output)
    for parameter in adapter.parameters(adapted.model.language):
        parameter.add_(0.05)
    save_checkpoint(folder, adapted)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["language"]["quantize"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    full = load(folder)
    assert full.model.language.quantized == []
    nats = [target_nll(a.model, batch).mean() for a in (full, adapted)]
    torch.testing.assert_close(*nats, atol=0.6, rtol=0.1)  # 4 bits of a tiny random model are few
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(folder / adapter.FOLDERS["language"]))
    language = full.model.language
    rows = (torch.arange(2).repeat_interleave(12), torch.arange(12).repeat(2))
    own = language(language.embed(IDS), torch.ones_like(IDS), torch.arange(12).expand_as(IDS), rows)
    torch.testing.assert_close(plain(input_ids=IDS).logits.flatten(0, 1), own, atol=1e-5, rtol=1e-5)


def test_a_full_alignment_starts_a_quantized_stage(recipe: Recipe, tiny_checkpoint: Path, bits: Bits) -> None:
    recipe.start, recipe.output = str(tiny_checkpoint), recipe.output + "2"
    recipe.language.quantize, recipe.lora = bits, Lora()
    assert len(build(recipe).model.language.quantized) == 14


def test_bad_input_is_one_line(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantize"):
        recipe_from({**asdict(recipe), "language": {"quantize": "int4"}})
    named = replace(recipe.language, name=str(tiny_language("gpt2", tmp_path)), quantize="nf4")
    with pytest.raises(ValueError, match=r"language.quantize nf4: gpt2 has no linear layers; leave it out"):
        build(replace(recipe, language=named))
    recipe.language.quantize = "nf4"
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", None)
    with pytest.raises(ValueError, match=r"quantize nf4 needs bitsandbytes: pip install 'mm-bridges\[quant\]'"):
        build(recipe)
