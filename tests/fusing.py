"""What the tests of blocks inside the language model share: towers, open gates, texts with pictures here and there.

No conftest.py: a second one would take the name from the first, and `from conftest import` fails elsewhere.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SIZES, chatml_tokenizer, randomise, tiny_language
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MptConfig

from bridges.data.batch import Batch, Row, collate, pack
from bridges.data.conversation import Turn
from bridges.data.template import IMAGE_TOKEN_ID, Encoded, Template
from bridges.flamingo import Flamingo
from bridges.model import BridgedModel
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

# Those of FAMILIES, and these; all but one of them with ALiBi, which knows no positions.
OTHERS: dict[str, Callable[..., Any]] = {
    "mpt": lambda **k: MptConfig(d_model=32, n_layers=2, n_heads=4, **k),
    "bloom": lambda **k: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **k),
    "falcon": lambda **k: FalconConfig(**SIZES, **k),
    "falcon_alibi": lambda **k: FalconConfig(**SIZES, alibi=True, **k),
}
SMALL: dict[str, Any] = dict(latents=3, depth=1, resampler_heads=2, resampler_head_dim=8, heads=2, head_dim=8)
# Nothing but the words, so that a picture can be the very first thing.
BARE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
CLOSE = {torch.float32: 1e-5, torch.float64: 3e-7}  # rotary angles are float32 in either
ways_of_seeing = pytest.mark.parametrize("sees", ["last", "all"])


def saved(config: Any, folder: Path) -> Path:
    """A language model of random weights, in a folder."""
    tokenizer = chatml_tokenizer()
    model: Any = randomise(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[*FAMILIES, *OTHERS])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageTower:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in OTHERS:
        saved(OTHERS[request.param](vocab_size=len(chatml_tokenizer())), folder)
    else:
        tiny_language(request.param, folder)
    # ALiBi is not for float64: transformers adds it in float32, to the lowest number there is
    return LanguageTower(str(folder), dtype=torch.float32 if request.param in OTHERS else torch.float64)


@pytest.fixture(scope="module")
def vision(tiny_clip: Path) -> VisionTower:
    return VisionTower(str(tiny_clip), layer=-2, dtype=torch.float64)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> LanguageTower:
    return LanguageTower(str(tiny_llama), dtype=torch.float64)


@pytest.fixture
def in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows side by side with padding, where they would be read end to end."""
    monkeypatch.setattr("bridges.model.LONGEST_LINE", 0)


def fused(vision: VisionTower, language: LanguageTower, **options: Any) -> tuple[BridgedModel, Template]:
    """Both towers with open gates between them, and a template of the bare words."""
    bridge = Flamingo(vision.dim, vision.num_patches, language.dim, language.num_layers, **SMALL, **options)
    opened(bridge).to(language.dtype)
    return BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID), Template(language.tokenizer, 0, BARE)


def opened(bridge: Flamingo) -> Flamingo:
    randomise(bridge)
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.6 if "attention" in name else -0.4)
    return bridge


@pytest.fixture(scope="module")
def conversations(pictures: list[Image.Image]) -> list[list[Turn]]:
    """A picture in front of the words, amid them, three here and there, two in a row, and none."""
    a, b, c = pictures
    return [
        [Turn("user", [a, "Is it a cat?"]), Turn("assistant", ["No."])],
        [Turn("user", ["Is there a cat in ", b, "? Name it."]), Turn("assistant", ["A small bird, I think."])],
        [
            Turn("user", ["Is ", a, " larger than ", c, "?"]),
            Turn("assistant", ["Yes."]),
            Turn("user", [b, "And this one? Look at it."]),
            Turn("assistant", ["No."]),
        ],
        [Turn("user", ["Look: ", c, b, "How many birds?"]), Turn("assistant", ["Two."])],
        [Turn("user", ["How many birds are there?"]), Turn("assistant", ["Four."])],
    ]


def batch_of(model: BridgedModel, rows: Sequence[Row], left: bool = False, share: bool = True) -> Batch:
    return collate(rows, model.vision.preprocess, left=left, share=share)


def logits_of(model: BridgedModel, batch: Batch) -> Tensor:
    """Everywhere but in padding, row by row."""
    at = (batch.segments >= 0).nonzero(as_tuple=True)
    return model(batch.input_ids, batch.segments, batch.positions, at, batch.pixel_values, looks=batch.looks)


def alone(model: BridgedModel, texts: Sequence[Encoded]) -> list[Tensor]:
    """The logits of each text in a batch of its own."""
    return [logits_of(model, batch_of(model, [pack([text])])) for text in texts]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std(0).max() > 0.1, "logits that are all alike would be close to anything"
    close = CLOSE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=close, rtol=close)


def side_by_side(texts: Sequence[Encoded]) -> Row:
    """Texts in one row that share nothing."""
    row = Row([], [], [], [], [], [], [])
    for number, text in enumerate(texts, start=1):
        row.looks.extend(look + len(row.images) * (look > 0) for look in text.looks)
        row.ids.extend(text.ids)
        row.labels.extend(text.labels)
        row.segments.extend([number] * len(text.ids))
        row.positions.extend(range(len(text.ids)))
        row.images.extend(text.images)
    return row


def questions(template: Template, *asked: Sequence[str | Image.Image]) -> list[Encoded]:
    return [template.encode([Turn("user", list(words)), Turn("assistant", ["No, a dog."])]) for words in asked]
