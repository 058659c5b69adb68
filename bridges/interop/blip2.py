"""BLIP-2 and InstructBLIP as transformers saves them, and our Q-Former: the same tensors under other names."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

FAMILIES = {"blip-2": "nothing", "instructblip": "instructions"}
# module of a layer here -> there
LAYER = {
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "cross.query": "crossattention.attention.query",
    "cross.key": "crossattention.attention.key",
    "cross.value": "crossattention.attention.value",
    "cross.out": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
    "feed.0": "intermediate_query.dense",
    "feed.2": "output_query.dense",
    "feed_norm": "output_query.LayerNorm",
    "text_feed.0": "intermediate.dense",
    "text_feed.2": "output.dense",
    "text_feed_norm": "output.LayerNorm",
}
# module here -> there; the first stage's heads are those of Blip2ForImageTextRetrieval
MODULES = {
    "vision_norm": "vision_model.post_layernorm",
    "projection": "language_projection",
    "heads.image": "vision_projection",
    "heads.text": "text_projection",
    "heads.match": "itm_head",
}


def names(layers: int, family: str) -> dict[str, str]:
    """Our tensor -> theirs, for every tensor that both may have. `query_tokens` has a dimension of 1 in front there."""
    instruct = family == "instructblip"
    tables = "qformer.embeddings" if instruct else "embeddings"
    modules = {**MODULES, "norm": "qformer.embeddings.layernorm" if instruct else "qformer.layernorm"}
    for i in range(layers):
        modules |= {f"layers.{i}.{ours}": f"qformer.encoder.layer.{i}.{theirs}" for ours, theirs in LAYER.items()}
    both = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    both["word_table.weight"] = f"{tables}.word_embeddings.weight"
    both["place_table.weight"] = f"{tables}.position_embeddings.weight"
    return {**both, "queries": "query_tokens"}


def is_blip2(folder: Path) -> bool:
    """Whether a folder holds a BLIP-2 or InstructBLIP of transformers."""
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") in FAMILIES


def read_options(folder: Path) -> dict[str, Any]:
    """What our `qformer` is to be called with, to have the sizes of a saved one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sizes = config["qformer_config"]
    return {
        "name": "qformer",
        "queries": config["num_query_tokens"],
        "layers": sizes["num_hidden_layers"],
        "width": sizes["hidden_size"],
        "heads": sizes["num_attention_heads"],
        "inner": sizes["intermediate_size"],
        "cross_every": sizes["cross_attention_frequency"],
        "reads": FAMILIES[config["model_type"]],
    }


def read_blip2(folder: Path) -> dict[str, Tensor]:
    """The weights of our `qformer` from a folder in safetensors. The towers in it are not read.

    Raises ValueError where there are no safetensors, or no Q-Former in them.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, sizes = config["model_type"], config["qformer_config"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {folder}; save the model again with save_pretrained")
    there: dict[str, Tensor] = {}
    wanted = set(names(sizes["num_hidden_layers"], family).values())
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            there |= {key: tensors.get_tensor(key) for key in tensors.keys() if key in wanted}  # noqa: SIM118
    weights = from_blip2(there, sizes["num_hidden_layers"], family)
    if "queries" not in weights:
        raise ValueError(f"{folder} lacks query_tokens: it is no whole model of the family {family}")
    return weights


def from_blip2(weights: dict[str, Tensor], layers: int, family: str) -> dict[str, Tensor]:
    """Their tensors under our names."""
    ours = {here: weights[there] for here, there in names(layers, family).items() if there in weights}
    return {name: tensor[0] if name == "queries" else tensor for name, tensor in ours.items()}


def to_blip2(weights: dict[str, Tensor], layers: int, family: str) -> dict[str, Tensor]:
    """Our tensors under their names; those that only our first stage has are left out."""
    theirs = {there: weights[here] for here, there in names(layers, family).items() if here in weights}
    return {name: tensor[None] if name == "query_tokens" else tensor for name, tensor in theirs.items()}
