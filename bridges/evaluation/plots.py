"""What all plots share: they are SVG, and the same figures give the same file."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def drawn(draw: Callable[["Figure"], None], width: float, height: float, transparent: bool = False) -> str:
    """The SVG of what `draw` puts into a figure of `width` x `height` inches; words stay words in it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bridges", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=transparent, metadata=undated)
    return text.getvalue()


def finished(axes: "Axes") -> None:
    """A panel with a grid and a legend, without a frame."""
    axes.grid(alpha=0.2)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False)
