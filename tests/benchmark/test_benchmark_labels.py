"""The benchmarks of labels and of few-shot: every way says the same, and what is not reused is really done again."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from bridges.benchmark.fewshot import fewshot
from bridges.benchmark.naive import from_cache, row_by_row
from bridges.benchmark.ours import open_gates
from bridges.benchmark.rounds import differ
from bridges.benchmark.score import score
from bridges.build import Assembled, build
from bridges.checkpoint import save_checkpoint
from bridges.cli import main
from bridges.config import Data, Recipe
from bridges.inference.fewshot import FewShot
from bridges.towers.vision import VisionTower

GATED: dict[str, Any] = dict(name="flamingo", latents=5, depth=1, heads=2, head_dim=8, inner=24)
LABELS = [" cat", " cat above the house", " dog", " small bird", " small birds"]


@pytest.fixture(params=[{"name": "projector"}, GATED, {**GATED, "sees": "all"}], ids=["projector", "flamingo", "all"])
def model(request: pytest.FixtureRequest, recipe: Recipe) -> Assembled:
    recipe.bridge = request.param
    assembled = build(recipe)
    open_gates(assembled.model.bridge, 0.8)
    return assembled


@pytest.fixture
def checkpoint(assembled: Assembled, tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    with (folder / "rows.csv").open("w", newline="") as file:
        told = csv.writer(file)
        told.writerow(["image", "caption"])
        for place in range(60):
            shade = tuple(100 + 2 * place if channel == place % 3 else 20 for channel in range(3))
            Image.new("RGB", (32, 32), shade).save(folder / f"{place}.png")
            told.writerow([f"{place}.png", ("cat", "dog", "house")[place % 3]])
    assembled.recipe.data = Data(source=str(folder / "rows.csv"))
    save_checkpoint(tmp_path / "model", assembled)
    return tmp_path / "model"


def test_labels_after_labels_from_a_cache_have_the_scores_of_the_tree(
    model: Assembled, pictures: list[Image.Image]
) -> None:
    reader = FewShot(model)
    queries = [[pictures[0], "This is a"], [pictures[1], "There is", pictures[2], "This is a"], ["Name it. This is a"]]
    expected = reader.score(queries, LABELS).total
    grown = [reader.plain.with_labels(query, LABELS) for query in queries]
    texts, tree = [text for text, _ in grown], grown[0][1]
    for whole in (True, False):
        found = from_cache(model.model, reader.features, texts, tree, whole)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    alone = torch.cat([row_by_row(model.model, reader.features, text, tree) for text in texts])
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)


def test_forty_labels_are_timed_three_ways(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / "score.json"
    main(["benchmark", "score", str(checkpoint), "--context", "60", "--json", str(file)])
    found, told = json.loads(file.read_text()), capsys.readouterr().out
    assert all(way in told for way in ("tree", "cached", "anew"))
    assert found["tree"]["times"] == 1
    assert 60 <= found["context"] < found["read"]["tree"] < found["read"]["cached"] < found["read"]["anew"]
    with pytest.raises(ValueError, match="at least 3"):
        score(str(checkpoint), rounds=2)


@pytest.mark.parametrize("task", ["caption", "classify"])
def test_nothing_reused_encodes_and_reads_all_again_and_answers_alike(
    checkpoint: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    look = VisionTower.forward
    monkeypatch.setattr(VisionTower, "forward", lambda self, x: encoded.append(len(x)) or look(self, x))
    found = fewshot(str(checkpoint), 1, task, shots=4, queries=3, pool=20, console=Console(quiet=True))
    ways = 2 if task == "caption" else 3
    first = ways * (4 + 1)
    assert sum(encoded) == first + (4 + 3) + (ways - 1) * 3 * (4 + 1)
    assert found["kept"]["times"] == 1
    assert set(found) > {"kept", "anew"}


def test_what_rounding_may_tell_apart_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    differ("the scores differ", torch.bfloat16, Console())
    assert "the scores differ (bfloat16 rounds; BRIDGES_DTYPE=float32 shows" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^the scores differ$"):
        differ("the scores differ", torch.float32, Console())


def test_answers_that_differ_are_not_timed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridges.benchmark.fewshot.anew", lambda *_: {"": ["never"] * 3})
    with pytest.raises(ValueError, match="the answers differ: anew"):
        fewshot(str(checkpoint), 1, queries=3, shots=2, pool=20, console=Console(quiet=True))
