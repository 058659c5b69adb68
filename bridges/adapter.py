"""LoRA on a tower (Hu et al. 2021, arXiv 2106.09685): peft's layers, which train beside the bridge."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bridges.config import Lora
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

Tower = LanguageTower | VisionTower
Kind = Literal["language", "vision"]
FOLDERS: dict[Kind, str] = {"language": "adapter", "vision": "vision_adapter"}
WEIGHTS: dict[Kind, str] = {kind: f"{folder}/adapter_model.safetensors" for kind, folder in FOLDERS.items()}
KEYS: dict[Kind, str] = {"language": "lora", "vision": "vision.lora"}  # of a recipe
PREFIX = "base_model.model."  # of every name in peft's files


def kind_of(tower: Tower) -> Kind:
    return "language" if isinstance(tower, LanguageTower) else "vision"


def model_of(tower: Tower) -> Any:
    return tower.model if isinstance(tower, LanguageTower) else tower.encoder


def attach(tower: Tower, lora: Lora) -> None:
    """Give a tower an adapter, in place and in fp32; it changes nothing before the first step.

    Raises ValueError: peft is not installed, a target matches nothing, rank or dropout are none.
    """
    key = KEYS[kind_of(tower)]
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ValueError(f"{key} needs peft: pip install 'mm-bridges[lora]'") from error
    if lora.rank < 1:
        raise ValueError(f"{key}.rank {lora.rank}: a matrix has a rank of at least 1; leave {key} out for none")
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"{key}.dropout {lora.dropout} is no probability; 0.05 is usual")
    model, task = model_of(tower), None
    if isinstance(tower, LanguageTower):
        task = "SEQ_2_SEQ_LM" if tower.has_encoder else "CAUSAL_LM"
    config = LoraConfig(
        task_type=task,
        base_model_name_or_path=tower.name,
        target_modules=targets(tower, lora.targets),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    inject_adapter_in_model(config, model)
    tower.adapters = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for parameter in parameters(tower):
        parameter.data = parameter.data.float()
    tower.train(False)


def targets(tower: Tower, names: list[str]) -> list[str]:
    """Names of the linear layers to adapt, by default all but the head; in an encoder only those that features come
    through, since another would train on nothing. ValueError for one that matches nothing."""
    model, key = model_of(tower), KEYS[kind_of(tower)]
    linear = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    if isinstance(tower, LanguageTower):
        head = model.get_output_embeddings()
        layers = [n for n, m in linear.items() if m is not head]
    else:
        used = tower.used()
        layers = [n for n in linear if f"{n}.weight" in used]
        if not layers:
            raise ValueError(f"{key}: features of {tower.name} come through no linear layer; give it a transformer")
    exist = sorted({name.rpartition(".")[2] for name in layers})
    for name in names:
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            raise ValueError(f"{key}.targets: no linear layer is named {name!r}; there are {', '.join(exist)}")
    if isinstance(tower, LanguageTower):
        return names or exist
    return [layer for layer in layers if not names or any(f".{layer}".endswith(f".{name}") for name in names)]


def parameters(tower: Tower) -> list[nn.Parameter]:
    """What trains in a tower, by place: peft's layers, without the frozen ones that they stand beside."""
    return [p for layer in tower.adapters for p in layer.parameters() if p.requires_grad]


def state(tower: Tower) -> dict[str, Tensor]:
    """The tensors of the adapter themselves, by peft's names; empty where there is none."""
    if not tower.adapters:
        return {}
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model_of(tower), save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in found.items()}


@torch.no_grad()
def load_state(tower: Tower, given: dict[str, Tensor]) -> None:
    """Strict: every tensor, none more, of the right shape. ValueError (`is …`, `has …`) where they do not fit."""
    own, key = state(tower), KEYS[kind_of(tower)]
    if wrong := sorted(own.keys() ^ given.keys()):
        raise ValueError(f"has other layers than the recipe's {key}: {len(wrong)} differ, such as {wrong[0]}")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise ValueError(f"has {tuple(given[name].shape)} in {name}, the recipe's {key} {tuple(tensor.shape)}")
        tensor.copy_(given[name])


def files(tower: Tower) -> dict[str, bytes]:
    """What plain peft opens (`PeftModel.from_pretrained`), by file name; nothing where there is no adapter."""
    if not tower.adapters:
        return {}
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state(tower).items()}
    with TemporaryDirectory() as folder:
        model_of(tower).peft_config["default"].save_pretrained(folder)
        config = (Path(folder) / "adapter_config.json").read_bytes()
    kind = kind_of(tower)
    return {WEIGHTS[kind]: save(weights, metadata={"format": "pt"}), f"{FOLDERS[kind]}/adapter_config.json": config}


def fold(tower: Tower) -> None:
    """Add the adapter to the weights that it stands beside, and take it away: it is another model then."""
    names = {layer: name for name, layer in model_of(tower).named_modules()}
    for layer in tower.adapters:
        layer.merge(safe_merge=True)
        model_of(tower).set_submodule(names[layer], layer.get_base_layer())
    tower.adapters = []
    tower.mark()
