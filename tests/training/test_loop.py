"""The loop: what it changes, that it can stop and go on, and that its batches may be cut in any way."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from commands import stop_at
from PIL import Image
from safetensors.torch import load_file

from bridges.build import Assembled, build
from bridges.checkpoint import load, plain
from bridges.config import Recipe
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.training.engine import Engine
from bridges.training.feed import Share, order
from bridges.training.loop import learning_rate, parameter_groups, train, train_step
from bridges.training.stage import make_batch, said_loss
from bridges.training.state import STATE

WORDS = ("cat", "dog", "house", "tree", "bird")


@pytest.fixture
def run(recipe: Recipe, captions: Path) -> Recipe:
    recipe.data.source = str(captions)
    recipe.train = replace(
        recipe.train, steps=6, batch=4, lr=1e-2, warmup=2, evaluate_every=3, save_every=3, log_every=1, seed=3
    )
    return recipe


def losses(folder: Path | str) -> list[float]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def examples(pictures: list[Image.Image], count: int) -> list[Example]:
    """With one, two and no pictures, and one to three texts."""
    made = []
    for i in range(count):
        texts = [ask(f"What is {w}?", f"A {w}.", pictures[i % 3]) for w in WORDS[: 1 + i % 3]]
        if i == 1:
            texts = [Conversation([Turn("user", ["no picture"]), Turn("assistant", ["Then nothing."])])]
        if i == 2:
            texts = [Conversation([Turn("user", [pictures[0], "and", pictures[1]]), Turn("assistant", ["Two."])])]
        made.append(Example(texts))
    return made


def step(assembled: Assembled, batches: list, lr: float = 1e-2) -> dict[str, float]:
    return mixed_step(assembled, [Share("all", 1.0, batches)], lr)


def mixed_step(assembled: Assembled, shares: list[Share], lr: float = 1e-2) -> dict[str, float]:
    groups = parameter_groups(assembled.model.bridge, assembled.recipe.train)
    return train_step(Engine(Accelerator(), assembled.model, torch.optim.AdamW(groups, lr=lr)), shares, 1e9, said_loss)


def test_a_step_changes_the_bridge_and_nothing_else(assembled: Assembled, pictures: list[Image.Image]) -> None:
    before = {name: tensor.clone() for name, tensor in assembled.model.state_dict().items()}
    step(assembled, [make_batch(assembled, examples(pictures, 4))])
    for name, tensor in assembled.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("bridge."), name
    assert all(
        p.grad is None for tower in (assembled.model.vision, assembled.model.language) for p in tower.parameters()
    )


def test_a_batch_of_four_is_four_batches_of_one(recipe: Recipe, pictures: list[Image.Image]) -> None:
    results = []
    for cut in (4, 1):
        assembled = build(recipe)
        four = examples(pictures, 4)
        batches = [make_batch(assembled, four[at : at + cut]) for at in range(0, 4, cut)]
        results.append((step(assembled, batches), assembled.model.bridge.state_dict()))
    (figures, weights), (other, other_weights) = results
    assert figures["targets"] == other["targets"]
    assert figures["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], atol=2e-5, rtol=1e-4)


def test_a_mixed_step_adds_up_each_source_by_its_weight(assembled: Assembled, pictures: list[Image.Image]) -> None:
    """The gradient is 1.0 x that of the mean over the first's targets + 0.2 x that of the second's."""
    parts = [make_batch(assembled, part) for part in (examples(pictures, 4)[:3], examples(pictures, 4)[3:])]
    weights, means = (1.0, 0.2), []
    bridge = assembled.model.bridge
    for batch, weight in zip(parts, weights, strict=True):
        loss, _ = said_loss(assembled.model, batch)
        (loss / batch.num_targets * weight).backward()  # gradients add up
        means.append(loss.item() / batch.num_targets)
    assert parts[0].num_targets != parts[1].num_targets
    expected = {name: p.grad.clone() for name, p in bridge.named_parameters() if p.grad is not None}
    bridge.zero_grad()
    found = {}
    for name, parameter in bridge.named_parameters():
        parameter.register_hook(lambda grad, name=name: found.update({name: found.get(name, 0) + grad}))
    shares = [Share(name, weight, [batch]) for name, weight, batch in zip("ab", weights, parts, strict=True)]
    figures = mixed_step(assembled, shares)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    assert [figures["loss/a"], figures["loss/b"]] == pytest.approx(means, rel=1e-5)
    assert figures["loss"] == pytest.approx((means[0] + 0.2 * means[1]) / 1.2, rel=1e-5)
    assert figures["targets"] == sum(batch.num_targets for batch in parts)


def mixed(run: Recipe) -> Recipe:
    """Beside its pictures every step sees two texts without one, and a fifth of their loss."""
    file = Path(run.data.source).parent / "texts.jsonl"
    rows = [{"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": w}]} for w in WORDS]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return replace(run, also=[replace(run.data, source=str(file), batch=2, weight=0.2)])


def test_a_mixed_run_logs_every_source_and_goes_on_exactly(run: Recipe, tmp_path: Path) -> None:
    run = mixed(run)
    whole = train(replace(run, output=str(tmp_path / "whole")))
    part = replace(run, output=str(tmp_path / "part"))
    stop_at(2, part.output)
    with pytest.raises(KeyboardInterrupt):
        train(part)
    train(part, resume=True)
    assert losses(part.output) == losses(whole)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines() if "loss/" in line]
    assert len(rows) == 6
    for row in rows:
        one, other = row[f"loss/{run.data.source}"], row[f"loss/{run.also[0].source}"]
        assert row["loss"] == pytest.approx((one + 0.2 * other) / 1.2, rel=1e-5)
    with pytest.raises(ValueError, match=r"also.0.weight 0.2, the recipe says 0.5"):
        train(replace(part, also=[replace(run.also[0], weight=0.5)]), resume=True)
    with pytest.raises(ValueError, match="1 data beside the first"):
        train(replace(part, also=[]), resume=True)


def test_gradient_checkpointing_changes_no_loss(run: Recipe, tmp_path: Path) -> None:
    told = []
    for again in (False, True):
        settings = replace(run.train, gradient_checkpointing=again)
        told.append(losses(train(replace(run, train=settings, output=str(tmp_path / str(again))))))
    assert told[1] == pytest.approx(told[0], abs=1e-5)


def test_a_run_learns_and_leaves_a_checkpoint(run: Recipe) -> None:
    run.train.steps = 30
    folder = train(run)
    told = losses(folder)
    assert np.mean(told[-5:]) < np.mean(told[:5]) - 0.5
    assert {p.name for p in folder.iterdir()} == {
        "bridge.safetensors",
        "config.yaml",
        "README.md",
        "metrics.jsonl",
        "trainer",
    }


def test_a_resumed_run_is_the_uninterrupted_one(run: Recipe, tmp_path: Path) -> None:
    whole = train(replace(run, output=str(tmp_path / "whole")))
    part = replace(run, output=str(tmp_path / "part"))

    stop_at(2, part.output)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train(part)
    assert len(losses(part.output)) < 6
    train(part, resume=True)
    assert losses(part.output) == losses(whole)
    ours, theirs = (load_file(Path(folder) / "bridge.safetensors") for folder in (part.output, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_needs_the_same_recipe(run: Recipe) -> None:
    run.train.steps = 3
    train(run)
    with pytest.raises(ValueError, match=r"train\.lr 0\.01.*0\.5"):
        train(replace(run, train=replace(run.train, lr=0.5)), resume=True)


def test_a_finished_run_is_not_overwritten(run: Recipe) -> None:
    run.train.steps = 1
    train(run)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        train(run)


def test_as_many_of_the_last_checkpoints_are_kept_as_are_asked_for(run: Recipe) -> None:
    run.train = replace(run.train, save_every=1, evaluate_every=1, steps=3, keep=2, min_lr=1e-3, best="caption_nll")
    folder = train(run)
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["0000002", "0000003"]
    last, before = (load(folder / "steps" / name).model.bridge.state_dict() for name in ("0000003", "0000002"))
    now = load(folder).model.bridge.state_dict()
    assert all(torch.equal(now[name], last[name]) for name in now)
    assert not all(torch.equal(now[name], before[name]) for name in now)
    best = load(folder / "best").model.bridge.state_dict()
    assert all(torch.equal(best[name], now[name]) for name in now), "a better one takes its place"


def test_the_best_checkpoint_by_a_chosen_figure_is_kept_also_over_a_resume(run: Recipe, captions: Path) -> None:
    """Held-out captions get less and less likely, the more is learnt of others."""
    other = captions.parent / "other.csv"
    other.write_text("path,caption\n" + "\n".join(f"pictures/{i}.png,9 8 7 6 5 4 3 2 1" for i in range(4)))
    run.data.validation = str(other)
    run.train = replace(run.train, lr=0.1, warmup=1, evaluate_every=1, save_every=1, keep=6, best="caption_nll")
    stop_at(4, run.output)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    folder = train(run, resume=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {row["step"]: row["validation"]["caption_nll"]["image"] for row in rows if "validation" in row}
    least = min(figures, key=lambda step: figures[step])
    assert least < 4, figures
    best, then, now = (load(folder / n).model.bridge.state_dict() for n in ("best", f"steps/{least:07}", "."))
    assert all(torch.equal(best[name], then[name]) for name in then)
    assert not all(torch.equal(best[name], now[name]) for name in then)


def test_a_figure_that_is_not_measured_cannot_choose_the_best(run: Recipe) -> None:
    with pytest.raises(ValueError, match=r"train\.best matching is not measured in this stage; caption_nll is"):
        train(replace(run, train=replace(run.train, best="matching")))


def test_a_broken_number_stops_the_run_and_names_its_module(assembled: Assembled, pictures: list[Image.Image]) -> None:
    batch = make_batch(assembled, examples(pictures, 4))
    with torch.no_grad():
        assembled.model.bridge.layers[2].bias[0] = torch.inf
    with pytest.raises(ValueError, match=r"bridge\.layers\.2"):
        step(assembled, [batch])


def test_overflow_between_modules_is_named_too(assembled: Assembled, pictures: list[Image.Image]) -> None:
    batch = make_batch(assembled, examples(pictures, 4))
    with torch.no_grad():
        assembled.model.bridge.layers[0].weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"first module .* bridge\.layers\.0"):
        step(assembled, [batch])


def test_data_without_a_target_is_refused(assembled: Assembled, pictures: list[Image.Image]) -> None:
    assembled.recipe.data.max_length = 32
    with pytest.raises(ValueError, match="not one token"):
        make_batch(assembled, [Example([ask("What do you see there?", "A cat.", pictures[0])])])


def test_every_epoch_sees_every_example_once() -> None:
    seen = [i for step in range(10) for i in order(step, batch=4, size=10, seed=1)]
    assert len(seen) == 40
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert seen[:10] != seen[10:20]


def test_the_rate_warms_up_and_ends_at_its_least(recipe: Recipe) -> None:
    settings = replace(recipe.train, steps=10, warmup=2, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, settings) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_broken_pictures_are_skipped_and_listed(
    run: Recipe, captions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (captions / "metadata.csv").read_text().splitlines()
    noise = np.random.default_rng(1)
    for i in range(12, 60):
        Image.fromarray(noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(captions / f"{i}.png")
        lines.append(f"{i}.png,A cat.")
    (captions / "metadata.csv").write_text("\n".join(lines))
    (captions / "20.png").write_bytes(b"")
    train(replace(run, train=replace(run.train, steps=15)))
    told = capsys.readouterr()
    assert "20.png" in told.out


def test_two_processes_of_accelerate_launch_equal_one(run: Recipe, tmp_path: Path) -> None:
    """Two ranks over gloo, each with half of each batch, of which one has no picture, give the losses of one."""
    run = mixed(run)
    one = train(replace(run, output=str(tmp_path / "one")))
    other = replace(run, output=str(tmp_path / "two"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(plain(asdict(other))))
    settings = str(Path(__file__).parents[2] / "recipes" / "accelerate" / "node.yaml")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings, "--num_processes", "2"]
    done = subprocess.run(
        [*start, "--main_process_port", "0", "-m", "bridges.cli", "train", str(recipe)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(other.output) == pytest.approx(losses(one), abs=1e-5)
    assert (Path(other.output) / STATE).exists()
    log = (Path(other.output) / "metrics.jsonl").read_text()
    assert log.count('"step": 1,') == 1, "one process alone writes"
