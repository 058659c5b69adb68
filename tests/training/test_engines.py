"""Engines: whatever shares the work, the losses, the bridge and the files are the same."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import NAMES
from safetensors.torch import load_file

from bridges.adapter import WEIGHTS
from bridges.checkpoint import load, plain
from bridges.config import Lora, Recipe
from bridges.training.engine import flat
from bridges.training.loop import train
from bridges.training.zero import chosen_engine, zero_settings

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra [deepspeed] is not installed")


@pytest.fixture
def run(recipe: Recipe, captions: Path, tmp_path: Path) -> Recipe:
    """Pictures, and beside them texts of which every other one has a picture: two of them a step."""
    rows = []
    for i in range(12):
        said = [{"type": "text", "text": "Say."}, *([{"type": "image", "path": f"{i}.png"}] if i % 2 else [])]
        answer = {"role": "assistant", "content": f"A {NAMES[i % 6]}."}
        rows.append(json.dumps({"messages": [{"role": "user", "content": said}, answer]}))
    (captions / "texts.jsonl").write_text("\n".join(rows))
    recipe.data.source = str(captions)
    recipe.also = [replace(recipe.data, source=str(captions / "texts.jsonl"), batch=2, weight=0.2)]
    recipe.train = replace(recipe.train, steps=5, batch=4, micro_batch=1, lr=1e-2, warmup=2, seed=3)
    recipe.train = replace(recipe.train, evaluate_every=5, save_every=100, log_every=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain(asdict(recipe))))
    return recipe


def launch(lines: list[str], processes: int = 2, timeout: int = 280) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = str(Path(__file__).with_name("commands.py"))
    return subprocess.run([*start, script, *lines], capture_output=True, text=True, timeout=timeout, check=False)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def difference(one: Path, other: Path, file: str = "bridge.safetensors") -> float:
    ours, theirs = (load_file(folder / file) for folder in (one, other))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def check_files(folder: Path, recipe: Recipe) -> None:
    """Only what trains and AdamW's two figures of it: at most 1.05 times that, and no tensor but of the bridge."""
    bridge = load(folder).model.bridge
    names = set(bridge.state_dict())
    assert set(load_file(folder / "bridge.safetensors")) == names
    state = torch.load(folder / "trainer" / "state.pt", weights_only=True)
    assert {name.removeprefix("bridge.") for name in state["optimizer"]} == names
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "metrics.jsonl"]
    assert {str(p.relative_to(folder)) for p in files} == {
        "bridge.safetensors",
        "config.yaml",
        "README.md",
        "trainer/state.pt",
    }
    tensors = 12 * sum(p.numel() for p in bridge.parameters())
    small = 16_000  # texts and headers, which tiny tensors do not hide
    assert sum(p.stat().st_size for p in files) <= 1.05 * tensors + small


@needs_deepspeed
def test_every_engine_gives_what_one_process_gives_and_goes_on_with_what_another_left(
    run: Recipe, tmp_path: Path
) -> None:
    one = train(replace(run, output=str(tmp_path / "one")))
    (tmp_path / "all.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "fp16": "auto"})
    )
    command = f"train {tmp_path / 'recipe.yaml'} --output={tmp_path}/"
    ended = launch(
        [
            f"{command}ddp",
            f"{command}zero2 --engine zero2",
            f"{command}zero3 --engine {tmp_path / 'all.json'}",
            "stop=2",
            f"{command}stopped --engine zero2",
            *(f"copy={tmp_path}/stopped={tmp_path}/{name}" for name in ("shared", "alone")),
            f"{command}stopped --engine zero2 --resume auto",
            f"{command}shared --engine {tmp_path / 'all.json'} --resume",
        ]
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(losses(tmp_path / "alone")) < 5
    train(replace(run, output=str(tmp_path / "alone")), resume=True)
    for name in ("ddp", "zero2", "zero3", "stopped", "shared", "alone"):
        assert losses(tmp_path / name) == pytest.approx(losses(one), abs=1e-5), name
        assert difference(tmp_path / name, one) < 1e-5, name
        check_files(tmp_path / name, run)
    assert difference(tmp_path / "stopped", tmp_path / "zero2") == 0


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_process_of_zero_killed_at_any_moments_goes_on_to_the_same_bits(run: Recipe, tmp_path: Path) -> None:
    """Ten moments, drawn from all at which it touches its output: in one of the three saves, or between them."""
    command = f"train {tmp_path / 'recipe.yaml'} --train.save_every=2 --engine zero2 --resume --output={tmp_path}/"
    draw, kills = np.random.default_rng(0), 0
    while kills < 10:
        moment = int(draw.integers(1, 40))
        ended = launch([f"kill={moment}", f"{command}killed"], timeout=900)
        print(f"killed at {moment}" if ended.returncode else f"{moment}: came through", flush=True)
        kills += ended.returncode != 0
        assert "SIGKILL" in ended.stderr or not ended.returncode, ended.stderr[-3000:]
        if not ended.returncode:  # it came through: once more from the beginning
            shutil.rmtree(tmp_path / "killed")
    ended = launch([f"{command}killed", f"{command}whole"], timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert difference(tmp_path / "killed", tmp_path / "whole") == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow  # a minute; CI has the same without LoRA
@needs_deepspeed
def test_lora_beside_every_engine_is_lora_in_one_process(run: Recipe, tmp_path: Path) -> None:
    """On both towers, with the frozen weights shared out too, all of them, and gone on with by another engine."""
    run = replace(run, lora=Lora(rank=2, lr=3e-3), vision=replace(run.vision, lora=Lora(rank=3, lr=2e-3)))
    run = replace(run, train=replace(run.train, steps=3, save_every=2))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain(asdict(run))))
    (tmp_path / "all.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    one = train(replace(run, output=str(tmp_path / "one")))
    command = f"train {tmp_path / 'recipe.yaml'} --output={tmp_path}/"
    engines = {"ddp": "ddp", "zero2": "zero2", "zero3": str(tmp_path / "all.json")}
    lines = [f"{command}{name} --engine {engine}" for name, engine in engines.items()]
    stopped = ["stop=1", f"{command}stopped --engine {engines['zero3']}", f"{command}stopped --engine zero2 --resume"]
    ended = launch([*lines, *stopped])
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in (*engines, "stopped"):
        assert losses(tmp_path / name) == pytest.approx(losses(one), abs=1e-5), name
        assert difference(tmp_path / name, one) < 1e-5, name
        for file in WEIGHTS.values():
            assert difference(tmp_path / name, one, file) < 1e-5, (name, file)
            assert (tmp_path / name / file).stat().st_size == (one / file).stat().st_size


@pytest.mark.slow
def test_a_vision_adapter_trains_on_two_processes_of_which_one_has_no_picture(run: Recipe, tmp_path: Path) -> None:
    run = replace(run, vision=replace(run.vision, lora=Lora(rank=2)), train=replace(run.train, steps=3))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain(asdict(run))))
    one = train(replace(run, output=str(tmp_path / "one")))
    ended = launch([f"train {tmp_path / 'recipe.yaml'} --output={tmp_path}/ddp --engine ddp"])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(tmp_path / "ddp") == pytest.approx(losses(one), abs=1e-5)
    for file in ("bridge.safetensors", WEIGHTS["vision"]):
        assert difference(tmp_path / "ddp", one, file) < 1e-5, file


