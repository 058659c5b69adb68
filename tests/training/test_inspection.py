"""What `bridges inspect` shows of a recipe's data."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bridges.config import Recipe
from bridges.recipe import recipe_or_data
from bridges.training.inspection import inspect


def chats(recipe: Recipe, folder: Path, answer: str) -> None:
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    line = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": answer},
        ]
    }
    (folder / "chats.jsonl").write_text("\n".join([json.dumps(line)] * 3))
    recipe.data.source = str(folder / "chats.jsonl")


def test_slots_targets_and_lengths_are_shown(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats(recipe, tmp_path, "A red cat.")
    inspect(recipe, samples=1, html=tmp_path / "inspect.html")
    told = capsys.readouterr().out
    assert "[picture: 16 slots]" in told
    assert "What is it?" in told.replace("\n", "")
    assert "A red cat." in told.replace("\n", "")
    assert "= 16 slots" in " ".join(told.split())


def test_data_without_a_target_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    chats(recipe, tmp_path, "A red cat.")
    recipe.language.template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    recipe.data.max_length = 20
    with pytest.raises(ValueError, match="not one token is a target"):
        inspect(recipe, html=tmp_path / "inspect.html")


def test_the_page_holds_pictures_and_colours_and_the_table_counts(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    names = ["a.png"] * 3 + ["gone.png", "a.png", "a.png"]
    said = ["A <b>cat</b>.", "Two.", "Two.", "Lost.", "long " * 300, "End."]
    chats = [
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": s}], "images": [n]}
        for n, s in zip(names, said, strict=True)
    ]
    (tmp_path / "a.json").write_text(json.dumps([*chats, *chats[:1]]))  # the last row is held out
    recipe.data.source, recipe.data.max_length = str(tmp_path / "a.json"), 100
    inspect(recipe, samples=2, html=tmp_path / "inspect.html")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "examples 6; looked at 6" in lines
    assert "cut at max_length 1" in lines
    assert "skipped, broken 1, 1 no such file" in lines
    assert "duplicates 1" in lines
    html = (tmp_path / "inspect.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 2
    assert '<span class="target">A &lt;b&gt;cat&lt;/b&gt;.' in html
    assert '<span class="slots">[picture: 16 slots]</span>' in html
    assert "gone.png" in html
    assert "http" not in html
    capsys.readouterr()


def test_data_alone_are_a_recipe(tmp_path: Path) -> None:
    assert recipe_or_data(str(tmp_path / "a.csv"), ["--data.max_length", "9"]).data.source == str(tmp_path / "a.csv")
    assert recipe_or_data("some/captions").data.max_length == 1024
    assert recipe_or_data("demo").data.source == "scenes"
    with pytest.raises(ValueError, match="no recipe"):
        recipe_or_data("dmo")
