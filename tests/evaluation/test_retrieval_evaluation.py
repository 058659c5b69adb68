"""Recall with ties against us, and a checkpoint of the first stage measured from end to end."""

import json
from itertools import permutations
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import captioned, randomise
from rich.console import Console
from torch import Tensor

from bridges.build import Paired, build_pairs
from bridges.checkpoint import load_pairs, save_checkpoint
from bridges.data.sources import open_split
from bridges.evaluation import pairs as measured
from bridges.evaluation.pairs import compare, hold_out, measure_pairs
from bridges.evaluation.retrieval import Asked, Compared, chance, costs, matching_accuracy, ranks, recalls
from bridges.evaluation.run import evaluate
from bridges.inference.retrieval import Retriever
from bridges.objectives.captioning import captioning_loss
from bridges.objectives.controls import controlled
from bridges.objectives.pairs import pair_batch
from bridges.recipe import recipe_from

WORDS = ("cat", "dog", "bird", "house", "car", "tree", "red", "blue")
RECALLS = {f"recall@{k}/{way}" for k in (1, 5, 10) for way in ("image_to_text", "text_to_image")}


def single(count: int) -> Tensor:
    """One right candidate of each query, the one of its own number."""
    return ~torch.eye(count).bool()


def compared_of(cosines: Tensor, odds: Tensor | None = None, wrong: Tensor | None = None) -> Compared:
    count = len(cosines)
    own = torch.arange(count).repeat(3, 1)
    asked = Asked(own, own, torch.ones(3, count).bool())
    odds = torch.zeros(count, count) if odds is None else odds
    wrong = single(count) if wrong is None else wrong
    return Compared(cosines.double(), odds.double(), wrong, asked, 10, 2.0, 0.5, 0.1)


def test_ties_count_against_us() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.9, 0.9], [0.1, 0.2, 0.3], [torch.nan] * 3])
    wrong = torch.tensor([[False, True, True], [True, True, False], [True, True, False], [True, True, False]])
    assert ranks(scores.double(), wrong).tolist() == [2, 2, 1, 3]
    same = recalls(compared_of(torch.full((8, 8), 0.3)), matched=True)
    assert same["recall@5/image_to_text"]["image"] == same["recall@5/text_to_image"]["reranked"] == 0
    assert same["recall@10/text_to_image"]["image"] == 1  # there are only 8


def test_an_equal_caption_is_as_right_as_the_own() -> None:
    wrong = torch.tensor([[False, False, True], [False, False, True], [True, True, False]])
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.7, 0.6, 0.5]]).double()
    assert ranks(scores, wrong).tolist() == [1, 1, 3]


def test_both_directions_are_measured_and_not_taken_for_each_other() -> None:
    cosines = torch.tensor([[0.5, 0.9, 0.0], [0.1, 0.95, 0.2], [0.1, 0.2, 0.3]])
    table = recalls(compared_of(cosines), matched=False)
    assert set(table) == RECALLS
    assert table["recall@1/image_to_text"]["image"] == pytest.approx(2 / 3)  # picture 0 finds text 1
    assert table["recall@1/text_to_image"]["image"] == 1
    assert table["recall@1/image_to_text"]["reranked"] is None
    assert table["recall@1/image_to_text"]["n"] == 3
    assert table["recall@1/image_to_text"]["low"] < 2 / 3 < table["recall@1/image_to_text"]["high"]


