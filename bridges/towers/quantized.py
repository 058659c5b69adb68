"""Linear layers of a frozen language model in 8 or 4 bits, with bitsandbytes. What trains is never quantized."""

from typing import Any, Literal

import torch
from torch import nn

Bits = Literal["int8", "nf4"]


def quantize(model: Any, bits: Bits) -> list[nn.Module]:
    """Put quantized layers in the place of a model's linear ones, in place; the head and embeddings stay. Returns them.

    `int8` is LLM.int8() (arXiv 2208.07339) with its threshold of 6; `nf4` is QLoRA's (arXiv 2305.14314), with double
    quantization. It is done on the GPU, layer by layer, if there is one; the whole model is in RAM before.
    Raises ValueError where bitsandbytes is not installed, or there is nothing to quantize.
    """
    try:
        from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    except ImportError as error:
        raise ValueError(f"language.quantize {bits} needs bitsandbytes: pip install 'mm-bridges[quant]'") from error
    kept = model._keep_in_fp32_modules or []
    head = model.get_output_embeddings()
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer is not head and name.rpartition(".")[2] not in kept
    ]
    if not found:
        raise ValueError(f"language.quantize {bits}: {model.config.model_type} has no linear layers; leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameter: Any = Params4bit if bits == "nf4" else Int8Params
    layers: list[nn.Module] = []
    for name, layer in found:
        sizes: Any = (layer.in_features, layer.out_features, layer.bias is not None)
        if bits == "nf4":
            new = Linear4bit(*sizes, compute_dtype=layer.weight.dtype, device="meta")
            new.weight = parameter(layer.weight.data, quant_type="nf4", compress_statistics=True, module=new)
        else:
            new = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = parameter(layer.weight.data, requires_grad=False)
        new.bias = layer.bias
        model.set_submodule(name, new.to(device))
        layers.append(new)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == "nf4", bits == "int8"  # what peft goes by
    return layers
