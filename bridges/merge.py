"""Fold a checkpoint's adapters into their towers, which are then models like any other."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from bridges import adapter
from bridges.build import build, loras, towers_of
from bridges.checkpoint import fill, save_checkpoint
from bridges.files import prepare_output
from bridges.saved import CONFIG, recipe_of
from bridges.towers.bundled import quiet_transformers
from bridges.towers.language import LanguageTower


def merge(checkpoint: str | Path, output: str | Path) -> list[Path]:
    """Write `output/language`, a language model in transformers' own format with its tokenizer, or `output/vision`, an
    encoder with its processor, or both; and into `output` a checkpoint whose towers these are. Returns their folders.

    Done in float32 on the weights as they are without quantization. Raises ValueError where there is no adapter, or
    something in `output` already; nothing is written then.
    """
    source, output = Path(checkpoint).expanduser(), Path(output).expanduser()
    recipe = recipe_of(source)
    folders = {kind: output / kind for kind in loras(recipe)}
    if not folders:
        raise ValueError(f"{source} has no adapter to fold in: it was trained without lora")
    if any(path.exists() for path in (output / CONFIG, *folders.values())):
        raise ValueError(f"{output} already holds a checkpoint or a model; name another --output")
    if recipe.lora is not None:
        recipe = replace(recipe, language=replace(recipe.language, quantize=None))
    assembled = build(recipe, fresh=False, dtype=torch.float32)
    fill(assembled, source)
    towers = {kind: towers_of(assembled)[kind] for kind in folders}
    prepare_output(output, needed=4 * sum(p.numel() for tower in towers.values() for p in tower.parameters()))
    for kind, folder in folders.items():
        adapter.fold(towers[kind])
        save_tower(towers[kind], folder)
        towers[kind].name = str(folder.resolve())
    named = {kind: replace(getattr(recipe, kind), name=tower.name, revision=None) for kind, tower in towers.items()}
    merged = replace(recipe, output=str(output), lora=None, **named)
    merged = replace(merged, vision=replace(merged.vision, lora=None))
    save_checkpoint(output, assembled._replace(recipe=merged))
    return list(folders.values())


def save_tower(tower: adapter.Tower, folder: Path) -> None:
    """In transformers' own format; the folder is whole or not there. ValueError where it cannot be written."""
    partial = folder.with_name(folder.name + ".partial")
    try:
        with quiet_transformers():
            adapter.model_of(tower).save_pretrained(partial)
            (tower.tokenizer if isinstance(tower, LanguageTower) else tower.processor).save_pretrained(partial)
        partial.replace(folder)
    except OSError as error:
        raise ValueError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
