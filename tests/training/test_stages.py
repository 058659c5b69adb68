"""A first stage without a language model, a second that begins with it, and one that reads what is asked."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from bridges.build import Assembled, Paired, build
from bridges.checkpoint import load, load_pairs, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.data.batch import collate, rows_of
from bridges.data.conversation import Example, Turn, ask
from bridges.inference.decoding import answers
from bridges.inference.session import Session
from bridges.objectives.language import language_loss
from bridges.recipe import read_recipe, recipe_from
from bridges.training import loop
from bridges.training.loop import train
from bridges.training.stage import make_batch, open_stage

SMALL: dict[str, Any] = {"name": "qformer", "queries": 4, "layers": 2, "width": 32, "heads": 4, "inner": 48}


@pytest.fixture
def first(recipe: Recipe, captions: Path, tiny_bert_folder: Path) -> Recipe:
    """A first stage of six steps."""
    recipe.objectives = {"contrastive": 1.0, "matching": 1.0, "captioning": 1.0}
    recipe.bridge = {**SMALL, "reads": "pairs", "bert": str(tiny_bert_folder)}
    recipe.data.source = str(captions)
    recipe.output = recipe.output + "_first"
    recipe.train = replace(
        recipe.train, steps=6, batch=6, lr=1e-3, warmup=2, evaluate_every=3, save_every=3, log_every=1, seed=3
    )
    return recipe


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_first_stage_learns_without_a_language_model(first: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    first.language.name = "/nowhere"
    train(first)
    logged = [row for row in rows(first.output) if "loss" in row]
    assert len(logged) == 6
    assert logged[-1]["loss"] < logged[0]["loss"]
    for row in logged:
        assert row["loss"] == pytest.approx(row["contrastive"] + row["matching"] + row["captioning"], rel=1e-4)
    told = capsys.readouterr().out
    assert "held-out recall@1" in told
    assert "chance" in told
    paired = load_pairs(first.output)
    assert isinstance(paired, Paired)
    assert not paired.model.training
    config = yaml.safe_load((Path(first.output) / "config.yaml").read_text())
    assert set(config["towers"]) == {"vision"}


def test_a_resumed_first_stage_gives_the_losses_of_an_uninterrupted_one(
    first: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(first)
    whole = [row["loss"] for row in rows(first.output) if "loss" in row]
    again = replace(first, output=first.output + "_again")
    original, count = loop.train_step, [0]

    def stopping(*arguments: Any) -> dict[str, float]:
        count[0] += 1
        if count[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    monkeypatch.undo()
    train(again, resume=True)
    assert [row["loss"] for row in rows(again.output) if "loss" in row] == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, train=replace(r.train, batch=1)), "a pair alone has no negatives"),
        (lambda r: replace(r, train=replace(r.train, micro_batch=2)), "compared within a whole batch"),
        (lambda r: replace(r, data=replace(r.data, prefix=True)), "pairs need whole ones"),
        (lambda r: replace(r, bridge={"name": "projector"}), "need a bridge that reads pairs"),
        (lambda r: replace(r, lora=Lora()), "lora: there is no language model to put it on"),
        (lambda r: replace(r, objectives={"contrast": 1.0}), "did you mean contrastive"),
    ],
)
def test_a_first_stage_that_cannot_learn_is_refused(first: Recipe, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_stage(change(first))


def test_captions_that_are_all_equal_are_refused(first: Recipe, captions: Path) -> None:
    lines = (captions / "metadata.csv").read_text().splitlines()
    (captions / "metadata.csv").write_text("\n".join([lines[0], *(f"{i}.png,A photo." for i in range(12))]))
    with pytest.raises(ValueError, match=r"all captions are 'a photo\.'"):
        train(first)


def second_of(first: Recipe, **changes: Any) -> Recipe:
    return replace(
        first,
        output=first.output.replace("_first", "_second"),
        start=first.output,
        objectives={},
        bridge=dict(SMALL),
        **changes,
    )


def test_a_second_stage_begins_with_the_first_and_talks(first: Recipe, pictures: list[Image.Image]) -> None:
    train(first)
    with pytest.raises(ValueError, match="is of the first stage, without a language model"):
        load(first.output)
    second = second_of(first)
    began = build(second).model.bridge.state_dict()
    learned = load_pairs(first.output).model.bridge.state_dict()
    assert all(torch.equal(began[name], learned[name]) for name in began if not name.startswith("projection"))
    train(second)
    session = Session(load(second.output))
    session.append(Turn("user", [pictures[0], "What is it?"]))
    assert isinstance("".join(session.stream(8)), str)


def test_a_first_stage_of_another_encoder_or_other_sizes_is_refused(first: Recipe, tmp_path: Path) -> None:
    train(first)
    with pytest.raises(ValueError, match="was trained with the vision tower"):
        build(second_of(first, vision=replace(first.vision, layer=-1)))
    smaller = replace(second_of(first), bridge={**SMALL, "layers": 1})
    with pytest.raises(ValueError, match=r"start .*: its bridge is a Q-Former of other sizes"):
        build(smaller)
    assert not (tmp_path / "run_second").exists()


def test_more_queries_than_the_language_model_has_positions_are_refused(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"takes 600 slots, and .* knows 512 positions"):
        build(replace(recipe, bridge={**SMALL, "queries": 600}))


def test_a_recipe_that_starts_from_another_runs_it_first_and_once(first: Recipe, tmp_path: Path) -> None:
    given = {
        "output": first.output,
        "vision": vars(first.vision),
        "bridge": first.bridge,
        "objectives": first.objectives,
        "data": {"source": first.data.source},
        "train": {"steps": 2, "batch": 6, "save_every": 1},
    }
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(given))
    second = replace(second_of(first), start=str(tmp_path / "first.yaml"))
    train(second)
    made = (Path(first.output) / "bridge.safetensors").stat().st_mtime_ns
    assert load(second.output).recipe.bridge == SMALL
    train(replace(second, output=second.output + "_again"))
    assert (Path(first.output) / "bridge.safetensors").stat().st_mtime_ns == made


@pytest.fixture
def instructed(recipe: Recipe, tiny_bert_folder: Path) -> Assembled:
    bridge = {**SMALL, "reads": "instructions", "bert": str(tiny_bert_folder)}
    return build(replace(recipe, bridge=bridge))


def asked(assembled: Assembled, question: str, picture: Image.Image, answer: str = "A cat.") -> float:
    batch = make_batch(assembled, [Example([ask(question, answer, picture)])])
    return float(language_loss(assembled.model, batch)[0])


def test_what_is_asked_reaches_the_bridge_and_texts_about_a_picture_share_it_only_if_they_ask_the_same(
    instructed: Assembled, pictures: list[Image.Image]
) -> None:
    questions = ["What is it?", "Name it.", "What is it?"]
    example = Example([ask(q, f"Answer {i}.", pictures[0]) for i, q in enumerate(questions)])
    (row,) = rows_of(example, instructed.template)
    assert row.asked == questions
    assert len(row.images) == 3
    same = Example([ask("What is it?", f"Answer {i}.", pictures[0]) for i in range(3)])
    (row,) = rows_of(same, instructed.template)
    assert row.asked == ["What is it?"]
    together = float(language_loss(instructed.model, make_batch(instructed, [example]))[0])
    alone = sum(asked(instructed, q, pictures[0], f"Answer {i}.") for i, q in enumerate(questions))
    assert together == pytest.approx(alone, abs=1e-3)


def test_another_question_makes_other_slots(instructed: Assembled, pictures: list[Image.Image]) -> None:
    model = instructed.model
    batch = make_batch(instructed, [Example([ask("What is it?", "A cat.", pictures[0])])])
    one = float(language_loss(model, batch)[0])
    batch.asked = ["How many birds are there?"]
    assert float(language_loss(model, batch)[0]) != pytest.approx(one, abs=1e-6)


def test_it_answers_many_as_one_and_in_chat_as_alone(instructed: Assembled, pictures: list[Image.Image]) -> None:
    prompts = [
        [Turn("user", [picture, q])] for picture, q in zip(pictures, ("What?", "Name it.", "Is it?"), strict=True)
    ]
    together = answers(instructed, prompts, max_new_tokens=6)
    assert together == [answers(instructed, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    cat = instructed.model.language.tokenizer("A cat.", add_special_tokens=False)["input_ids"]
    cat.append(instructed.model.language.tokenizer.eos_token_id)
    first: list[torch.Tensor] = []

    def say_cat(logits: torch.Tensor) -> torch.Tensor:
        first.append(logits)
        return torch.tensor([cat[(len(first) - 1) % len(cat)]])

    session = Session(instructed)
    turns: list[Turn] = []
    for prompt in prompts[:2]:
        session.append(prompt[0])
        turns.append(prompt[0])
        first.clear()
        assert "".join(session.stream(len(cat), say_cat)) == "A cat."
        in_chat = first[0]
        first.clear()
        answers(instructed, [turns], max_new_tokens=len(cat), choose=say_cat)
        torch.testing.assert_close(in_chat, first[0], atol=1e-4, rtol=1e-4)
        turns.append(Turn("assistant", ["A cat."]))


def test_an_instructed_one_trains_saves_and_loads(instructed: Assembled, pictures: list[Image.Image]) -> None:
    model = instructed.model.train()
    batch = make_batch(instructed, [Example([ask("What is it?", "A cat.", pictures[0])])])
    language_loss(model, batch)[0].backward()
    for name, parameter in model.bridge.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    folder = Path(instructed.recipe.output)
    save_checkpoint(folder, instructed)
    again = load(folder)
    model.eval()
    assert torch.equal(language_loss(model, batch)[0], language_loss(again.model, batch)[0])
    empty = collate(rows_of(Example([ask("No picture.", "None.", pictures[0])]), instructed.template))
    assert empty.asked == ["No picture."]


def test_a_recipe_of_the_first_stage_survives_its_yaml(first: Recipe) -> None:
    given = {"output": "x", "bridge": first.bridge, "objectives": {"sigmoid": 2, "captioning": 0.5}}
    assert recipe_from(given).objectives == {"sigmoid": 2.0, "captioning": 0.5}


def test_two_processes_train_the_first_stage_as_one_does(first: Recipe, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "output": str(tmp_path / "one"),
        "vision": vars(first.vision),
        "bridge": {**first.bridge, "dropout": 0.0},
        "objectives": first.objectives,
        "data": {"source": first.data.source},
        "train": {"steps": 3, "batch": 6, "lr": 1e-3, "log_every": 1, "evaluate_size": 2},
    }
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(given))
    train(read_recipe(tmp_path / "first.yaml"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "bridges.cli",
    ]
    command += ["train", str(tmp_path / "first.yaml"), f"--output={tmp_path / 'two'}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    one, two = ([row["loss"] for row in rows(str(tmp_path / n)) if "loss" in row] for n in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
