"""LoRA on the language tower (Hu et al. 2021, arXiv 2106.09685): peft's layers, which train beside the bridge."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bridges.config import Lora
from bridges.towers.language import LanguageTower

FOLDER = "adapter"
WEIGHTS = "adapter/adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files


def attach(language: LanguageTower, lora: Lora) -> None:
    """Give a tower an adapter, in place and in fp32; it changes nothing before the first step.

    Raises ValueError: peft is not installed, a target matches nothing, rank or dropout are none.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ValueError("lora needs peft: pip install 'mm-bridges[lora]'") from error
    if lora.rank < 1:
        raise ValueError(f"lora.rank {lora.rank}: a matrix has a rank of at least 1; leave lora out for none")
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout {lora.dropout} is no probability; 0.05 is usual")
    model: Any = language.model
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if language.has_encoder else "CAUSAL_LM",
        base_model_name_or_path=language.name,
        target_modules=targets(model, lora.targets),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    inject_adapter_in_model(config, model)
    language.adapters = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for parameter in parameters(language):
        parameter.data = parameter.data.float()
    language.train(False)


def targets(model: Any, names: list[str]) -> list[str]:
    """Names of the linear layers to adapt, by default all but the head. ValueError for one that matches nothing."""
    head = model.get_output_embeddings()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    exist = sorted({name.rpartition(".")[2] for name in layers})
    for name in names:
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            raise ValueError(f"lora.targets: no linear layer is named {name!r}; there are {', '.join(exist)}")
    return names or exist


def parameters(language: LanguageTower) -> list[nn.Parameter]:
    """What trains in a tower, by place: peft's layers, without the frozen ones that they stand beside."""
    return [p for layer in language.adapters for p in layer.parameters() if p.requires_grad]


def state(language: LanguageTower) -> dict[str, Tensor]:
    """The tensors of the adapter themselves, by peft's names; empty where there is none."""
    if not language.adapters:
        return {}
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(language.model, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in found.items()}


@torch.no_grad()
def load_state(language: LanguageTower, given: dict[str, Tensor]) -> None:
    """Strict: every tensor, none more, of the right shape. ValueError (`is …`, `has …`) where they do not fit."""
    own = state(language)
    if wrong := sorted(own.keys() ^ given.keys()):
        raise ValueError(f"has other layers than the recipe's lora: {len(wrong)} differ, such as {wrong[0]}")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise ValueError(f"has {tuple(given[name].shape)} in {name}, the recipe's lora {tuple(tensor.shape)}")
        tensor.copy_(given[name])


def files(language: LanguageTower) -> dict[str, bytes]:
    """What plain peft opens (`PeftModel.from_pretrained`), by file name; nothing where there is no adapter."""
    if not language.adapters:
        return {}
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state(language).items()}
    with TemporaryDirectory() as folder:
        language.model.peft_config["default"].save_pretrained(folder)
        config = (Path(folder) / "adapter_config.json").read_bytes()
    return {WEIGHTS: save(weights, metadata={"format": "pt"}), f"{FOLDER}/adapter_config.json": config}


def fold(language: LanguageTower) -> None:
    """Add the adapter to the weights that it stands beside, and take it away: it is another language model then."""
    names = {layer: name for name, layer in language.model.named_modules()}
    for layer in language.adapters:
        layer.merge(safe_merge=True)
        language.model.set_submodule(names[layer], layer.get_base_layer())
    language.adapters = []
    language.mark()
