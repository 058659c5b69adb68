"""A checkpoint is handed over whole, exact and small; anything else is refused in one line that names the thing."""

import errno
import os
import resource
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_language, tiny_vision
from safetensors.torch import load_file, save_file

from bridges.build import Assembled, build, build_bridge
from bridges.checkpoint import CARD, load, save_checkpoint, write
from bridges.config import Recipe
from bridges.files import prepare_output
from bridges.saved import CONFIG, WEIGHTS


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_round_trip_gives_the_same_model_and_recipe(assembled: Assembled, tiny_checkpoint: Path):
    again = load(tiny_checkpoint)
    assert asdict(again.recipe) == asdict(assembled.recipe)
    for (name, saved), loaded in zip(
        assembled.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(saved, loaded), name


def test_frozen_weights_are_in_no_file(assembled: Assembled, tiny_checkpoint: Path):
    assert {path.name for path in tiny_checkpoint.iterdir()} == {WEIGHTS, CONFIG, CARD}
    trained = sum(p.numel() for p in assembled.model.bridge.parameters())
    assert 4 * trained <= (tiny_checkpoint / WEIGHTS).stat().st_size < 4 * trained + 2000
    assert sum(path.stat().st_size for path in tiny_checkpoint.iterdir()) < 4 * trained + 8000
    assert load_file(tiny_checkpoint / WEIGHTS).keys() == assembled.model.bridge.state_dict().keys()


def test_config_and_card_say_what_they_must(assembled: Assembled, tiny_checkpoint: Path):
    config = yaml.safe_load((tiny_checkpoint / CONFIG).read_text())
    assert config["towers"]["vision"]["fingerprint"] == assembled.model.vision.fingerprint()
    assert config["towers"]["language"]["dim"] == 32
    card = (tiny_checkpoint / CARD).read_text()
    trained = sum(p.numel() for p in assembled.model.bridge.parameters())
    assert f"`projector`, {trained:,} trained parameters, 16 slots an image" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == [
        assembled.recipe.vision.name,
        assembled.recipe.language.name,
    ]


def test_start_takes_the_bridge_of_another_checkpoint(recipe: Recipe, assembled: Assembled, tiny_checkpoint: Path):
    recipe.start, recipe.train.seed = str(tiny_checkpoint), 1
    again = build(recipe)
    for name, tensor in assembled.model.bridge.state_dict().items():
        assert torch.equal(tensor, again.model.bridge.state_dict()[name])
    recipe.bridge = {"name": "projector", "depth": 1}
    with pytest.raises(ValueError, match=r"its bridge does not fit .*layers.2.weight"):
        build(recipe)


def test_the_seed_decides_the_first_weights(recipe: Recipe):
    one, two = build(recipe), build(recipe)
    recipe.train.seed = 1
    other = build(recipe)
    first = [a.model.bridge.state_dict()["layers.0.weight"] for a in (one, two, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_no_checkpoint_is_told_from_a_broken_one(tiny_checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no checkpoint in .*nowhere: config.yaml is missing"):
        load(tmp_path / "nowhere")
    (tiny_checkpoint / WEIGHTS).rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"no weights in .*run: bridge.safetensors is missing"):
        load(tiny_checkpoint)
    (tiny_checkpoint / WEIGHTS).write_bytes((tmp_path / "away").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"bridge.safetensors is broken .*; was the copy cut short"):
        load(tiny_checkpoint)
    (tiny_checkpoint / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=r"bridge.safetensors is broken"):
        load(tiny_checkpoint)


@pytest.mark.parametrize("content", ["", "output: a\n", "a: [b\n", "- a\n", "towers: {}\n", "\x00"], ids=repr)
def test_a_config_that_is_none_is_refused_by_name(tiny_checkpoint: Path, content: str):
    (tiny_checkpoint / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"run.config\.yaml"):
        load(tiny_checkpoint)


def test_an_unknown_key_or_option_in_it_names_the_nearest(tiny_checkpoint: Path):
    rewrite(tiny_checkpoint / CONFIG, "keep_cls:", "keep_clss:")
    with pytest.raises(ValueError, match=r"unknown key vision.keep_clss; did you mean vision.keep_cls"):
        load(tiny_checkpoint)
    rewrite(tiny_checkpoint / CONFIG, "keep_clss:", "keep_cls:")
    rewrite(tiny_checkpoint / CONFIG, "depth:", "dept:")
    with pytest.raises(ValueError, match=r"has no option 'dept'; did you mean depth\?"):
        load(tiny_checkpoint)


def test_weights_that_do_not_fit_are_refused_strictly(tiny_checkpoint: Path):
    weights = load_file(tiny_checkpoint / WEIGHTS)
    for wrong, named in (
        ({**weights, "more": torch.zeros(1)}, "more"),
        ({k: v for k, v in weights.items() if k != "layers.2.bias"}, "layers.2.bias"),
        ({**weights, "layers.0.weight": torch.zeros(32, 8)}, "layers.0.weight"),
    ):
        save_file(wrong, tiny_checkpoint / WEIGHTS)
        with pytest.raises(ValueError, match=rf"does not fit the bridge of its config.yaml: .*{named}"):
            load(tiny_checkpoint)


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_towers_with_other_weights_are_refused_by_name(recipe: Recipe, kind: str, tmp_path: Path):
    make = tiny_vision if kind == "vision" else lambda folder, seed: tiny_language("llama", folder, seed)
    folder = make(tmp_path / "tower", seed=3)
    getattr(recipe, kind).name = str(folder)
    assembled = build(recipe)
    save_checkpoint(Path(recipe.output), assembled)
    load(recipe.output)
    make(folder, seed=4)
    with pytest.raises(
        ValueError, match=rf"was trained with the {kind} tower .*tower \(width \d+, [0-9a-f]+\), this is"
    ):
        load(recipe.output)
    recipe.start = recipe.output
    with pytest.raises(ValueError, match=rf"was trained with the {kind} tower"):
        build(recipe)


def test_a_tower_of_another_width_is_refused_with_both_widths(recipe: Recipe, tmp_path: Path):
    recipe.vision.name = str(tiny_vision(tmp_path / "tower"))
    save_checkpoint(Path(recipe.output), build(recipe))
    tiny_vision(tmp_path / "tower", hidden_size=24)
    with pytest.raises(ValueError, match=r"vision tower .*width 16.* this is .*width 24"):
        load(recipe.output)


def test_the_layer_that_is_read_is_part_of_the_tower(recipe: Recipe, tiny_checkpoint: Path):
    recipe.vision.layer, recipe.start = -1, str(tiny_checkpoint)
    with pytest.raises(ValueError, match="was trained with the vision tower"):
        build(recipe)


def test_without_space_the_previous_file_stays_whole(
    assembled: Assembled, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    before = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with torch.no_grad():
        assembled.model.bridge.layers[0].weight += 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(
            ValueError, match=r"cannot write .*safetensors: No space left on device; 0\.\d MB are needed"
        ):
            save_checkpoint(tiny_checkpoint, assembled)
    assert {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} == before
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))  # a disk that is full amid the file
    try:
        with pytest.raises(ValueError, match=r"cannot write .*safetensors: File too large"):
            save_checkpoint(tiny_checkpoint, assembled)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} == before
    save_checkpoint(tiny_checkpoint, assembled)
    assert (tiny_checkpoint / WEIGHTS).read_bytes() != before[WEIGHTS]


def test_a_file_is_written_in_one_go_and_into_new_folders(tmp_path: Path):
    write(tmp_path / "a" / "b" / "file", b"one")
    write(tmp_path / "a" / "b" / "file", b"two")
    assert [path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()] == [b"two"]


def test_an_output_that_cannot_be_written_is_known_before_training(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match="is a file, or lies in one; choose a folder"):
            prepare_output(folder, needed=0)
    with pytest.raises(ValueError, match=r"MB free, a checkpoint needs 10000000000 MB"):
        prepare_output(tmp_path / "new", needed=10**16)
    prepare_output(tmp_path / "new" / "er", needed=1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "its name is missing"),
        ({"depth": 2}, "its name is missing"),
        ({"name": "projecter"}, "no bridge named 'projecter': did you mean 'projector'"),
        ({"name": "projector", "merg": "average"}, r"has no option 'merg'; did you mean merge\?"),
        ({"name": "projector", "zzz": 1}, "has no option 'zzz'; did you mean depth or merge or factor or norm or bias"),
        ({"name": "projector", "depth": "two"}, "depth.*int.*two"),
        ({"name": "projector", "merge": "pool"}, "merge.*none.*strip.*pool"),
        ({"name": "projector", "factor": None}, "factor has no value"),
        ({"name": "projector", "norm": 3}, "norm"),
        ({"name": "projector", "vision_dim": 3}, "has no option 'vision_dim'"),
    ],
    ids=str,
)
def test_an_option_that_a_bridge_does_not_have_or_of_the_wrong_kind_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        build_bridge(options, 16, 16, 32, 2)
    assert "\n" not in str(caught.value)
