"""How a picture of any shape becomes one of the encoder's shape, or several of it: tiles, and the whole of it small."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal
from weakref import ref

from PIL import Image, ImageOps

ImageMode = Literal["resize", "pad", "crop"]
TILE = "tile of a picture"
"""In the `info` of an image that is one."""


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
    long = max(image.width / x, image.height / y)
    image = image.resize(
        (max(1, round(image.width / long)), max(1, round(image.height / long))), Image.Resampling.BICUBIC
    )
    canvas = Image.new("RGB", (x, y), (round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2])))
    canvas.paste(image, ((x - image.width) // 2, (y - image.height) // 2))
    return canvas


def grid_of(width: int, height: int, most: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of at most `most` tiles of `size` (y, x) in which the most pixels of a picture stay, enlarged
    nowhere (as LLaVA-NeXT chooses); a larger grid must keep a quarter more of them than a smaller one.
    """

    def kept(grid: tuple[int, int]) -> float:
        return min(1.0, grid[0] * size[0] / height, grid[1] * size[1] / width) ** 2

    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    best = (1, 1)
    for grid in sorted(grids, key=lambda g: (g[0] * g[1], -kept(g))):
        best = grid if kept(grid) > 1.25 * kept(best) else best
    return best


class Tiler:
    """Cuts a picture into a grid of at most `most` tiles of `size` (y, x), in reading order; the whole picture is last.

    A picture that is no larger than a tile stays alone. `framed` does with the grid's shape what it does with a tile's;
    where it leaves that to the processor, the picture is squashed into the grid. As long as a picture lives its tiles
    are the same objects, so that texts about it share them.
    """

    def __init__(
        self, most: int, size: tuple[int, int], mode: ImageMode | None = None, mean: Sequence[float] = (0.5, 0.5, 0.5)
    ) -> None:
        self.most, self.size, self.mean = most, size, mean
        self.mode: ImageMode = mode or "resize"
        self._cut: dict[int, tuple[Callable[[], Image.Image | None], list[Image.Image]]] = {}

    def __call__(self, image: Image.Image) -> list[Image.Image]:
        known, tiles = self._cut.get(id(image), (None, []))
        if known is None or known() is not image:
            for old in [old for old, (picture, _) in list(self._cut.items()) if picture() is None]:
                self._cut.pop(old, None)
            tiles = self.tiles(image)
            self._cut[id(image)] = ref(image), tiles
        return [*tiles, image]

    def tiles(self, image: Image.Image) -> list[Image.Image]:
        rows, columns = grid_of(image.width, image.height, self.most, self.size)
        if rows * columns == 1:
            return []
        y, x = self.size
        whole = framed(image, self.mode, (rows * y, columns * x), self.mean).resize((columns * x, rows * y))
        places = product(range(0, rows * y, y), range(0, columns * x, x))
        tiles = [whole.crop((left, top, left + x, top + y)) for top, left in places]
        for tile in tiles:
            tile.info = {TILE: True}
        return tiles


def wholes(images: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures among the images that they became: people count pictures, whatever they are cut into."""
    return [image for image in images if TILE not in image.info]
