"""EfficientNet-Lite0 (arXiv 1905.11946, without squeeze-excite), every BatchNorm folded into its convolution.

It is here because its ImageNet weights come as a package: a vision tower for a machine that reaches no model hub.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# repeats, kernel, stride, expansion, channels: table 1 of the paper
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
BATCH_NORM_EPS = 1e-3


class Features(NamedTuple):
    """What the tower reads from any encoder."""

    hidden_states: tuple[Float[Tensor, "n v rows columns"]]


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, and ReLU6 unless `linear`.

    At stride 2 that padding is uneven: one more row and column below and right. A kernel that is one wider, with zeros
    above and left, needs only even padding, and no copy of the image: a quarter faster.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        width = kernel + stride - 1
        super().__init__(inputs, outputs, width, stride, padding=(width - 1) // 2, groups=groups)
        self.linear = linear

    def forward(self, input: Float[Tensor, "n c y x"]) -> Float[Tensor, "n o y2 x2"]:
        out = super().forward(input)
        return out if self.linear else F.relu6(out, inplace=True)


class Block(nn.Module):
    """An inverted bottleneck: widen, look at each channel's neighbourhood, narrow again."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        widen = [Conv(inputs, inner, 1)] if expansion > 1 else []
        self.convs = nn.Sequential(
            *widen, Conv(inner, inner, kernel, stride, groups=inner), Conv(inner, outputs, 1, linear=True)
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "n c y x"]) -> Float[Tensor, "n o y2 x2"]:
        return self.convs(x) + x if self.residual else self.convs(x)


class EfficientNetLite0(nn.Module):
    """Pixels to the feature map after the 1280-channel head: 224 x 224 gives 7 x 7. Sides must be multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv(3, STEM, 3, stride=2)]
        channels = STEM
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for i in range(repeats):
                layers.append(Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.layers = nn.Sequential(*layers, Conv(channels, HEAD, 1))

    def forward(self, pixel_values: Float[Tensor, "n 3 y x"], output_hidden_states: object = None) -> Features:  # noqa: ARG002
        """The one map is the only hidden state, whichever are asked for."""
        if any(side % 32 for side in pixel_values.shape[-2:]):  # the uneven padding needs even sides throughout
            raise ValueError("its sides must be multiples of 32")
        if pixel_values.device.type != "cpu":
            return Features((self.layers(pixel_values),))
        # eight images at a time stay in the CPU's cache: a tenth to a half faster than 32 at once
        return Features((torch.cat([self.layers(part) for part in pixel_values.split(8)]),))


def fold(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights (convolutions, each followed by its BatchNorm, in order) as those of EfficientNetLite0.

    w' = w g / sqrt(var + eps), bias' = b - mean g / sqrt(var + eps), in double precision.
    """
    network = EfficientNetLite0()
    convs = [layer for layer in network.modules() if isinstance(layer, Conv)]
    weights = [value for value in published.values() if value.ndim == 4]
    norms = [key.removesuffix("running_var") for key in published if key.endswith("running_var")]
    assert len(convs) == len(weights) == len(norms), (len(convs), len(weights), len(norms))
    for conv, weight, norm in zip(convs, weights, norms, strict=True):
        gain, bias, mean, var = (
            published[norm + key].double() for key in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gain / (var + BATCH_NORM_EPS).sqrt()
        wider = conv.kernel_size[0] - weight.shape[-1]
        conv.weight.data = F.pad(weight.double() * gain[:, None, None, None], (wider, 0, wider, 0)).float().contiguous()
        assert conv.bias is not None
        conv.bias.data = (bias - mean * gain).float()
    return network.state_dict()


def convert(published: Path, folder: Path) -> None:
    """From the published file of weights, write what `load` and an image processor read: 224 x 224 pixels in -1 … 1."""
    save_file(fold(torch.load(published, weights_only=True)), folder / "model.safetensors")
    write_processor(folder, 224)


def write_processor(folder: Path, size: int) -> None:
    """An image processor that makes `size` x `size` pixels in -1 … 1."""
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


def load(folder: Path) -> EfficientNetLite0:
    """The network that `convert` wrote into `folder`."""
    with torch.device("meta"):  # no time for random weights that are overwritten at once
        network = EfficientNetLite0()
    network.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return network