def test_reranking_is_told_from_the_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    from bridges.evaluation import retrieval

    cosines = torch.tensor([[0.5, 0.9, 0.0], [0.1, 0.95, 0.2], [0.9, 0.8, 0.3]])
    odds = torch.eye(3) * 20
    table = recalls(compared_of(cosines, odds), matched=True)
    assert table["recall@1/image_to_text"]["image"] == pytest.approx(1 / 3)
    assert table["recall@1/image_to_text"]["reranked"] == 1
    monkeypatch.setattr(retrieval, "RERANK", 2)  # the third picture's text is not among the two nearest
    table = recalls(compared_of(cosines, odds), matched=True)
    assert table["recall@1/image_to_text"]["reranked"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_chance_is_the_mean_over_every_order(k: int) -> None:
    wrong = torch.tensor([[False, True, True, True], [False, False, True, True], [True, False, False, False]])
    expected = np.mean([any(not row[c] for c in order[:k]) for row in wrong for order in permutations(range(4))])
    assert chance(wrong, k) == pytest.approx(float(expected))
    assert chance(single(7), k) == pytest.approx(k / 7)


def test_matching_accuracy_asks_a_pair_and_its_hard_negatives() -> None:
    odds = torch.tensor([[1.0, -1.0, torch.nan], [2.0, -3.0, 0.0], [torch.nan, torch.nan, 4.0]])
    pictures, texts = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 0, 1]]), torch.tensor([[0, 1, 2], [1, 0, 0], [0, 1, 2]])
    counts = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    compared = Compared(odds.double(), odds.double(), single(3), Asked(pictures, texts, counts), 8, 1.0, 1.0, 0.1)
    found = matching_accuracy(compared)
    # right: pairs 0 and 2, not 1; of the texts the first; of the pictures the second; the third is a tie
    assert (found["image"], found["n"]) == (4 / 8, 8)
    assert found["majority"] == pytest.approx(5 / 8)


def test_the_cost_is_that_of_a_query() -> None:
    found = costs(compared_of(torch.zeros(20, 20)))
    assert found["cost/pairs"] == {"image": 20, "reranked": 16, "n": 40}
    assert found["cost/seconds"]["image"] == pytest.approx(0.5 / 40)
    assert found["cost/seconds"]["reranked"] == pytest.approx(0.5 / 40 + 16 * 2.0 / 10)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of noise with captions, of which two are equal."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return captioned(tmp_path / "mine", [f"A {'cat' if i == 1 else word}." for i, word in enumerate(WORDS)])


def trained(clip: Path, bert: Path, data: Path, output: Path, *objectives: str) -> Path:
    sizes = {"queries": 3, "layers": 2, "width": 32, "heads": 4}
    recipe = recipe_from(
        {
            "output": str(output),
            "vision": {"name": str(clip)},
            "bridge": {"name": "qformer", "reads": "pairs", "words": str(bert), **sizes},
            "objectives": dict.fromkeys(objectives, 1.0),
            "data": {"source": str(data), "validation": str(data)},
        }
    )
    paired = build_pairs(recipe)
    randomise(paired.model.bridge)
    save_checkpoint(output, paired)
    return output


@pytest.fixture
def checkpoint(tiny_clip: Path, tiny_bert_folder: Path, data: Path, tmp_path: Path) -> Path:
    return trained(tiny_clip, tiny_bert_folder, data, tmp_path / "pairs", "contrastive", "matching", "captioning")


def test_a_first_stage_is_measured_by_what_it_finds(checkpoint: Path) -> None:
    (checkpoint / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 3.0, "seconds": 2}) + "\n")
    table = evaluate(checkpoint, ["val"], size=8)
    assert json.loads((checkpoint / "evaluation.json").read_text()) == table
    assert set(table["val"]) == RECALLS | {"matching_accuracy", "caption_nll", "cost/seconds", "cost/pairs"}
    for name in RECALLS:
        assert set(table["val"][name]) == {"image", "reranked", "chance", "low", "high", "n"}
    # two captions are equal, so of 8 queries 2 have two right answers
    assert table["val"]["recall@1/image_to_text"]["chance"] == pytest.approx((6 * 1 / 8 + 2 * 2 / 8) / 8)
    assert table["val"]["matching_accuracy"]["n"] == 24
    assert table["val"]["matching_accuracy"]["majority"] == pytest.approx(2 / 3)
    page = (checkpoint / "report.html").read_text()
    for told in ("R@5 text to image ↑", "Found, reranked by matching", "A house.", "loss a pair", "Seconds a"):
        assert told in page
    assert page.count("<img") == 8
    assert "Language tower" not in page


