"""Features on disk: what is read is what the encoder saw, and nothing else ever."""

import json
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_vision
from PIL import Image

from bridges import store
from bridges.build import Assembled, build
from bridges.checkpoint import plain
from bridges.cli import main
from bridges.config import Recipe
from bridges.evaluation.run import evaluate
from bridges.store import Form, Store, error_of, key, open_store, packed, unpacked
from bridges.training.loop import train

TOLERANCES: dict[Form, float] = {"fp32": 0.0, "fp16": 2**-11, "int8": 1 / 254}
"""Of a feature, relative to the largest of its patch."""


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def kept(assembled: Assembled) -> Callable[..., Store]:
    def make(form: Form = "fp32", gigabytes: float = 1.0, model: Assembled = assembled) -> Store:
        model.recipe.vision = replace(model.recipe.vision, cache=form, cache_gb=gigabytes)
        found = open_store(model)
        assert found is not None
        return found

    return make


@pytest.fixture
def run(recipe: Recipe, captions: Path) -> Recipe:
    """Twelve pictures with captions; six steps, so that every picture comes twice."""
    recipe.data.source = str(captions)
    recipe.train = replace(recipe.train, steps=6, batch=4, lr=1e-2, warmup=2, save_every=3, log_every=1, seed=3)
    return recipe


def seen(assembled: Assembled, pictures: list[Image.Image]) -> torch.Tensor:
    return assembled.model.vision(assembled.model.vision.preprocess(pictures))


def losses(folder: Path | str) -> list[float]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("form", TOLERANCES)
def test_what_is_read_is_what_the_encoder_saw(
    assembled: Assembled, kept: Callable[..., Store], pictures: list[Image.Image], form: Form
) -> None:
    one = kept(form)
    first = one([*pictures, pictures[0]])
    one.flush()
    other = kept(form)
    assert torch.equal(other([*pictures, pictures[0]]), first), "read and just seen are the same to the bit"
    assert (one.encoded, other.encoded, len(other)) == (3, 0, 3)
    expected = seen(assembled, pictures)
    far = ((first[:3] - expected).abs() / expected.abs().amax(-1, keepdim=True)).max()
    assert far <= TOLERANCES[form] * 1.001
    assert form == "fp32" or far > TOLERANCES[form] / 100, "a format that loses nothing would not be this one"
    assert one([]).shape == (0, *expected.shape[1:])
    files = sum(path.stat().st_size for path in other.shelf.iterdir())
    assert 3 * other.each < files < 3 * other.each + 1000


def test_stated_errors_are_those_of_each_form() -> None:
    features = torch.randn(4, 9, 64, generator=torch.Generator().manual_seed(0))
    assert error_of(features, "fp32") == 0
    assert 1e-5 < error_of(features, "fp16") < 2**-11
    assert 1e-3 < error_of(features, "int8") < 1e-2
    assert not unpacked(packed(torch.zeros(1, 2, 3), "int8")).any()
    with pytest.raises(ValueError, match=r"features of 7e\+04 do not fit fp16; choose vision.cache: int8"):
        packed(torch.full((1, 1, 1), 7e4), "fp16")


@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2), ("int8", 5e-2)])
def test_a_run_with_kept_features_has_the_losses_of_one_without(
    run: Recipe, tmp_path: Path, form: Form, tolerance: float
) -> None:
    without = losses(train(replace(run, output=str(tmp_path / "without"))))
    vision = replace(run.vision, cache=form)
    for name in ("filling", "filled"):
        found = losses(train(replace(run, vision=vision, output=str(tmp_path / name))))
        assert found == pytest.approx(without, abs=tolerance), name
        assert len(set(found)) == len(found)


