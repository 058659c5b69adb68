"""A run that is killed at any moment goes on to the very weights that it would have had."""

import errno
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import counted, save
from PIL import Image
from safetensors.torch import load_file

from bridges.checkpoint import load
from bridges.config import Recipe
from bridges.files import finish
from bridges.saved import read_config
from bridges.training.loop import train


@pytest.fixture
def run(recipe: Recipe, captions: Path) -> Recipe:
    recipe.data.source = str(captions)
    recipe.bridge = {"name": "qformer", "queries": 2, "layers": 2, "width": 16, "heads": 2, "dropout": 0.1}
    recipe.train = replace(recipe.train, steps=6, batch=4, lr=1e-2, warmup=2, seed=3, evaluate_every=100)
    recipe.train = replace(recipe.train, evaluate_size=2, save_every=2, log_every=1)
    return recipe


@pytest.fixture(scope="session")
def server() -> Any:
    """A process without threads that has imported all, to fork from: a child of it starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["commands", "bridges.training.loop"])
    return context


def in_child(server: Any, work: Callable[[], object], touched: str, killed_at: int = 0) -> tuple[int, int]:
    """Do something in a process of its own; kill -9 at the n-th time that it touches what begins with `touched`.

    Returns its exit code and how often it touched that.
    """
    told = server.SimpleQueue()
    process = server.Process(target=counted, args=(work, touched, killed_at, told))
    process.start()
    process.join(200)
    return process.exitcode, told.get() if process.exitcode == 0 else 0


def rows(folder: Path | str) -> list[tuple[int, float]]:
    read = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in read if "loss" in row]


@pytest.mark.parametrize(("workers", "times"), [(2, 3), *(pytest.param(w, 10, marks=pytest.mark.slow) for w in (1, 2))])
def test_a_run_killed_at_any_moments_ends_with_the_same_bits(
    run: Recipe, tmp_path: Path, server: Any, workers: int, times: int
) -> None:
    """Moments drawn from all at which it touches its output: in a save, between, before the first."""
    run.train = replace(run.train, workers=workers)
    whole = replace(run, output=str(tmp_path / "whole"))
    code, touches = in_child(server, partial(train, whole), whole.output)
    assert code == 0
    killed = replace(run, output=str(tmp_path / "killed"))
    draw = np.random.default_rng(workers)
    kills, done = 0, False
    while not done:
        at = int(draw.integers(1, touches // 2)) if kills < times else 0
        code, _ = in_child(server, partial(train, killed, True), killed.output, at)
        kills, done = kills + (code == -9), code == 0
        assert code in (0, -9)
        if done and kills < times:  # it came through: once more from the beginning
            done = False
            for path in sorted(Path(killed.output).rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        elif (Path(killed.output) / ".ready").exists() or (Path(killed.output) / "config.yaml").exists():
            load(killed.output)  # what lies there is a whole checkpoint at every moment
    ours, theirs = (load_file(Path(r.output) / "bridge.safetensors") for r in (killed, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert rows(killed.output) == rows(whole.output)
    assert {p.name for p in Path(killed.output).iterdir()} == {p.name for p in Path(whole.output).iterdir()}


def test_at_every_moment_of_a_replacement_all_files_are_old_or_all_are_new(tmp_path: Path, server: Any) -> None:
    _, touches = in_child(server, partial(save, tmp_path / "count", b"new"), str(tmp_path / "count"))
    seen = set()
    for at in range(1, touches + 1):
        folder = tmp_path / str(at)
        save(folder, b"old")
        in_child(server, partial(save, folder, b"new"), str(folder), at)
        finish(folder)
        held = {(folder / name).read_bytes() for name in ("a", "b", "deep/c")}
        assert len(held) == 1, at
        seen |= held
        save(folder, b"next")
        assert {p.name for p in folder.iterdir()} == {"a", "b", "deep"}
    assert seen == {b"old", b"new"}


def test_a_full_disk_in_the_middle_of_a_save_leaves_the_last_one_whole(
    run: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(run.output)
    original, writes = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        writes.append(path)
        if len(writes) > 5 and path.name.startswith("config"):
            original(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot write .*config\.yaml: No space left on device; .* MB are needed"):
        train(run)
    monkeypatch.undo()
    assert {p.name for p in output.iterdir()} == {
        "bridge.safetensors",
        "config.yaml",
        "README.md",
        "metrics.jsonl",
        "trainer",
    }
    read_config(output)
    train(run, resume=True)
    assert [step for step, _ in rows(output)] == list(range(1, 7))


def test_resuming_with_more_data_or_other_towers_is_refused(run: Recipe, tiny_clip: Path) -> None:
    train(replace(run, train=replace(run.train, steps=2)))
    folder = Path(run.data.source)
    Image.new("RGB", (8, 8)).save(folder / "more.png")
    (folder / "metadata.csv").write_text((folder / "metadata.csv").read_text() + "\nmore.png,A cat.")
    again = replace(run, train=replace(run.train, steps=2))
    with pytest.raises(ValueError, match=r"was trained with \d+ examples of .*, now there are \d+"):
        train(again, resume=True)
    with pytest.raises(ValueError, match="trained with the vision tower"):
        train(replace(again, vision=replace(run.vision, layer=-1)), resume=True)
