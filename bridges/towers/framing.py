"""How a picture of any shape becomes one of the encoder's shape, where its own processor should not decide that."""

from collections.abc import Sequence
from typing import Literal

from PIL import Image, ImageOps

ImageMode = Literal["resize", "pad", "crop"]


def framed(image: Image.Image, mode: ImageMode | None, size: tuple[int, int], mean: Sequence[float]) -> Image.Image:
    """The picture in the shape of `size` (y, x): what the processor then does cuts nothing off but its usual margin.

    `resize` shows all of it, squashed; `pad` all of it, in the middle of the colour `mean` (0 to 1), as LLaVA-1.5 does;
    `crop` its middle. None leaves it to the processor.
    """
    y, x = size
    if mode is None:
        return image
    if mode == "resize":
        return image.convert("RGB").resize((x, y), Image.Resampling.BICUBIC)
    image = image.convert("RGB")
    short = min(image.width / x, image.height / y)
    if mode == "crop":
        return ImageOps.fit(image, (max(1, round(x * short)), max(1, round(y * short))), Image.Resampling.BICUBIC)
    image = ImageOps.contain(image, (x, y), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (x, y), (round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])))
    canvas.paste(image, ((x - image.width) // 2, (y - image.height) // 2))
    return canvas