def test_a_second_run_encodes_nothing_and_a_stopped_one_goes_on_exactly(
    run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.vision.cache = "fp16"
    whole = train(replace(run, output=str(tmp_path / "whole")))
    assert any((tmp_path / "cache" / "features").rglob("*.safetensors")), "the first run kept nothing on its way"
    looked: list[int] = []
    monkeypatch.setattr(Store, "look", lambda _, pictures: looked.append(len(pictures)))
    half = replace(run, output=str(tmp_path / "half"))
    monkeypatch.setattr("bridges.training.loop.save_run", stop_after(3))
    with pytest.raises(KeyboardInterrupt):
        train(half)
    monkeypatch.undo()
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    train(half, resume=True)
    assert losses(half.output) == losses(whole)
    assert looked == []


def stop_after(step: int) -> Any:
    from bridges.training.state import save_run

    def save(engine: Any, built: Any, sizes: Any, done: int) -> None:
        save_run(engine, built, sizes, done)
        if done == step:
            raise KeyboardInterrupt

    return save


def test_nothing_kept_of_another_picture_tower_or_preprocessing_is_ever_read(
    recipe: Recipe, assembled: Assembled, kept: Callable[..., Store], pictures: list[Image.Image], tmp_path: Path
) -> None:
    one = kept()
    one(pictures)
    one.flush()
    changed = pictures[0].copy()
    changed.putpixel((3, 3), (0, 1, 2))
    assert torch.equal(one([changed]), seen(assembled, [changed]))
    assert one.encoded == 4
    assert key(pictures[0]) == key(pictures[0].copy()) != key(changed)
    assert key(Image.new("RGB", (2, 8))) != key(Image.new("RGB", (8, 2)))
    with torch.no_grad():
        next(assembled.model.vision.encoder.parameters()).flatten()[1] += 0.1  # where no fingerprint samples
    others = [kept()]
    for change in ({"name": str(tiny_vision(tmp_path / "other", seed=1))}, {"image_mode": "crop"}, {"layer": -1}):
        vision = replace(recipe.vision, **change)
        others.append(kept(model=build(replace(recipe, vision=vision))))
    assert [len(other) for other in others] == [0] * 4
    assert len({other.shelf for other in [one, *others]}) == 5


def test_pooling_comes_before_keeping_and_changes_nothing(
    recipe: Recipe, kept: Callable[..., Store], pictures: list[Image.Image]
) -> None:
    recipe.bridge = {"name": "projector", "merge": "average", "factor": 2}
    pooling = build(recipe)
    found, model = kept(model=pooling), pooling.model
    features = found(pictures)
    assert features.shape[1] == 4 < model.vision.num_patches
    assert torch.equal(model.see(features=features).slots, model.see(features=seen(pooling, pictures)).slots)
    assert found.shelf != kept(model=build(replace(recipe, bridge={"name": "projector"}))).shelf


def test_a_file_that_was_cut_short_is_told_and_filled_again(
    kept: Callable[..., Store], pictures: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    one = kept()
    expected = one(pictures)
    one.flush()
    (path,) = one.shelf.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        other = kept()
    assert f"{path} is broken" in caplog.text
    assert torch.equal(other(pictures), expected)
    assert other.encoded == 3
    other.flush()
    third = kept()
    assert len(third) == 3
    (path,) = one.shelf.iterdir()
    path.unlink()  # after it was found, and before it is read
    assert torch.equal(third(pictures), expected)
    assert third.encoded == 3


def test_the_budget_is_kept_and_told_once(
    kept: Callable[..., Store], pictures: list[Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    one = kept()
    small = kept(gigabytes=2.5 * one.each / 1e9)
    with caplog.at_level(logging.WARNING):
        small(pictures[:2])
        for _ in range(2):
            small(pictures)
    small.flush()
    assert (len(kept()), small.encoded) == (2, 2 + 1 + 1)
    assert caplog.text.count("the budget of features is spent") == 1


def fill(recipe: Recipe, pictures: list[Image.Image], order: list[int], ready: Any, told: Any) -> None:
    torch.set_num_threads(1)
    found = open_store(build(recipe))
    assert found is not None
    ready.wait()
    for place in order:
        found([pictures[place]])
        found.flush()
    told.put(found([pictures[i] for i in range(len(pictures))]).numpy())


def test_two_processes_fill_one_store_and_read_the_same(run: Recipe, tmp_path: Path) -> None:
    run.vision.cache = "fp16"
    noise = np.random.default_rng(1)
    pictures = [Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(8)]
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(2), context.Queue()
    orders = [list(range(8)), list(range(7, -1, -1))]
    workers = [context.Process(target=fill, args=(run, pictures, order, ready, told)) for order in orders]
    for worker in workers:
        worker.start()
    first, second = told.get(timeout=90), told.get(timeout=90)
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(first, second)
    found = open_store(build(run))
    assert found is not None
    np.testing.assert_array_equal(found(pictures).numpy(), first)
    assert (len(found), found.encoded) == (8, 0)


def test_a_command_says_what_it_is_good_for_and_fills_all(
    run: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain(asdict(run))))
    with pytest.raises(SystemExit):
        main(["cache", str(file)])
    assert "the recipe keeps no features: add" in capsys.readouterr().err
    main(["cache", str(file), "--vision.cache", "int8"])
    told = capsys.readouterr().out
    assert "about 12 pictures" in told
    assert "12 pictures kept" in told
    with monkeypatch.context() as patched:
        patched.setattr(Store, "look", lambda *_: pytest.fail("a picture is encoded again"))
        train(replace(run, vision=replace(run.vision, cache="int8")))
    with pytest.raises(SystemExit):
        main(["cache", str(file), "--vision.cache", "int8", "--vision.cache_gb", "1e-9"])
    assert "more than vision.cache_gb 1e-09 allows" in capsys.readouterr().err


def test_an_evaluation_reads_what_is_kept(run: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run.vision.cache = "fp32"
    run.data.validation = run.data.source
    folder = train(run)
    looked: list[int] = []
    look = store.Store.look
    monkeypatch.setattr(Store, "look", lambda self, pictures: looked.append(len(pictures)) or look(self, pictures))
    table = evaluate(folder, size=12)
    assert looked == []
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("cache: fp32", "cache: null"))
    anew = evaluate(folder, size=12)["val"]["caption_nll"]
    for control in ("image", "shuffled", "blank"):
        assert anew[control] == pytest.approx(table["val"]["caption_nll"][control], rel=1e-6)
