"""What `bridges inspect` shows of a recipe's data."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bridges.config import Recipe
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
    inspect(recipe, samples=1)
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
        inspect(recipe)
