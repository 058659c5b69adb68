"""Every YAML that comes with the library is a recipe whose bridge can be built."""

import io
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bridges.build import build_bridge
from bridges.data.template import TEMPLATES
from bridges.objectives.pairs import PairObjective
from bridges.recipe import read_recipe
from bridges.training.loop import train
from bridges.training.plan import plan

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

# width of the encoders that recipes name, and patches beside the CLS token, as published
ENCODERS = {
    "bundled:efficientnet-lite0": (1280, 49),
    "openai/clip-vit-large-patch14": (1024, 256),
    "Salesforce/blip2-itm-vit-g": (1408, 256),
    "openai/clip-vit-large-patch14-336": (1024, 576),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (1280, 256),
    "google/siglip-base-patch16-224": (768, 196),
}
WIDTHS = {
    "bundled:smollm2-135m-instruct": (576, 30),
    "lmsys/vicuna-7b-v1.5": (4096, 32),
    "facebook/opt-2.7b": (2560, 32),
    "google/flan-t5-xl": (2048, 24),
    "EleutherAI/pythia-1.4b": (2048, 24),
    "togethercomputer/RedPajama-INCITE-Instruct-3B-v1": (2560, 32),
    "huggyllama/llama-7b": (4096, 32),
    "meta-llama/Llama-2-7b-chat-hf": (4096, 32),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (960, 32),
}
FOLDERS = {"blip2-flan-t5-xxl"}  # of released weights, which a recipe says how to fetch


def test_there_are_recipes() -> None:
    first = {"demo", "minigpt4_align", "minigpt4_instruct", "llava15_align", "llava15_instruct"}
    second = {"blip2_stage1", "blip2_stage2_opt", "blip2_stage2_t5", "instructblip", "demo_qformer"}
    third = {"flamingo_3b", "openflamingo_4b", "idefics_9b", "demo_flamingo"}
    fourth = {"llava15_instruct_lora", "minigptv2_lora", "qlora_24gb", "demo_lora", "first_gpu"}
    assert first | second | third | fourth <= {p.stem for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses_and_its_bridge_builds(path: Path, tiny_bert_folder: Path) -> None:
    recipe = read_recipe(path)
    dim, patches = ENCODERS[recipe.vision.name]
    if "bert" in recipe.bridge:  # whose tokenizer would have to be fetched
        recipe.bridge["words"] = str(tiny_bert_folder)
    PairObjective(recipe.objectives)
    with torch.device("meta"):
        bridge = build_bridge(recipe.bridge, dim, patches + recipe.vision.keep_cls, *WIDTHS[recipe.language.name])
    assert bridge.num_slots <= 576
    assert bridge.num_slots or bridge.blocks, "nothing that the language model could read"
    assert recipe.language.template in ("chat", *TEMPLATES)
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_has_its_command_on_top(path: Path) -> None:
    top = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("bridges" in line for line in top)
    if (start := read_recipe(path).start) is not None:
        assert Path(start).name in outputs() | FOLDERS | {p.name for p in RECIPES}


@cache
def outputs() -> set[str]:
    """The folders that recipes leave."""
    return {Path(read_recipe(p).output).name for p in RECIPES}


def test_the_first_gpu_recipe_plans_and_runs_on_tiny_towers(
    tiny_clip: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its captions come from the hub; here three photographs with five captions each, in the same columns."""
    rows = []
    for number in range(40):
        file = io.BytesIO()
        Image.new("RGB", (64, 48), (number, 0, 0)).save(file, "JPEG")
        captions = {f"caption_{i}": f"Number {number}, seen {i} times." for i in range(5)}
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, **captions})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    recipe = read_recipe(
        next(path for path in RECIPES if path.stem == "first_gpu"),
        [
            f"--vision.name={tiny_clip}",
            f"--language.name={tiny_llama}",
            f"--output={tmp_path / 'run'}",
            f"--data.source={tmp_path / 'train.parquet'}",
            "--train.steps=2",
            "--train.batch=8",
            "--train.micro_batch=4",
        ],
    )
    plan(recipe, "8GB")
    assert "takes micro-batches up to" in " ".join(capsys.readouterr().out.split())
    train(recipe)
    assert (tmp_path / "run" / "bridge.safetensors").exists()
