"""The command line: help is quick, and what a user can mend is one line with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bridges.cli import main, split_overrides
from bridges.recipe import find_recipe


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_names_every_verb_without_torch() -> None:
    code = "import sys; from bridges.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(verb in told for verb in ("demo", "train", "evaluate", "generate", "chat", "retrieve", "inspect"))
    assert told.strip().endswith("False")


@pytest.mark.parametrize("verb", ["demo", "train", "evaluate", "generate", "chat", "retrieve", "inspect"])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert not stopped.value.code
    assert verb in capsys.readouterr().out


def test_overrides_are_told_from_the_verbs_own_options() -> None:
    own, overrides = split_overrides(
        ["train", "demo", "--train.lr", "1e-3", "--resume", "--output=x", "--bridge.depth=2"]
    )
    assert own == ["train", "demo", "--resume"]
    assert overrides == ["--train.lr", "1e-3", "--output=x", "--bridge.depth=2"]


def test_a_recipe_of_the_library_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_recipe("demo")).is_file()
    (tmp_path / "demo.yaml").write_text("output: mine")
    assert find_recipe("demo.yaml") == Path("demo.yaml")


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("output: x\ntrian: {steps: 3}")
    assert "train" in complaint(capsys, "train", recipe)
    recipe.write_text("output: x")
    assert "--train.steps" in complaint(capsys, "train", recipe, "--train.stepz", "3")
    assert "no recipe" in complaint(capsys, "train", tmp_path / "none.yaml")
    assert "invalid choice" in complaint(capsys, "trian")
    assert "no checkpoint" in complaint(capsys, "evaluate", tmp_path)
    assert "no checkpoint" in complaint(capsys, "chat", tmp_path / "nothing")


def test_bad_pictures_are_one_line(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    assert "text.png" in complaint(capsys, "generate", tiny_checkpoint, "--image", text, "--prompt", "hi")
    assert "cat.png" in complaint(
        capsys, "generate", tiny_checkpoint, "--image", tmp_path / "cta.png", "--prompt", "hi"
    )


def test_an_output_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str], recipe, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    (tmp_path / "taken").write_text("")
    path.write_text(
        f"output: {tmp_path / 'taken'}\nvision: {{name: {recipe.vision.name}}}\nlanguage: {{name: {recipe.language.name}}}"
    )
    assert "is a file" in complaint(capsys, "train", path)


def test_a_prompt_longer_than_the_context_is_refused(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path) -> None:
    assert "positions" in complaint(capsys, "generate", tiny_checkpoint, "--prompt", "cat " * 2000)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10)])
def test_odd_pictures_are_answered(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "odd.png")
    main(
        [
            "generate",
            str(tiny_checkpoint),
            "--image",
            str(tmp_path / "odd.png"),
            "--prompt",
            "What is it?",
            "--max_new_tokens",
            "4",
        ]
    )
    assert capsys.readouterr().err == ""
