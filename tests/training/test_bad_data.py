"""Data from which nothing, or not enough, can be learnt are refused before or while a run pays for them."""

import re
from pathlib import Path

import pytest
from PIL import Image

from bridges.config import Recipe
from bridges.training.loop import train


def table(recipe: Recipe, folder: Path, broken: int) -> None:
    """A hundred training pictures, of which some are broken; two more are held out."""
    lines = ["path,caption"]
    for number in range(102):
        path = folder / f"{number}.png"
        if number in range(5, 5 + 15 * broken, 15):
            path.write_bytes(b"no picture")
        else:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        lines.append(f"{path.name},caption {number}")
    (folder / "a.csv").write_text("\n".join(lines[:101]))
    (folder / "val.csv").write_text("\n".join([lines[0], *lines[101:]]))
    recipe.data.source, recipe.data.validation = str(folder / "a.csv"), str(folder / "val.csv")
    recipe.train.steps, recipe.train.batch = 10, 10


def test_six_of_a_hundred_broken_pictures_stop_a_run(recipe: Recipe, tmp_path: Path) -> None:
    table(recipe, tmp_path, broken=6)
    with pytest.raises(ValueError, match=r"too many pictures are broken: 6 of \d+ rows tried were skipped"):
        train(recipe)


def test_four_of_a_hundred_are_listed(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(recipe, tmp_path, broken=4)
    train(recipe)
    told = capsys.readouterr().out
    assert "4 of 100 rows tried were skipped" in told
    assert re.findall(r"row (\d+): cannot open .*not a picture", told) == ["5", "20", "35", "50"]


def test_a_template_that_leaves_the_answer_out_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    table(recipe, tmp_path, broken=0)
    recipe.language.template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out what the assistant says"):
        train(recipe)
    recipe.language.template = "chat"
    recipe.data.max_length = 20  # the slots and the first words of the question
    with pytest.raises(ValueError, match="not one token of the first texts is a target"):
        train(recipe)
