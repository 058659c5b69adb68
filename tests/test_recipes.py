"""Every YAML that comes with the library is a recipe whose bridge can be built."""

from pathlib import Path

import pytest
import torch

from bridges.checkpoint import build_bridge
from bridges.config import read_recipe
from bridges.data.template import TEMPLATES
from bridges.objectives.pairs import PairObjective

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

# width of the encoders that recipes name, and patches beside the CLS token, as published
ENCODERS = {
    "bundled:efficientnet-lite0": (1280, 49),
    "openai/clip-vit-large-patch14": (1024, 256),
    "Salesforce/blip2-itm-vit-g": (1408, 256),
    "openai/clip-vit-large-patch14-336": (1024, 576),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (1280, 256),
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
}
FOLDERS = {"blip2-flan-t5-xxl"}  # of released weights, which a recipe says how to fetch


def test_there_are_recipes() -> None:
    first = {"demo", "minigpt4_align", "minigpt4_instruct", "llava15_align", "llava15_instruct"}
    second = {"blip2_stage1", "blip2_stage2_opt", "blip2_stage2_t5", "instructblip", "demo_qformer"}
    third = {"flamingo_3b", "openflamingo_4b", "idefics_9b", "demo_flamingo"}
    fourth = {"llava15_instruct_lora", "minigptv2_lora", "qlora_24gb", "demo_lora"}
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
        outputs = {Path(read_recipe(p).output).name for p in RECIPES}
        assert Path(start).name in outputs | FOLDERS | {p.name for p in RECIPES}