def test_processes_that_disagree_about_the_recipe_are_told(run: Recipe, tmp_path: Path) -> None:
    script = tmp_path / "disagree.py"
    script.write_text(
        "import os\nfrom bridges.cli import main\n"
        f"main(['train', '{tmp_path / 'recipe.yaml'}', '--train.seed', os.environ['RANK']])"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    ended = subprocess.run(start, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode
    assert "process 1 was started with train.seed 1, process 0 with 0" in ended.stderr


@needs_deepspeed
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_batch_size", 64, "train_batch_size is 64, and the recipe's train.batch says 4"),
        ("train_micro_batch_size_per_gpu", 2, "train.micro_batch says 1"),
        ("gradient_clipping", 5.0, "train.clip says 1.0"),
        ("optimizer", {"type": "SGD"}, "optimizer.type is 'SGD'"),
        ("optimizer", {"params": {"lr": 0.1}}, r"optimizer\.params\.lr is 0\.1.* train\.lr says 0\.01"),
        ("scheduler", {"type": "WarmupLR"}, "leave scheduler out"),
        ("bf16", {"enabled": True}, r"bf16\.enabled is True"),
        ("zero_optimization", {"stage": 0}, "should say 1, 2 or 3"),
    ],
)
def test_settings_that_contradict_the_recipe_are_named(
    run: Recipe, tmp_path: Path, key: str, value: object, message: str
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    with pytest.raises(ValueError, match=message):
        zero_settings(str(file), run, 2)


def test_settings_that_say_auto_or_the_same_are_taken(run: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    adam = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}}
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}
    file.write_text(json.dumps({"zero_optimization": zero, "optimizer": adam, "train_batch_size": 4, "bf16": "auto"}))
    settings = zero_settings(str(file), run, 2)
    assert settings is not None
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert "optimizer" not in settings


def test_engines_that_are_not_there_are_told(run: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"no engine 'fsdp9': there are ddp, zero1, zero2, zero3, or your own DeepSpeed"
    ):
        chosen_engine("fsdp9")
    monkeypatch.setattr("bridges.training.zero.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mm-bridges\[deepspeed\]'"):
        chosen_engine("zero2")
    with pytest.raises(ValueError, match="no DeepSpeed settings"):
        zero_settings(str(tmp_path / "none.json"), run, 1)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        zero_settings(str(tmp_path / "broken.json"), run, 1)


def test_a_launcher_set_up_for_something_else_is_told(run: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="mixed precision bf16; set it to no"):
        train(run)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP"):
        train(run)


def test_a_tracker_is_told_what_the_log_says_or_what_to_install(run: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run.train = replace(run.train, steps=1, track=["tensorboard"])
    folder = train(run)
    assert list((folder / "bridges").glob("events.*"))
    monkeypatch.setattr("bridges.training.engine.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"train\.track: trackio is not installed: pip install trackio"):
        train(replace(run, output=f"{folder}2", train=replace(run.train, track=["trackio"])))


def test_nested_settings_have_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
