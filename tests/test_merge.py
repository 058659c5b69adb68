"""A merged model says what the adapted one said, and is a model like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import LORA, batch_of, disturb, examples
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridges import adapter
from bridges.build import build
from bridges.checkpoint import load, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.merge import merge
from bridges.objectives.language import target_nll
from bridges.saved import CONFIG, WEIGHTS


@pytest.mark.parametrize("lora", [LORA, Lora(rank=2, rslora=True, dora=True)], ids=["lora", "dora"])
@torch.no_grad()
def test_logits_before_and_after_agree(recipe: Recipe, pictures: list[Image.Image], tmp_path: Path, lora: Lora) -> None:
    recipe.lora = lora
    before = build(recipe)
    disturb(before.model.language)
    save_checkpoint(Path(recipe.output), before)
    [folder] = merge(recipe.output, tmp_path / "merged")
    after = load(tmp_path / "merged")
    assert (after.recipe.lora, after.model.language.adapters) == (None, [])
    assert after.recipe.language.name == str(folder) == str(tmp_path / "merged" / "language")
    batch = batch_of(before, examples(pictures))
    torch.testing.assert_close(target_nll(after.model, batch), target_nll(before.model, batch), atol=1e-5, rtol=1e-5)
    assert after.model.language.fingerprint() != before.model.language.fingerprint()
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {"language", CONFIG, WEIGHTS, "README.md"}


def test_the_language_model_is_loaded_once(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.lora = LORA
    save_checkpoint(Path(recipe.output), build(recipe))
    loaded, original = [], AutoModelForCausalLM.from_pretrained

    def counted(path: str, **options: Any) -> Any:
        loaded.append(path)
        return original(path, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    merge(recipe.output, tmp_path / "merged")
    assert loaded == [recipe.language.name]


@torch.no_grad()
def test_the_language_model_opens_without_us(recipe: Recipe, tiny_llama: Path, tmp_path: Path) -> None:
    recipe.lora = LORA
    before = build(recipe)
    disturb(before.model.language)
    save_checkpoint(Path(recipe.output), before)
    [folder] = merge(recipe.output, tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(folder)("There is a cat", return_tensors="pt").input_ids
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(Path(recipe.output) / adapter.FOLDERS["language"]))
    torch.testing.assert_close(merged(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_merged_is_refused_before_anything_is_written(
    recipe: Recipe, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has no adapter to fold in: it was trained without lora"):
        merge(tiny_checkpoint, tmp_path / "merged")
    recipe.lora, recipe.output = LORA, recipe.output + "2"
    save_checkpoint(Path(recipe.output), build(recipe))
    with pytest.raises(ValueError, match=r"already holds a checkpoint or a model; name another --output"):
        merge(recipe.output, recipe.output)
    (Path(recipe.output) / adapter.WEIGHTS["language"]).unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing"):
        merge(recipe.output, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
