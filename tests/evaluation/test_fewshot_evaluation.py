"""Few-shot figures of small checkpoints: what is asked, of what, and what is written down."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from bridges.benchmark.ours import open_gates
from bridges.build import Assembled, build
from bridges.checkpoint import save_checkpoint
from bridges.cli import main
from bridges.config import Data, Recipe
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.evaluation.fewshot import fewshot, numbers
from bridges.evaluation.fewshot_bench import Bench, Plan
from bridges.evaluation.fewshot_report import plot, summary, table_text
from bridges.evaluation.fewshot_tasks import TEMPLATES, Items, data_of, labels_of, measure, read_form
from bridges.inference.fewshot import FewShot

GATED: dict[str, Any] = dict(name="flamingo", latents=5, depth=1, heads=2, head_dim=8, inner=24)
WORDS = ("cat", "dog", "house")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures of one colour each, and a word that goes with it."""
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "rows.csv").open("w", newline="") as file:
        told = csv.writer(file)
        told.writerow(["image", "caption"])
        for place in range(60):
            shade = [20, 20, 20]
            shade[place % 3] = 100 + 2 * place
            Image.new("RGB", (32, 32), tuple(shade)).save(folder / f"{place}.png")
            told.writerow([f"{place}.png", WORDS[place % 3]])
    return folder / "rows.csv"


@pytest.fixture
def checkpoint(assembled: Assembled, rows: Path, tmp_path: Path) -> Path:
    assembled.recipe.data = Data(source=str(rows))
    save_checkpoint(tmp_path, assembled)
    return tmp_path


def bench(assembled: Assembled, rows: Path, **options: Any) -> Bench:
    settings: dict[str, Any] = dict(task="classify", shots=(0, 2), queries=3, seeds=2, pool=20)
    plan = Plan(**{**settings, **options})
    return Bench(assembled, str(rows), plan, read_form(plan.task), Console(quiet=True))


def test_a_template_parts_a_demonstration_into_what_is_given_and_what_is_said(pictures: list[Image.Image]) -> None:
    form = read_form("vqa")
    picture = pictures[0]
    assert form.query(picture, "How {many}?") == [picture, "Question: How {many}? Answer:"]
    assert form.demonstration(picture, "Who?", "A cat.") == [picture, "Question: Who? Answer:", " A cat.\n"]
    assert form.stop == ["\n"]
    own = read_form("caption", r"See {image}: {caption} {{end}}\n\n")
    assert own.demonstration(picture, "", "cat") == ["See ", picture, ":", " cat {end}\n\n"]
    assert own.stop == ["{end}\n\n"]
    assert read_form("caption", "{image}{caption}").stop == []


def test_templates_may_stand_in_a_file(tmp_path: Path, pictures: list[Image.Image]) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text('caption: "{image}A {caption}.\\n"')
    assert read_form("caption", str(path)).demonstration(pictures[0], "", "cat") == [pictures[0], "A", " cat.\n"]
    with pytest.raises(ValueError, match="has no text for vqa"):
        read_form("vqa", str(path))
    with pytest.raises(ValueError, match=r"cannot read templates from .*none.yaml"):
        read_form("vqa", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    "template",
    ["Output: {caption}", "{image}Output:", "{image}{image}{caption}", "{caption}{image}", "{image}{capton}", "{image"],
)
def test_a_template_that_lacks_something_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template"):
        read_form("caption", template)


def examples(pictures: list[Image.Image]) -> list[Example]:
    first = [ask("Describe it.", text, pictures[0], "caption") for text in ("A cat.", "The cat.")]
    asked = [ask("Is it?", "Yes.", pictures[0], "existence"), ask("How many?", "One.", pictures[0], "count")]
    two = Conversation([Turn("user", [*pictures[:2], "Which?"]), Turn("assistant", ["The first."])], "count")
    page = Conversation([Turn("user", [pictures[2]]), Turn("assistant", ["A house."])], "document")
    return [Example([two]), Example([*first, *asked], frozenset({"cat"})), Example([page])]


def test_a_task_takes_the_conversations_about_one_picture_that_suit_it(pictures: list[Image.Image]) -> None:
    data = examples(pictures)
    captions = Items(data, range(3), 9, "caption")
    assert [item.references for item in captions.items] == [("A cat.", "The cat."), ("A house.",)]
    assert captions.picture(1) is pictures[2]
    assert [item.answer for item in Items(data, range(3), 9, "vqa", "count").items] == ["One."]
    assert [item.question for item in Items(data, range(3), 9, "vqa", "existence").items] == ["Is it?"]
    assert [item.row for item in Items(data, (2, 1, 0), 1, "caption").items] == [2]


def test_labels_are_the_answers_of_one_kind_of_question(pictures: list[Image.Image]) -> None:
    form, data = read_form("classify"), examples(pictures)
    items = Items(data, range(3), 9, "classify").items
    assert {item.kind for item in items} > {"document"}
    with pytest.raises(ValueError, match=r"several kinds of question.*document"):
        labels_of(items, form)
    assert len(labels_of(items, read_form("vqa"))) == 2
    with pytest.raises(ValueError, match="1 different answers are no classes"):
        labels_of(items[:1], form)


def test_scores_are_those_of_the_metrics(pictures: list[Image.Image]) -> None:
    items = Items(examples(pictures), range(3), 9, "caption").items
    right = measure("caption", ["A cat.", "A house."], items, lambda text: frozenset())
    wrong = measure("caption", ["A house.", "A cat."], items, lambda text: frozenset())
    assert right["cider"] > 1 > wrong["cider"] == 0
    assert "naming_f1" not in right, "one of them has no names"
    named = measure("caption", ["A cat.", "x"], items[:1] * 2, lambda text: frozenset(w for w in WORDS if w in text))
    assert named["naming_f1"] == pytest.approx(2 / 3)
    assert measure("vqa", ["a cat", "dog"], items, lambda text: frozenset()) == {"accuracy": 0.5}