def test_what_was_not_trained_is_not_measured(
    tiny_clip: Path, tiny_bert_folder: Path, data: Path, tmp_path: Path
) -> None:
    folder = trained(tiny_clip, tiny_bert_folder, data, tmp_path / "sigmoid", "sigmoid")
    table = evaluate(folder, size=8)["val"]
    assert set(table) == RECALLS | {"cost/seconds", "cost/pairs"}
    assert table["recall@1/image_to_text"]["reranked"] is None
    folder = trained(tiny_clip, tiny_bert_folder, data, tmp_path / "rest", "matching", "captioning")
    assert set(evaluate(folder, size=8)["val"]) == {"matching_accuracy", "caption_nll"}


def test_the_caption_is_written_as_training_measures_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paired = load_pairs(checkpoint)
    rows = open_split(paired.recipe.data, "val")
    batch = pair_batch(paired.model, [rows[i] for i in range(8)])
    bridge = Retriever(paired).bridge
    with torch.no_grad():
        features = paired.model.vision(batch.pixel_values)
        expected = {}
        for control in ("image", "shuffled", "blank"):
            _, kept = bridge.run(bridge.look(controlled(features, paired.model.vision, control)))
            nats, tokens = captioning_loss(bridge, kept, batch.ids, batch.real, 0.0)
            expected[control] = float(nats) / tokens
    found, _ = measure_pairs(paired, "val", 8, Console(quiet=True))
    for control, nll in expected.items():
        assert found["caption_nll"][control] == pytest.approx(nll, rel=1e-5)
    monkeypatch.setattr(measured, "AT_ONCE", 4)
    found, _ = measure_pairs(paired, "val", 8, Console(quiet=True))
    assert found["caption_nll"]["image"] == pytest.approx(expected["image"], rel=1e-5)
    assert found["caption_nll"]["shuffled"] != pytest.approx(expected["shuffled"], rel=1e-5)


@pytest.mark.parametrize("size", [4, 5, 8])
def test_batches_leave_nobody_out_and_nobody_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(measured, "AT_ONCE", 4)
    paired: Paired = load_pairs(checkpoint)
    held = hold_out(paired, Retriever(paired), "val", size, Console(quiet=True))
    assert held.texts == [f"A {'cat' if i == 1 else word}." for i, word in enumerate(WORDS)][:size]
    assert [len(features) for features in held.features] == {4: [4], 5: [5], 8: [4, 4]}[size]


def test_hard_negatives_are_asked_and_are_no_right_answers(checkpoint: Path) -> None:
    paired = load_pairs(checkpoint)
    retriever = Retriever(paired)
    held = hold_out(paired, retriever, "val", 8, Console(quiet=True))
    found = compare(retriever, held)
    assert (found.wrong == found.wrong.T).all()
    assert (~found.wrong).nonzero().tolist() == sorted([[i, i] for i in range(8)] + [[0, 1], [1, 0]])
    asked = found.asked
    assert asked.counts.all()
    assert not found.wrong[asked.pictures[0], asked.texts[0]].any()
    assert found.wrong[asked.pictures[1:], asked.texts[1:]].all()
    assert asked.pictures[1].tolist() == asked.texts[2].tolist() == list(range(8))
    everything = retriever.log_odds(
        retriever.pictures(torch.cat(held.features)), retriever.texts(held.texts), torch.ones(8, 8).bool()
    )
    torch.testing.assert_close(
        found.odds[asked.pictures, asked.texts], everything[asked.pictures, asked.texts], atol=1e-4, rtol=0
    )


def test_one_pair_is_too_few(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 are needed"):
        evaluate(checkpoint, size=1)
