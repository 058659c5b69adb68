"""Beginning at the words that are said about pictures."""

import io
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import stop_at
from conftest import captioned
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from bridges.config import Recipe
from bridges.data.conversation import Conversation, Example, Turn, ask, images_of
from bridges.training.loop import train
from bridges.training.regression import RIDGE, SIZE, fit, start_at_words
from bridges.training.stage import Stage, open_stage

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "bird": (30, 30, 200)}


def coloured(count: int, right: bool = True) -> list[Example]:
    """Pictures of one colour or two, and what they are said to be, which their colours decide only if `right`."""
    draw, other, made = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1), []
    for _ in range(count):
        there = [name for name in COLOURS if torch.rand(1, generator=draw) < 0.5] or ["cat"]
        said = there if right else [name for name in COLOURS if torch.rand(1, generator=other) < 0.5]
        noise = int(torch.randint(0, 20, (1,), generator=draw))
        mixed = [sum(COLOURS[name][c] for name in there) // len(there) + noise for c in range(3)]
        picture = Image.new("RGB", (32, 32), tuple(mixed))
        made.append(Example([ask("What is it?", f"A {' and a '.join(said) or 'tree'}.", picture)]))
    return made


def begun(recipe: Recipe, data: list[Example]) -> tuple[Stage, str]:
    told = io.StringIO()
    stage = open_stage(recipe)
    start_at_words(stage, data, Console(file=told, width=1000))
    return stage, told.getvalue()


def told_of(model: Any, pictures: list[Image.Image]) -> torch.Tensor:
    """Their slots, or what blocks read of them."""
    visual = model.bridge(model.vision(model.vision.preprocess(pictures)))
    return visual.slots if visual.memory is None else visual.memory


def assert_as_it_was(stage: Stage, recipe: Recipe) -> None:
    """Its bridge has the weights of a fresh one."""
    for name, tensor in open_stage(recipe).built.model.bridge.state_dict().items():
        assert torch.equal(tensor, stage.built.model.bridge.state_dict()[name])


@pytest.fixture
def started(recipe: Recipe) -> Recipe:
    return replace(recipe, train=replace(recipe.train, regression=200))


def test_the_layer_is_that_of_ridge_regression() -> None:
    """Rows of the square root of the penalty below the data, and a plain least squares solver, give the same."""
    seen, slots = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    wanted = seen @ torch.randn(6, 4, dtype=torch.float64) + 0.1 * torch.randn(50, 4, dtype=torch.float64)
    last = nn.Linear(6, 4, dtype=torch.float64)
    explained = fit(last, seen, wanted, slots, 7.0)
    kept = torch.arange(50) % 10 != 0
    known, said = (t[kept] - t[kept].mean(0) for t in (seen, wanted))
    penalty = (RIDGE * known.square().sum() / 6).sqrt() * torch.eye(6, dtype=torch.float64)
    oracle = torch.linalg.lstsq(torch.cat([known, penalty]), torch.cat([said, torch.zeros(6, 4)])).solution
    ratio = last.weight.T / oracle
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    torch.testing.assert_close(last(seen[kept].mean(0)), torch.zeros(4, dtype=torch.float64))
    assert last(slots).square().mean().sqrt().item() == pytest.approx(7.0)
    assert 0.8 < explained < 1


@pytest.mark.parametrize(
    "bridge",
    [
        {"name": "projector"},
        {"name": "projector", "depth": 2},
        {"name": "projector", "merge": "average", "factor": 2, "norm": True},
        {"name": "flamingo", "depth": 0, "words": True},
        {"name": "flamingo", "depth": 1, "latents": 4, "words": True},
    ],
    ids=lambda bridge: " ".join(map(str, bridge.values())),
)
def test_pictures_mean_the_words_and_are_of_the_size_that_is_heard(started: Recipe, bridge: dict[str, Any]) -> None:
    started.bridge = bridge
    stage, told = begun(started, coloured(200))
    assert "the bridge starts there" in told
    built: Any = stage.built
    model, tokenizer = built.model, built.template.tokenizer
    seen = partial(told_of, model)
    slots = seen([Image.new("RGB", (32, 32), COLOURS["dog"])])
    ids = [tokenizer(f" {name}")["input_ids"][-1:] for name in COLOURS]
    each = model.language.embed(torch.tensor(ids))[:, 0] @ slots.mean((0, 1))
    assert each.argmax() == list(COLOURS).index("dog")
    every = [example.conversations[0].turns[0].content[0] for example in coloured(200)]
    size = seen(every).square().mean().sqrt()
    assert size.item() == pytest.approx(SIZE * model.language.embedding_rms(), rel=0.5)


def test_what_pictures_do_not_tell_leaves_the_bridge_as_it_was(started: Recipe) -> None:
    stage, told = begun(started, coloured(200, right=False))
    assert "at random" in told
    assert_as_it_was(stage, started)


def test_from_equal_pictures_nothing_is_learnt(started: Recipe) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    said = [str(example.conversations[0].turns[1].content[0]) for example in coloured(60)]
    stage, told = begun(started, [Example([ask("What is it?", text, picture)]) for text in said])
    assert "at random" in told
    assert_as_it_was(stage, started)


@pytest.mark.parametrize(
    "texts", [["A cat."], [""], ["A cat A dog", "A dog A cat"]], ids=["equal", "empty", "reordered"]
)
def test_from_equal_texts_nothing_is_learnt_and_one_line_says_so(started: Recipe, texts: list[str]) -> None:
    pictures = [images_of(example.conversations[0].turns)[0] for example in coloured(60)]
    said = zip(pictures, itertools.cycle(texts), strict=False)
    stage, told = begun(started, [Example([ask("What is it?", text, picture)]) for picture, text in said])
    assert told == (
        "regression: all 60 texts have the same words, and from equal texts there is nothing to learn; the bridge "
        "starts at random\n"
    )
    assert_as_it_was(stage, started)


def test_pictures_are_those_of_examples_that_have_one(started: Recipe) -> None:
    picture = Image.new("RGB", (32, 32))
    bare = Example([Conversation([Turn("user", ["hello"]), Turn("assistant", ["Yes."])])])
    two = Example([Conversation([Turn("user", [picture, picture.copy()]), Turn("assistant", ["Two."])])])
    assert "on 60 pictures" in begun(started, [*coloured(60), bare, two])[1]
    assert "19 examples with one picture are too few" in begun(started, [*coloured(19), bare, two])[1]


@pytest.fixture
def run(started: Recipe, tmp_path: Path) -> Recipe:
    """Forty pictures in a folder, and four steps."""
    talks = [example.conversations[0].turns for example in coloured(45)]
    texts, pictures = [str(said.content[0]) for _, said in talks], [images_of(turns)[0] for turns in talks]
    started.data.source = str(captioned(tmp_path / "pictures", texts, pictures))
    started.train = replace(started.train, steps=4, batch=4, save_every=2, log_every=1, regression=40)
    return started


def trained(run: Recipe, name: str, resume: bool = False, **settings: Any) -> dict[str, torch.Tensor]:
    folder = Path(run.output).parent / name
    changed = replace(run, output=str(folder), train=replace(run.train, **settings))
    return load_file(train(changed, resume) / "bridge.safetensors")


def test_a_run_begins_there_and_is_resumed_from_where_it_was(run: Recipe) -> None:
    whole = trained(run, "whole")
    assert any(not torch.equal(whole[name], tensor) for name, tensor in trained(run, "none", regression=0).items())
    stop_at(2, str(Path(run.output).parent / "part"))
    with pytest.raises(KeyboardInterrupt):
        trained(run, "part")
    for name, tensor in trained(run, "part", resume=True).items():
        assert torch.equal(tensor, whole[name])


def test_kept_features_begin_the_same(run: Recipe) -> None:
    plain = trained(run, "plain")
    run.vision.cache = "fp32"
    for name, tensor in trained(run, "kept").items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-3, rtol=1e-3)


def test_where_it_has_no_use_it_is_refused(run: Recipe) -> None:
    run.bridge = {"name": "resampler", "latents": 3, "depth": 1, "heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match="resampler has no linear layer"):
        trained(run, "refused")
    run.bridge = {"name": "projector"}
    trained(run, "before", regression=0)
    run.start = str(Path(run.output).parent / "before")
    with pytest.raises(ValueError, match="would undo what start"):
        trained(run, "after")
