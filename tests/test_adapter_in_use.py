"""A checkpoint with an adapter talks, is measured and is shown examples as the one into which it was folded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapting import LORA, disturb
from PIL import Image

from bridges.build import Assembled, build
from bridges.checkpoint import load, save_checkpoint
from bridges.cli import main
from bridges.config import Recipe
from bridges.data.conversation import Turn
from bridges.inference.session import Session
from bridges.inference.settings import Settings
from bridges.inference.swap import with_bridge
from bridges.merge import merge
from chat.commands import obey
from chat.state import Chat


@pytest.fixture
def both(recipe: Recipe, captions: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint with an adapter, and the merged one."""
    recipe.data.source = recipe.data.validation = str(captions)
    recipe.lora = LORA
    adapted = build(recipe)
    disturb(adapted.model.language)
    save_checkpoint(Path(recipe.output), adapted)
    merge(recipe.output, tmp_path / "merged")
    return Path(recipe.output), tmp_path / "merged"


def talk(assembled: Assembled, pictures: list[Image.Image]) -> list[str]:
    """Three answers, two of them in one conversation and the last in a fork of it."""
    session, said = Session(assembled), []
    for content in ([pictures[0], "What is it?"], ["And there?", pictures[1]]):
        session.append(Turn("user", content))
        said.append("".join(session.stream(8)))
    other = session.fork()
    other.append(Turn("user", ["Name it."]))
    return [*said, "".join(other.stream(8))]


def without(checkpoint: Path) -> Assembled:
    """The same model with its adapter as it was before it trained."""
    adapted = load(checkpoint)
    fresh = build(replace(adapted.recipe, lora=None))
    fresh.model.bridge.load_state_dict(adapted.model.bridge.state_dict())
    return fresh


def test_it_talks_as_the_merged_one(both: tuple[Path, Path], pictures: list[Image.Image]) -> None:
    adapted, merged = both
    said = talk(load(adapted), pictures)
    assert said == talk(load(merged), pictures)
    assert said != talk(without(adapted), pictures)


def test_it_generates_as_the_merged_one(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    picture = Path(load(both[0]).recipe.data.source) / "3.png"
    for options in ([], ["--answers=3"]):
        told = []
        for folder in both:
            asked = ["--image", str(picture), "--prompt", "Is it a cat?", "--max_new_tokens=8", *options]
            main(["generate", str(folder), *asked])
            told.append(capsys.readouterr().out)
        assert told[0].strip()
        assert told[0] == told[1], options


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["evaluate", "--size=8"], "evaluation.json"),
        pytest.param(
            ["fewshot", "--shots=2", "--queries=4", "--seeds=1", "--pool=8"], "fewshot.json", marks=pytest.mark.slow
        ),
    ],
    ids=["evaluate", "fewshot"],
)
def test_it_is_measured_as_the_merged_one(both: tuple[Path, Path], command: list[str], file: str) -> None:
    told = []
    for folder in both:
        main([command[0], str(folder), *command[1:]])
        told.append(figures(json.loads((folder / file).read_text())))
    assert len(told[0]) > 10
    assert told[0] == pytest.approx(told[1], abs=1e-4)


def figures(value: Any) -> list[float]:
    """All numbers of a JSON, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for inner in value for number in figures(inner)]
    return [value] if isinstance(value, (int, float)) else []


def test_a_bridge_is_not_changed_in_silence_where_one_of_both_has_an_adapter(
    both: tuple[Path, Path], built: Assembled, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    adapted, plain = both[0], tmp_path / "plain"
    save_checkpoint(plain, built)
    with pytest.raises(ValueError, match=rf"{adapted} has LoRA on its language model, .*: bridges chat {adapted}"):
        with_bridge(built, adapted)
    with pytest.raises(ValueError, match=rf"the checkpoint in use has LoRA .*: bridges chat {plain}"):
        with_bridge(load(adapted), plain)
    chat = Chat(Session(built), Settings(max_new_tokens=8))
    chat.session.append(Turn("user", [pictures[0], "What is it?"]))
    theirs = Session(load(adapted))
    theirs.append(chat.session.turns[0])
    told = str(obey(chat, f"/compare {adapted}"))  # loads the other one whole
    assert "".join(theirs.stream(8)).split()[0] in told
