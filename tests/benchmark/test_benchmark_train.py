"""The benchmark of training: equal numbers first, for every peer; then a table. Tiny towers, real Trainers."""

import json
import shutil
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from bridges import model as splice
from bridges.benchmark import ours, theirs
from bridges.benchmark import train as contest
from bridges.benchmark.contest import FIRST, Lap, Racer, Ready, Task, examples
from bridges.benchmark.techniques import OURS, TECHNIQUES, left_out
from bridges.benchmark.train import compare, distance, settled
from bridges.cli import main
from bridges.recipe import recipe_from

PROJECTOR = {"name": "projector", "depth": 2, "merge": "average", "factor": 2}
QFORMER = {"name": "qformer", "queries": 3, "layers": 3, "width": 16, "heads": 4, "dropout": 0.0}
FLAMINGO: dict[str, Any] = dict(
    name="flamingo", latents=3, depth=1, resampler_heads=2, resampler_head_dim=8, activation="relu"
)
FLAMINGO |= dict(every=1, heads=4, head_dim=8, inner=48, swiglu=True, norm="rms")


def racer(name: str, told: Ready) -> Racer:
    return Racer(name, Pipe()[0], None, told)


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """Without the dropout that the Trainer wakes."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return folder


@pytest.fixture
def given(tiny_clip: Path, llama: Path, tmp_path: Path) -> Any:
    """A recipe with this bridge."""
    return lambda bridge: {
        "output": str(tmp_path / "run"),
        "vision": {"name": str(tiny_clip), "cache": "fp32"},
        "language": {"name": str(llama)},
        "bridge": bridge,
        "data": {"source": "scenes", "size": 20},
        "train": {"batch": 3},
    }


@pytest.fixture
def taken(given: Any, tmp_path: Path) -> Any:
    """What a contestant tells of its first step and of two laps of two steps, in this process."""

    def part(bridge: dict[str, Any], name: str, texts: int = 2) -> tuple[Ready, list[Lap]]:
        task = Task(recipe_from(given(bridge)), texts, 6, tmp_path)
        here, there = Pipe()
        for asked in (2, 2, 0):
            here.send(asked)
        (ours.run if name in OURS else theirs.run)(there, task, name)
        return here.recv(), [here.recv(), here.recv()]

    return part


@pytest.mark.parametrize("bridge", [PROJECTOR, QFORMER, FLAMINGO], ids=lambda bridge: bridge["name"])
def test_every_peer_takes_the_same_steps(taken: Any, bridge: dict[str, Any]) -> None:
    (mine, my_laps), (its, its_laps) = taken(bridge, "ours"), taken(bridge, "tuned")
    racers = [racer("ours", mine), racer("tuned", its)]
    compare(racers)
    assert racers[1].apart[0] < 1e-5
    assert 0 < racers[1].apart[1] < 1e-4
    assert len(my_laps) == len(its_laps) == 2
    for ours_lap, their_lap in zip(my_laps, its_laps, strict=True):  # every step of the way, optimizer included
        assert abs(ours_lap.loss - their_lap.loss) < 1e-3
        assert ours_lap.targets == their_lap.targets
        assert ours_lap.seconds > 0
    for first, later in (my_laps, its_laps):
        assert 0.2 < sum(first.parts.values()) <= 1
        assert min(first.parts["forward"], first.parts["backward"]) > 0
        assert not later.parts
    assert "vision" not in my_laps[0].parts, "features were kept"
    assert its_laps[0].parts["vision"] > 0


def test_trl_takes_the_same_first_step(taken: Any) -> None:
    pytest.importorskip("trl")
    (mine, _), (its, laps) = taken(PROJECTOR, "ours"), taken(PROJECTOR, "trl")
    compare([racer("ours", mine), racer("trl", its)])
    assert len(laps) == 2


@pytest.mark.parametrize(
    "bridge",
    [PROJECTOR, pytest.param(QFORMER, marks=pytest.mark.slow), FLAMINGO],
    ids=lambda bridge: bridge["name"],
)
def test_a_peer_in_bfloat16_is_nearly_the_same(taken: Any, bridge: dict[str, Any]) -> None:
    (mine, _), (its, _) = taken(bridge, "ours"), taken(bridge, "default")
    assert 0 < abs(mine.loss - its.loss) < 0.05
    assert 0 < distance(load_file(its.gradient), load_file(mine.gradient)) < 0.1


@pytest.mark.parametrize(
    "bridge", [PROJECTOR, pytest.param(FLAMINGO, marks=pytest.mark.slow)], ids=lambda bridge: bridge["name"]
)
def test_each_technique_off_or_alone_computes_the_same(
    taken: Any, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Ready] = {}
    for name in OURS:
        with monkeypatch.context() as patch:
            patch.setattr(splice, "LONGEST_LINE", splice.LONGEST_LINE)  # which doing without `lines` changes
            told[name] = taken(bridge, name, 3)[0]
    compare([racer(name, ready) for name, ready in told.items()])
    flops = {name: ready.size.flops for name, ready in told.items()}
    for technique in ("cache", "logits"):
        assert flops[f"no-{technique}"] > flops["ours"], technique
        assert flops[f"only-{technique}"] < flops["plain"], technique
    assert told["no-sharing"].size.tokens > told["ours"].size.tokens == told["only-sharing"].size.tokens
    assert {name for name, ready in told.items() if ready.pictures} == {"ours", "only-cache"} | {
        f"no-{technique}" for technique in TECHNIQUES if technique != "cache"
    }


def test_texts_are_drawn_of_captions_and_questions_as_the_recipe_has_them(given: Any, tmp_path: Path) -> None:
    recipe = recipe_from(given(PROJECTOR) | {"data": {"source": "scenes", "size": 200}})
    for questions, least, most in ((2.0, 0.25, 0.45), (0.0, 1.0, 1.0)):
        settled_to = settled(recipe, None, None, 50, questions, tmp_path)
        steps = examples(Task(settled_to, 3, 2, tmp_path))
        kinds = [talk.kind for step in steps for example in step for talk in example.conversations]
        assert len(kinds) == 2 * 50 * 3
        assert least <= sum(kind in ("caption", "chat") for kind in kinds) / len(kinds) <= most


def test_a_contestant_does_without_what_its_name_says() -> None:
    every = list(TECHNIQUES)
    assert left_out("ours") == []
    assert left_out("plain") == every
    assert left_out("no-lines") == ["lines"]
    assert left_out("only-lines") == [name for name in every if name != "lines"]


def test_other_weights_are_refused_before_anything_is_timed(taken: Any, tmp_path: Path) -> None:
    mine, _ = taken(PROJECTOR, "ours")
    weights = load_file(tmp_path / FIRST)
    save_file(weights | {"layers.0.weight": weights["layers.0.weight"] * 1.01}, tmp_path / FIRST)
    its, _ = taken(PROJECTOR, "tuned")
    racers = [racer("ours", mine), racer("tuned", its)]
    with pytest.raises(ValueError, match="tuned does not compute the same, so nothing is timed"):
        compare(racers)


@pytest.mark.parametrize(
    ("bridge", "message"),
    [
        ({**PROJECTOR, "depth": 1}, "projector of depth 2"),
        ({**QFORMER, "dropout": 0.1}, "dropout: 0.0"),
        ({**FLAMINGO, "offset": 1}, "offset 0"),
    ],
)
def test_what_transformers_cannot_be_is_told(taken: Any, bridge: dict[str, Any], message: str) -> None:
    taken(bridge, "ours")
    with pytest.raises(ValueError, match=message):
        taken(bridge, "tuned")


def test_the_command_prints_a_table_and_names_who_is_absent(
    given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "find_spec", lambda name: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "250")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given(PROJECTOR)))
    figures = tmp_path / "figures.json"
    asked = ["--steps", "1", "--contestant", "trl", "--contestant", "tuned", "--json", str(figures)]
    main(["benchmark", "train", str(tmp_path / "recipe.yaml"), *asked])
    told = capsys.readouterr().out
    assert "Llava + Trainer, tuned" in told
    assert "SFTTrainer" in told
    assert "takes no part: not installed" in told
    assert "transformers 5" in told
    kept = json.loads(figures.read_text())["contestants"]
    assert len(kept["tuned"]["laps"]) == len(kept["ours"]["laps"]) == 3
    assert kept["tuned"]["gradient apart"] < 1e-4
    assert kept["tuned"]["size"]["flops"] > kept["ours"]["size"]["flops"] > 0
    assert set(kept["tuned"]["parts"]) == {"vision", "forward", "backward"}
    assert kept["ours"]["peak bytes"] > 1e8


@pytest.mark.slow  # a minute and a half
def test_training_to_a_loss_takes_all_the_same_steps_and_tells_the_seconds(
    given: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "250")
    recipe = given(PROJECTOR)
    recipe["train"] |= {"steps": 12, "lr": 1e-2, "evaluate_size": 5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    figures = tmp_path / "figures.json"

    def trained(loss: float) -> tuple[str, dict[str, Any]]:
        asked = ["--until", str(loss), "--steps", "3", "--texts", "2", "--json", str(figures)]
        asked += ["--contestant", "no-cache", "--contestant", "tuned"]
        main(["benchmark", "train", str(tmp_path / "recipe.yaml"), *asked])
        return capsys.readouterr().out, json.loads(figures.read_text())["contestants"]

    told, first = trained(0.1)
    assert "not reached" in told
    held = {name: [lap["held_out"] for lap in found["laps"]] for name, found in first.items()}
    assert len(held["ours"]) == 4
    for name in ("no-cache", "tuned"):
        assert held[name] == pytest.approx(held["ours"], abs=1e-3)
    assert held["ours"][2] < held["ours"][0]
    told, found = trained((held["ours"][1] + held["ours"][2]) / 2)
    assert "not reached" not in told
    assert {len(each["laps"]) for each in found.values()} == {3}
    ours = found["ours"]
    assert ours["seconds"] == pytest.approx(3 * sum(lap["seconds"] for lap in ours["laps"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contestant", "nanovlm"], "no contestant 'nanovlm'"),
        (["--rounds", "2"], "at least 3"),
        (["--texts", "0"], "at least 1"),
        (["--until", "1", "--steps", "2000"], "look earlier"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    given: Any, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given(PROJECTOR)))
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "train", str(tmp_path / "recipe.yaml"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
