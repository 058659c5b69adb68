"""What steps of growing size took, beside what their count of multiplications foretells: tables, a sentence, a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import log
from typing import TYPE_CHECKING

from rich.table import Table

from bridges.evaluation.plots import drawn, finished

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALIKE = 1.1
COLOUR = "#2f80ed"


@dataclass(frozen=True)
class Point:
    """A step of one size: seconds (median, least, most), operations in its products (a multiplication and an addition
    are two), and the seconds that these take."""

    size: int
    positions: int
    seconds: float
    least: float
    most: float
    operations: float
    products: float

    @property
    def rate(self) -> float:
        """Operations a second within products."""
        return self.operations / self.products


def middle(points: Sequence[Point]) -> Point:
    """From this one the others are foretold."""
    return points[len(points) // 2]


def foretold(points: Sequence[Point]) -> list[float]:
    """Seconds in proportion to operations."""
    known = middle(points)
    return [known.seconds * point.operations / known.operations for point in points]


def apart(points: Sequence[Point]) -> list[float]:
    """How many times what is foretold a step takes."""
    return [point.seconds / line for point, line in zip(points, foretold(points), strict=True)]


def table(axis: str, points: Sequence[Point]) -> Table:
    """A row for each size."""
    heads = (axis, "positions", "seconds", "foretold", "times that", "GFLOP", "products s", "all else s", "GFLOP/s")
    shown = Table(*heads, box=None)
    for point, line, times in zip(points, foretold(points), apart(points), strict=True):
        shown.add_row(
            str(point.size),
            str(point.positions),
            f"{point.seconds:.3f} [{point.least:.3f} – {point.most:.3f}]",
            f"{line:.3f}",
            f"{times:.2f}",
            f"{point.operations / 1e9:.1f}",
            f"{point.products:.3f}",
            f"{max(0.0, point.seconds - point.products):.3f}",
            f"{point.rate / 1e9:.0f}",
        )
    return shown


def sentence(axis: str, points: Sequence[Point]) -> str:
    """Where seconds and multiplications part company, and why."""
    known, ratios = middle(points), apart(points)
    far = max(range(len(points)), key=lambda place: abs(log(ratios[place])))
    if max(ratios[far], 1 / ratios[far]) < ALIKE:
        return f"Foretold from {known.size}, all others are within {max(ratios[far], 1 / ratios[far]) - 1:.0%}."
    point = points[far]
    rest, known_rest = (1 - min(1.0, p.products / p.seconds) for p in (point, known))
    return (
        f"Furthest apart at {point.size} ({axis}): {ratios[far]:.2f} times what is foretold from {known.size}; "
        f"products run at {point.rate / 1e9:.0f} GFLOP/s there, {known.rate / 1e9:.0f} here, all else is {rest:.0%} of "
        f"the step there, {known_rest:.0%} here."
    )


def plot_text(found: Mapping[str, Sequence[Point]]) -> str:
    """An SVG: a panel for each size that grows, both axes logarithmic, so that what is in proportion is straight."""
    return drawn(partial(_draw, found), 3.4 * len(found), 3.2)


def _draw(found: Mapping[str, Sequence[Point]], figure: "Figure") -> None:
    from matplotlib.ticker import LogLocator

    for axes, (axis, points) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        sizes = [point.size for point in points]
        spread = [[p.seconds - p.least for p in points], [p.most - p.seconds for p in points]]
        middles = [point.seconds for point in points]
        axes.errorbar(sizes, middles, spread, fmt="o", color=COLOUR, capsize=3, markersize=4, label="measured")
        axes.plot(sizes, foretold(points), "--", color="grey", linewidth=1, label="by multiplications")
        axes.set_xscale("symlog" if 0 in sizes else "log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(axis)
        axes.set_ylabel("seconds a step")
        finished(axes)
