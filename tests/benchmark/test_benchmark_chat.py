"""The benchmark of the chat: equal answers first, and each picture encoded once."""

from pathlib import Path

import pytest
from rich.console import Console

from bridges.benchmark.chat import chat
from bridges.cli import main


def test_turn_four_is_timed_and_its_pictures_are_encoded_once(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = chat(str(tiny_checkpoint), rounds=3, console=Console(width=200))
    assert figures["encoded"] == 2
    assert figures["kept"] > 0
    told = capsys.readouterr().out
    assert "2 encodings of 2 pictures" in told
    assert "afresh" in told
    assert "tokens that every message begins with were read before" in told


def test_what_cannot_be_measured_is_one_line(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [(["--rounds", "2"], "at least 3"), (["--image", "x.png"], "two pictures, not 1")]:
        with pytest.raises(SystemExit) as stopped:
            main(["benchmark", "chat", str(tiny_checkpoint), *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
