"""Fold a checkpoint's adapter into its language model, which is then a model like any other."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from bridges import adapter
from bridges.build import build
from bridges.checkpoint import fill, save_checkpoint
from bridges.files import prepare_output
from bridges.saved import CONFIG, recipe_of
from bridges.towers.bundled import quiet_transformers
from bridges.towers.language import LanguageTower

LANGUAGE = "language"


def merge(checkpoint: str | Path, output: str | Path) -> Path:
    """Write `output/language`, a language model in transformers' own format with its tokenizer, and into `output` a
    checkpoint whose language tower that is. Returns that tower's folder.

    Done in float32 on the weights as they are without quantization. Raises ValueError where there is no adapter, or
    something in `output` already; nothing is written then.
    """
    source, output = Path(checkpoint).expanduser(), Path(output).expanduser()
    recipe = recipe_of(source)
    if recipe.lora is None:
        raise ValueError(f"{source} has no adapter to fold in: it was trained without lora")
    if (output / CONFIG).exists() or (output / LANGUAGE).exists():
        raise ValueError(f"{output} already holds a checkpoint or a language model; name another --output")
    recipe = replace(recipe, language=replace(recipe.language, quantize=None))
    assembled = build(recipe, fresh=False, dtype=torch.float32)
    fill(assembled, source)
    tower = assembled.model.language
    adapter.fold(tower)
    prepare_output(output, needed=4 * sum(p.numel() for p in tower.parameters()))
    folder = output / LANGUAGE
    save_language(tower, folder)
    tower.name = str(folder.resolve())
    language = replace(recipe.language, name=tower.name, revision=None)
    merged = replace(recipe, output=str(output), language=language, lora=None)
    save_checkpoint(output, assembled._replace(recipe=merged))
    return folder


def save_language(tower: LanguageTower, folder: Path) -> None:
    """In transformers' own format; the folder is whole or not there. ValueError where it cannot be written."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        with quiet_transformers():
            tower.model.save_pretrained(partial)
            tower.tokenizer.save_pretrained(partial)
        partial.replace(folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
