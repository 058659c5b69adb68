"""What is asked of a model, under which controls, and what the table makes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import captioned
from PIL import Image

from bridges.build import Assembled
from bridges.data.conversation import Example, ask
from bridges.evaluation.run import evaluate
from bridges.evaluation.tasks import Said, listen, tabulate
from bridges.objectives.controls import CONTROLS, controlled


def seen_by(assembled: Assembled, pictures: list[Image.Image]) -> torch.Tensor:
    vision = assembled.model.vision
    return vision(vision.preprocess(pictures))


def test_shuffled_is_another_picture_and_blank_is_none_of_them(
    assembled: Assembled, pictures: list[Image.Image]
) -> None:
    right = seen_by(assembled, pictures)
    shuffled = controlled(right, assembled.model.vision, "shuffled")
    blank = controlled(right, assembled.model.vision, "blank")
    assert controlled(right, assembled.model.vision, "image") is right
    assert all(not torch.equal(a, b) for a, b in zip(shuffled, right, strict=True))
    assert sorted(t.sum().item() for t in shuffled) == pytest.approx(sorted(t.sum().item() for t in right))
    assert torch.equal(blank[0], blank[1])
    assert all(not torch.equal(blank[0], t) for t in right)


def test_everything_is_asked_under_every_control(assembled: Assembled, pictures: list[Image.Image]) -> None:
    examples = [
        Example(
            [
                ask("Describe the image.", "A cat.", picture, "caption"),
                ask("Describe the image.", "The cat sits.", picture, "caption"),
                ask("Is it a cat?", "Yes.", picture, "existence"),
                ask("How many?", "One.", picture, "count"),
            ],
            frozenset({"cat"}),
        )
        for picture in pictures
    ]
    said = listen(assembled, examples)
    assert [one.references for one in said] == [["A cat.", "The cat sits."]] * 3
    for control in CONTROLS:
        assert all(len(one.answers[control]) == 2 and isinstance(one.captions[control], str) for one in said)
        assert all(np.isfinite(one.nll[control][0]) and one.nll[control][1] > 4 for one in said)
    # the picture reaches the language model: other pictures, other likelihoods
    assert all(one.nll["image"] != one.nll["shuffled"] for one in said)
    # a shuffled picture is the neighbour's: the first example's likelihood with the last one's picture
    alone = listen(assembled, [Example(examples[0].conversations), examples[2]])
    assert alone[0].nll["shuffled"] == pytest.approx(said[0].nll["shuffled"], rel=1e-4)


def spoken(name: str, right: str, wrong: str) -> Said:
    example = Example(
        [
            ask("Describe.", f"A {name}.", Image.new("RGB", (4, 4)), "caption"),
            ask("A cat?", "Yes.", Image.new("RGB", (4, 4)), "existence"),
        ],
        frozenset({name}),
    )
    return Said(
        example,
        nll={"image": (2.0, 2), "shuffled": (6.0, 2), "blank": (4.0, 2)},
        captions={"image": f"A {right}.", "shuffled": f"A {wrong}.", "blank": "Nothing."},
        answers={"image": ["yes"], "shuffled": ["No."], "blank": ["No."]},
    )


def test_the_table_has_every_metric_with_its_baselines() -> None:
    said = [
        spoken("cat", "cat", "dog"),
        spoken("dog", "dog", "cat"),
        spoken("bird", "cat", "dog"),
        spoken("cat", "cat", "bird"),
    ]
    table = tabulate(said, lambda text: frozenset(w.strip(".") for w in text.split()) & {"cat", "dog", "bird"})
    assert set(table) == {"caption_nll", "cider", "bleu4", "naming_f1", "answer_accuracy", "answer_accuracy/existence"}
    for figures in table.values():
        assert set(figures) == {"image", "shuffled", "blank", "majority", "low", "high", "n"}
        assert figures["low"] <= figures["image"] <= figures["high"]
        assert figures["n"] == 4
    assert (table["caption_nll"]["image"], table["caption_nll"]["shuffled"], table["caption_nll"]["majority"]) == (
        1,
        3,
        None,
    )
    assert table["naming_f1"]["image"] == 0.75
    assert table["naming_f1"]["shuffled"] == 0
    assert table["naming_f1"]["majority"] == 0.5  # "A cat." is right twice of four
    assert table["answer_accuracy"]["image"] == 1
    assert table["answer_accuracy/existence"]["blank"] == 0
    assert table["answer_accuracy/existence"]["majority"] == 1


@pytest.fixture
def on_captions(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, its recipe pointed at a folder of a user's own pictures."""
    folder = captioned(tmp_path / "mine", ["A cat."] * 40)
    config = (tiny_checkpoint / "config.yaml").read_text().replace("source: scenes", f"source: {folder}")
    (tiny_checkpoint / "config.yaml").write_text(config)
    return tiny_checkpoint


def test_a_checkpoint_is_measured_and_reported(on_captions: Path) -> None:
    table = evaluate(on_captions, ["val"], size=8)
    assert json.loads((on_captions / "evaluation.json").read_text()) == table
    assert set(table["val"]) == {"caption_nll", "cider", "bleu4"}
    page = (on_captions / "report.html").read_text()
    assert "data:image" in page
    assert "OpenMoji" not in page


def test_other_data_are_measured_beside_its_own(on_captions: Path) -> None:
    first = evaluate(on_captions, ["val"], size=8)
    table = evaluate(on_captions, ["val"], size=4, data="scenes:documents")
    assert set(table) == {"val", "val of scenes:documents"}
    assert table["val"] == first["val"]
    assert {"answer_accuracy", "answer_accuracy/which", "caption_nll"} <= set(table["val of scenes:documents"])


def test_an_unknown_split_is_refused(on_captions: Path) -> None:
    with pytest.raises(ValueError, match="no split 'tset'"):
        evaluate(on_captions, ["tset"])


@pytest.mark.parametrize("pictured", [0, 3])
def test_of_texts_without_a_picture_the_likelihood_is_measured_and_that_is_said(
    on_captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictured: int
) -> None:
    said = {"role": "assistant", "content": "A cat."}
    shown = [{"type": "image", "path": str(tmp_path / "mine/0.png")}, {"type": "text", "text": "What?"}]
    rows = [{"messages": [{"role": "user", "content": asked}, said]} for asked in [shown] * pictured + ["Hello?"] * 4]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = on_captions / "config.yaml"
    read = yaml.safe_load(config.read_text())
    read["data"] |= {"source": str(tmp_path / "chats.jsonl"), "validation": str(tmp_path / "val.jsonl")}
    config.write_text(yaml.safe_dump(read))
    table = evaluate(on_captions)["val"]
    assert (table.keys() - {"text_nll"} == {"caption_nll"}) == bool(pictured)
    texts = table["text_nll"]
    assert texts["n"] == 4
    assert texts["image"] > 0
    assert texts["shuffled"] is texts["blank"] is None
    told = " ".join(capsys.readouterr().out.split())
    assert f"4 of {4 + pictured} examples have no picture: nothing but the likelihood of their answers" in told
    page = (on_captions / "report.html").read_text()
    assert page.count("<figcaption>") == pictured
