"""What the tests of the chat share: a model that talks, pictures in files, an environment for a terminal.

No conftest.py: a second one would take the name from the first, and `from conftest import` fails elsewhere.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_language
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridges.build import Assembled, build
from bridges.checkpoint import load, save_checkpoint
from bridges.data.conversation import Turn
from bridges.data.pictures import open_picture
from bridges.inference.session import Session
from bridges.inference.settings import Settings
from bridges.recipe import recipe_from
from chat.state import Chat


@pytest.fixture
def chat(built: Assembled) -> Chat:
    """With short answers."""
    return Chat(Session(built), Settings(max_new_tokens=4))


@pytest.fixture(scope="session")
def checkpoint(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends an answer by itself and says nothing but plain ASCII."""
    folder = tmp_path_factory.mktemp("chat")
    language = tiny_language("llama", folder / "llm")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(language), AutoTokenizer.from_pretrained(language)
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    mute = [not (w.isascii() and w.isprintable()) or i in tokenizer.all_special_ids for i, w in enumerate(words)]
    with torch.no_grad():
        model.lm_head.weight[torch.tensor(mute)] = 0
    model.config.max_position_embeddings = 2048
    model.save_pretrained(language)
    recipe = recipe_from(
        {"output": str(folder / "run"), "vision": {"name": str(tiny_clip)}, "language": {"name": str(language)}}
    )
    save_checkpoint(folder / "run", build(recipe))
    return folder / "run"


@pytest.fixture(scope="session")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "red cat.png", folder / "blue.png"]
    for path in paths:
        Image.effect_noise((64, 48), 90).convert("RGB").save(path)
    return paths


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a program that the test starts."""
    terminal = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
    return {**os.environ, **terminal, "OMP_NUM_THREADS": "1"}  # for tensors this small


@pytest.fixture
def said_by(checkpoint: Path) -> Callable[[list[list[str | Path]], int], list[str]]:
    """The answers that a session gives; paths are pictures."""

    def answers(messages: list[list[str | Path]], max_new_tokens: int) -> list[str]:
        session = Session(load(checkpoint))
        said = []
        for message in messages:
            session.append(Turn("user", [open_picture(part) if isinstance(part, Path) else part for part in message]))
            said.append("".join(session.stream(max_new_tokens)))
        return said

    return answers
