"""How cost grows: what is counted is what is multiplied, and every size has its row and its place in the plot."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from bridges.benchmark.growth import AXES, growth, made
from bridges.benchmark.growth_report import Point, apart, sentence
from bridges.cli import main

PROJECTOR: dict[str, Any] = {"name": "projector", "depth": 2, "merge": "average", "factor": 2}
FLAMINGO: dict[str, Any] = dict(name="flamingo", latents=3, depth=1, resampler_heads=2, heads=2, head_dim=8, inner=24)


@pytest.fixture
def given(tiny_clip: Path, tiny_llama: Path, tmp_path: Path) -> Any:
    """A file of a recipe with this bridge."""

    def write(bridge: dict[str, Any]) -> str:
        towers = {"vision": {"name": str(tiny_clip)}, "language": {"name": str(tiny_llama)}}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / "run"), **towers, "bridge": bridge}))
        return str(path)

    return write


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "slots"])
def test_nothing_but_what_is_named_grows(axis: str) -> None:
    def sizes(size: int) -> dict[str, int]:
        texts = [text.turns for text in made(axis, size, Random(0)).conversations]
        shown = [part for part in texts[0][0].content if not isinstance(part, str)]
        last = texts[0][0].content[-1]
        assert isinstance(last, str)
        found = {"texts of a picture": len(texts), "words of a question": len(last.split())}
        return found | {"pictures of a document": len(shown), "shots": len(texts[0]) // 2 - 1}

    small, large = AXES[axis][1], AXES[axis][-1]
    assert sizes(small)[axis] == small
    assert sizes(large) == {**sizes(small), axis: large}


@pytest.mark.parametrize(
    "bridge", [PROJECTOR, pytest.param(FLAMINGO, marks=pytest.mark.slow)], ids=lambda bridge: bridge["name"]
)
def test_more_of_anything_is_more_multiplications(given: Any, tmp_path: Path, bridge: dict[str, Any]) -> None:
    axes = {"slots": (2, 6), "texts of a picture": (1, 3), "pictures of a document": (1, 2), "shots": (0, 2, 50)}
    found = growth(given(bridge), plot=str(tmp_path / "plot.svg"), axes=axes)
    assert {axis: [point.size for point in points] for axis, points in found.items()} == {
        axis: [size for size in sizes if size < 50] for axis, sizes in axes.items()
    }, "what does not fit into the context is left out"
    for axis, points in found.items():
        assert all(a.operations < b.operations for a, b in pairwise(points)), axis
        assert all(0 < p.least <= p.seconds <= p.most and p.products > 0 for p in points)
    few, many = found["slots"]
    assert many.positions - few.positions == (0 if bridge is FLAMINGO else 2 * 4)


@pytest.mark.slow
def test_the_command_prints_tables_and_plots_them(
    given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plot, figures = tmp_path / "growth.svg", tmp_path / "growth.json"
    main(["benchmark", "growth", given(PROJECTOR), "--batch", "1", "--plot", str(plot), "--json", str(figures)])
    told, drawn, kept = capsys.readouterr().out, plot.read_text(), json.loads(figures.read_text())
    assert told.count("oretold from") == len(AXES)
    for axis in AXES:
        assert axis in told
        assert axis in drawn
        assert kept[axis][0]["size"] == AXES[axis][0]


def test_what_cannot_grow_is_one_line(given: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "growth", given(PROJECTOR), "--kind", "hair"])
    assert stopped.value.code == 2
    assert "what can grow are slots, texts" in capsys.readouterr().err


def test_a_sentence_says_where_seconds_and_multiplications_part() -> None:
    def point(size: int, seconds: float, products: float) -> Point:
        return Point(size, size, seconds, seconds, seconds, size * 1e9, products)

    even = [point(1, 1.0, 0.5), point(2, 2.0, 1.0), point(4, 4.0, 2.0)]
    assert apart(even) == [1.0, 1.0, 1.0]
    assert "all others are within 0%" in sentence("slots", even)
    slow = [point(1, 2.0, 0.5), *even[1:]]
    told = sentence("slots", slow)
    assert "apart at 1 (slots): 2.00 times what is foretold from 2" in told
    assert "all else is 75% of the step there, 50% here" in told
