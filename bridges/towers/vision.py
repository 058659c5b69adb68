"""The frozen image encoder: any one of transformers that gives image features, or the one that comes bundled."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
)
from transformers.image_processing_backends import PilBackend

from bridges.towers import efficientnet
from bridges.towers.bundled import quiet_transformers, resolve
from bridges.towers.framing import ImageMode, Tiler, framed
from bridges.towers.frozen import wake
from bridges.towers.precision import fastest_dtype

# encoders that AutoModel does not give: EVA-CLIP's ViT-g as BLIP-2 and InstructBLIP carry it
BESIDE: dict[type, Any] = {Blip2VisionConfig: Blip2VisionModel, InstructBlipVisionConfig: InstructBlipVisionModel}
PREPROCESSING = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
PREPROCESSING += ("do_normalize", "image_mean", "image_std")


class VisionTower(nn.Module):
    """Pixels to features, frozen for ever: no gradient, no dropout, no moving BatchNorm, whatever `train()` says.
    But for `adapters`, peft's layers within it, which train; mostly there are none.

    `layer` counts the encoder's hidden states as LLaVA does: 0 is what enters the first layer, -1 what leaves the last,
    -2 what leaves the one before. This is the residual stream: CLIP's, SigLIP's or DINO's final norm is not applied.
    Tokens that are no patch (CLS, registers) are dropped; `keep_cls` keeps the first of them, in front.
    An encoder without such tokens loses nothing. `image_mode`: see `framing.framed`. `tiles`: the most of a picture
    (`tiler`, see `framing.Tiler`), where it is more than one image. `image_size`: the side of an image, if not its own.

    `name`, `dim` (v), `num_patches` (p), `image_size` (y, x), `grid` (rows, columns): num_patches is rows x columns, in
    reading order, + 1 with `keep_cls`.

    Raises ValueError where there is no such encoder, or it cannot do what is asked.
    """

    def __init__(
        self,
        name_or_path: str,
        layer: int = -1,
        keep_cls: bool = False,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        image_mode: ImageMode | None = None,
        tiles: int | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.image_mode: ImageMode | None = image_mode
        self.name = name_or_path
        where = resolve(name_or_path)
        if revision and Path(where).is_dir():
            raise ValueError(f"{name_or_path} is a folder and has no revisions: leave revision={revision!r} out")
        with quiet_transformers():
            self.processor, self.encoder = read(name_or_path, where, revision)
            if image_size:
                self.processor = resized(self.processor, image_size)
        self.requires_grad_(False)
        self.adapters: list[Any] = []
        self.train(False)
        self.image_size = output_size(self.processor, name_or_path)
        if image_size and self.image_size != (image_size, image_size):
            raise ValueError(f"vision.image_size {image_size}: the processor of {name_or_path} makes {self.image_size}")
        self.mean = tuple(self.processor.image_mean or (0.5,) * 3)
        self.tile(tiles)
        shapes = [tuple(hidden.shape) for hidden in self._states_on_meta()[1]]
        if not -len(shapes) <= layer < len(shapes):
            raise ValueError(
                f"{self.name} has no layer {layer}: its hidden states are -{len(shapes)} … {len(shapes) - 1}"
            )
        self.layer, self.keep_cls = layer % len(shapes), keep_cls
        self._is_map = len(shapes[self.layer]) == 4
        self.grid, self.dim, self._prefix = self._arrangement(shapes[self.layer])
        if keep_cls and not self._prefix:
            raise ValueError(f"keep_cls: {name_or_path} has no CLS token, only {self.grid[0]} x {self.grid[1]} patches")
        self.num_patches = self.grid[0] * self.grid[1] + keep_cls
        self.mark()
        if self._is_map:  # up to three times faster on a CPU, and what half precision on a GPU wants
            self.encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.encoder.to(dtype or fastest_dtype())

    def train(self, mode: bool = True) -> "VisionTower":
        """Frozen is frozen: neither dropout nor BatchNorm wakes, but for the dropout of the adapter."""
        super().train(False)
        wake(self.adapters, mode)
        return self

    def tile(self, most: int | None) -> None:
        """Let pictures be cut into so many tiles at most, from now on. ValueError for fewer than two."""
        if most is not None and most < 2:
            raise ValueError(f"vision.tiles {most}: a grid has at least 2 tiles; leave it out for none")
        self.tiler = Tiler(most, self.image_size, self.image_mode, self.mean) if most else None

    def preprocess(self, images: Sequence[Image.Image]) -> Float[Tensor, "n 3 y x"]:
        """Pictures of any size and mode, as the encoder was trained to see them, in float32 on the CPU."""
        if not images:
            return torch.empty(0, 3, *self.image_size)
        return pixels_of(self.processor, [framed(i, self.image_mode, self.image_size, self.mean) for i in images])

    def forward(self, pixel_values: Float[Tensor, "n 3 y x"]) -> Float[Tensor, "n p v"]:
        """Features in the tower's own dtype (`tower.dtype`), with a gradient only to its adapter. n may be 0.

        Raises ValueError for images of another size than `image_size`.
        """
        size = tuple(pixel_values.shape[-2:])
        if size != self.image_size:
            raise ValueError(f"{self.name} takes images of {self.image_size} (y, x), got {size}")
        pixel_values, trains = pixel_values.to(self.dtype), bool(self.adapters) and torch.is_grad_enabled()
        if not len(pixel_values) and not trains:
            return pixel_values.new_empty(0, self.num_patches, self.dim)
        # with none, a black picture that nobody sees: every process of a parallel run has the adapter in its graph
        shown = pixel_values if len(pixel_values) else pixel_values.new_zeros(1, 3, *size)
        with torch.set_grad_enabled(trains):
            return self._features(shown)[: len(pixel_values)]

    def _features(self, pixel_values: Float[Tensor, "n 3 y x"]) -> Float[Tensor, "n p v"]:
        if self._is_map:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        # only the one state is kept, so that a deep encoder does not hold all of them in memory
        features = self.encoder(pixel_values, output_hidden_states=[self.layer]).hidden_states[self.layer]
        if self._is_map:
            return rearrange(features, "n v rows columns -> n (rows columns) v")
        patches = features[:, self._prefix :]
        return torch.cat([features[:, :1], patches], dim=1) if self.keep_cls else patches

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def fingerprint(self) -> str:
        """Twelve hex digits that tell these features from any other tower's.

        Taken from a strided sample of every weight as the checkpoint stores it (so it is the same in any dtype and on
        any device) and before it had an adapter, the layer, the tokens kept and the preprocessing.
        """
        return self._fingerprint

    @torch.enable_grad()
    def used(self) -> set[str]:
        """Names of the encoder's weights that features come through: not those of the layers after `layer`."""
        weights, states = self._states_on_meta()
        found = torch.autograd.grad(states[self.layer].sum(), list(weights.values()), allow_unused=True)
        return {name for name, gradient in zip(weights, found, strict=True) if gradient is not None}

    def _states_on_meta(self) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Weights, and every hidden state of one image, without computing: the encoder runs on the meta device."""
        weights = {key: tensor.to("meta").requires_grad_() for key, tensor in self.encoder.named_parameters()}
        others = {key: tensor.to("meta") for key, tensor in self.encoder.named_buffers()}
        image = torch.empty(1, 3, *self.image_size, device="meta", dtype=self.dtype)
        every: Any = {"output_hidden_states": True}
        try:
            return weights, functional_call(self.encoder, {**weights, **others}, (image,), every).hidden_states
        except (ValueError, TypeError, RuntimeError) as error:
            size = "{} x {}".format(*self.image_size)
            reason = f"cannot take images of {size}: {first_sentence(error)}"
            raise ValueError(f"{self.name} {reason}") from error

    def _arrangement(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], int, int]:
        """(grid, width, tokens before the first patch) of a hidden state of this shape."""
        if self._is_map:
            return (shape[2], shape[3]), shape[1], 0
        _, tokens, dim = shape
        patch = getattr(self.encoder.config, "patch_size", 1)  # without one, halved from single pixels
        patch_y, patch_x = (patch, patch) if isinstance(patch, int) else patch
        rows, columns = self.image_size[0] // patch_y, self.image_size[1] // patch_x
        while rows * columns > tokens:  # hierarchical encoders halve the grid, and have patches only
            rows, columns = rows // 2, columns // 2
            if rows * columns < tokens:
                raise ValueError(f"{self.name} gives {tokens} tokens, no grid of patches of a {self.image_size} image")
        prefix = tokens - rows * columns
        if prefix > 16:
            raise ValueError(
                f"{self.name} gives {tokens} tokens, but has {rows} x {columns} patches: not an encoder of them"
            )
        return (rows, columns), dim, prefix

    def mark(self) -> None:
        """From now on the weights as they are tell these features from others."""
        settings = self.processor.to_dict()
        seen = {key: settings[key] for key in PREPROCESSING if settings.get(key) is not None}
        chosen = [self.layer, self.keep_cls, seen, *([self.image_mode] if self.image_mode else [])]
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True, default=dict).encode())
        for key, tensor in self.encoder.state_dict().items():
            sample = tensor.flatten()[:: max(1, tensor.numel() // 64)][:64].float()
            digest.update(f"{key}{tuple(tensor.shape)}{sample.tolist()}".encode())
        self._fingerprint = digest.hexdigest()[:12]


def read(name: str, where: str, revision: str | None) -> tuple[Any, Any]:
    """The image processor (on PIL) and the encoder in the checkpoint's dtype. Of CLIP and its kin, the vision half."""
    if name == "bundled:efficientnet-lite0":
        return read_processor(where, None), efficientnet.load(Path(where))
    try:
        config = AutoConfig.from_pretrained(where, revision=revision)
        config = getattr(config, "vision_config", config)
        family: Any = BESIDE.get(type(config)) or MODEL_MAPPING[type(config)]
        if family.main_input_name != "pixel_values":
            raise ValueError(f"{config.model_type} is no image encoder")
        processor = read_processor(where, revision)
        options = {"config": config, "revision": revision, "dtype": "auto", "output_loading_info": True}
        if type(config) in BESIDE:
            encoder, report = family.from_pretrained(where, **options, key_mapping={r"^vision_model\.": ""})
        else:
            encoder, report = AutoModel.from_pretrained(where, **options)
    except KeyError as error:
        raise ValueError(f"no image encoder in {name!r}: transformers has none for {first_sentence(error)}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"no image encoder in {name!r}: {first_sentence(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(("pooler", "head")))  # not on our way
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of a {type(encoder).__name__}, such as {missing[0]}")
    return processor, encoder


def read_processor(where: str, revision: str | None) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(where, revision=revision, backend="pil")
    except ImportError:
        # DINOv3's exists for torchvision alone; the same steps on PIL differ from it by the rounding to 8 bits
        return PilBackend.from_pretrained(where, revision=revision or "main")


def resized(processor: Any, side: int) -> Any:
    """One that makes squares of so many pixels; what it crops at the edges stays the same share."""
    if side < 1:
        raise ValueError(
            f"vision.image_size {side}: a picture has at least one pixel; leave it out for the encoder's own"
        )
    given, share = processor.to_dict(), 1.0
    size = {key: value for key, value in given["size"].items() if value}
    if given.get("do_center_crop"):
        share = min(size.values()) / given["crop_size"]["height"]
        given["crop_size"] = {"height": side, "width": side}
    given["size"] = dict.fromkeys(size, round(share * side))
    return type(processor).from_dict(given)


def pixels_of(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    return processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]


def output_size(processor: Any, name: str) -> tuple[int, int]:
    """(y, x) of every image that leaves the processor, by trying a wide one and a tall one."""
    wide, tall = (pixels_of(processor, [Image.new("RGB", size)]) for size in ((64, 32), (32, 64)))
    if wide.ndim != 4:
        raise ValueError(f"{name} cuts images into patches of its own (NaFlex): take a fixed-resolution checkpoint")
    if wide.shape != tall.shape:
        shapes = f"{tuple(wide.shape[2:])} and {tuple(tall.shape[2:])}"
        raise ValueError(f"{name} gives images of different sizes, such as {shapes}: set crop_size in its processor")
    return wide.shape[2], wide.shape[3]


def first_sentence(error: Exception) -> str:
    return re.split(r"\.\s|\n", str(error).strip())[0]