def test_of_scenes_every_kind_of_question_is_asked_and_documents_are_taken_apart() -> None:
    own = Data(source="scenes:documents", questions=0.3, prefix=True)
    found = data_of(own, None)
    assert (found.source, found.questions, found.prefix) == ("scenes", 5, False)
    assert data_of(own, "a.csv") == Data(source="a.csv")


@pytest.mark.parametrize("bridge", [{"name": "projector"}, GATED], ids=["projector", "flamingo"])
@pytest.mark.parametrize("choose", ["fixed", "random", "nearest"])
def test_every_choice_answers_every_query_as_a_prompt_read_alone(
    recipe: Recipe, rows: Path, choose: Any, bridge: dict[str, Any]
) -> None:
    recipe.bridge = bridge
    assembled = build(recipe)
    open_gates(assembled.model.bridge, 0.8)
    one = bench(assembled, rows, choose=choose, seeds=1)
    asked: list[int] = []
    for shots in (0, 2):
        places = one.places(shots, 0)
        assert [len(some) for some in places] == [2, 2, 2], "two without pictures stand for none"
        found = one.trial(shots, 0, asked.append)
        for shift, control in enumerate(("image", "shuffled")):
            prompts = [
                [part for shot in one.told(places[i], shots) for part in shot] + list(one.query(i, (i + shift) % 3))
                for i in range(3)
            ]
            said = [one.answers(FewShot(assembled), [prompt]) for prompt in prompts]
            expected = one.measured({way: [s[way][0] for s in said] for way in said[0]})
            assert found[control] == pytest.approx(expected)
    assert one.trials(2) == 1
    assert sum(asked) == 2 * 2 * 3


def test_no_shots_show_no_picture_but_the_query(assembled: Assembled, rows: Path) -> None:
    one = bench(assembled, rows)
    one.trial(0, 0, lambda _: None)
    assert one.features.encoded == 3
    one.trial(2, 0, lambda _: None)
    one.trial(2, 0, lambda _: None)
    assert one.features.encoded == 5, "every picture is encoded once in the whole run"


def test_a_right_answer_counts_and_the_majority_is_told(assembled: Assembled, rows: Path) -> None:
    one = bench(assembled, rows)
    truth = [item.answer for item in one.asked.items]
    assert one.measured({"": truth, "_mean": ["x"] * 3}) == {"accuracy": 1.0, "accuracy_mean": 0.0}
    with Progress(console=Console(quiet=True)) as progress:
        result = one.run(progress)
    assert result["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert result["labels"] == 3
    for figures in result["figures"].values():
        for row in (figures["image"], figures["shuffled"]):
            assert len(row["accuracy"]["trials"]) == 2
            assert row["accuracy"]["mean"] == pytest.approx(sum(row["accuracy"]["trials"]) / 2)


def test_the_spread_is_over_trials() -> None:
    assert summary([{"a": 1.0}, {"a": 3.0}])["a"] == {
        "mean": 2.0,
        "spread": pytest.approx(2**0.5),
        "trials": [1.0, 3.0],
    }
    assert summary([{"a": 1.0}])["a"]["spread"] is None


def test_the_command_writes_figures_and_a_plot_and_keeps_those_of_before(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--queries", "2", "--seeds", "2", "--pool", "9", "--shots", "0,3"]
    main(["fewshot", str(checkpoint), *few])
    main(["fewshot", str(checkpoint), "--task", "classify", "--choose", "nearest", *few])
    table = json.loads((checkpoint / "fewshot.json").read_text())
    assert set(table) == {"caption fixed", "classify nearest"}
    assert set(table["caption fixed"]["figures"]) == {"0", "3"}
    assert len(table["classify nearest"]["figures"]["3"]["image"]["accuracy"]["trials"]) == 1
    for name in ("caption_fixed", "classify_nearest"):
        assert (checkpoint / f"fewshot_{name}.svg").read_text().rstrip().endswith("</svg>")
    assert "shuffled" in capsys.readouterr().out
    Console(quiet=True).print(table_text(table["caption fixed"]))
    assert "demonstrations" in plot(table["caption fixed"])


def test_binding_is_measured_against_chance(assembled: Assembled, tmp_path: Path) -> None:
    assembled.recipe.data.source = "scenes"
    save_checkpoint(tmp_path, assembled)
    result = fewshot(tmp_path, task="binding", shots="1,2", queries=4)
    assert set(result["figures"]) == {"1", "2"}
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in result["figures"].values())
    assert json.loads((tmp_path / "fewshot.json").read_text())["binding"]["chance"] == 0.5
    with pytest.raises(ValueError, match="--data has no meaning for binding"):
        fewshot(tmp_path, task="binding", data="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(shots="0,x"), "--shots 0,x: give numbers"),
        (dict(shots="-1"), "--shots -1"),
        (dict(queries=1), "--queries 1: give at least 2"),
        (dict(task="vqa"), "0 demonstrations and 0 queries for vqa"),
        (dict(shots="30", pool=20), "30 demonstrations from a pool of 20"),
        (dict(shots="30", pool=40), r"30 demonstrations of \d+ tokens.*of them fit"),
    ],
)
def test_what_cannot_be_measured_is_one_line(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fewshot(checkpoint, **options)


def test_numbers_of_shots_come_in_order_and_once() -> None:
    assert numbers("16,0,4,4") == (0, 4, 16)
    assert set(TEMPLATES) == {"caption", "vqa", "classify"}
