"""Retrieval: beside scoring every pair alone, from kept features as from fresh ones, and at the command line."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from PIL import Image
from torch import Tensor

from bridges.benchmark.retrieve import retrieve
from bridges.build import Paired, build_pairs
from bridges.checkpoint import save_checkpoint
from bridges.cli import main
from bridges.data.pictures import open_picture
from bridges.inference.folder import Folder
from bridges.inference.retrieval import Ranking, Retriever
from bridges.layers import writing
from bridges.objectives.captioning import write_logits
from bridges.objectives.contrastive import embed_images, embed_texts
from bridges.recipe import recipe_from
from bridges.towers.vision import VisionTower

K = 3  # queries
TEXTS = ["A cat.", "There is a cat on the left of the red house, and a dog that looks at it.", "Two small birds", "no"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))


def paired_with(clip: Path, bert: Path, output: Path, *objectives: str) -> Paired:
    sizes: dict[str, Any] = {"queries": K, "layers": 2, "width": 32, "heads": 4}
    recipe = recipe_from(
        {
            "output": str(output),
            "vision": {"name": str(clip)},
            "bridge": {"name": "qformer", "reads": "pairs", "words": str(bert), **sizes},
            "objectives": dict.fromkeys(objectives, 1.0),
        }
    )
    paired = build_pairs(recipe)
    randomise(paired.model.bridge)
    return paired


@pytest.fixture
def paired(tiny_clip: Path, tiny_bert_folder: Path, tmp_path: Path) -> Paired:
    return paired_with(tiny_clip, tiny_bert_folder, tmp_path / "pairs", "contrastive", "matching", "captioning")


@pytest.fixture
def checkpoint(paired: Paired) -> Path:
    folder = Path(paired.recipe.output)
    save_checkpoint(folder, paired)
    return folder


@pytest.fixture
def folder(pictures: list[Image.Image], tmp_path: Path) -> Path:
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    for name, picture in zip(("b.png", "a.PNG", "deeper/c.png"), pictures, strict=True):
        picture.save(tmp_path / "mine" / name)
    (tmp_path / "mine" / "notes.txt").write_text("no picture")
    return tmp_path / "mine"


def test_the_benchmark_looks_at_kept_pictures_once_and_at_unknown_ones_for_every_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looked: list[int] = []
    look = VisionTower.forward
    monkeypatch.setattr(VisionTower, "forward", lambda self, x: looked.append(len(x)) or look(self, x))
    found = retrieve(str(checkpoint), rounds=3, queries=2, pictures=5)
    assert sum(looked) == 5 + (1 + 3) * 2 * 5
    assert found["kept"]["times"] == 1 < found["anew"]["times"]
    assert "(by chance 0.200)" in capsys.readouterr().out
    for wrong in (dict(rounds=2), dict(queries=6), dict(queries=0)):
        with pytest.raises(ValueError, match=r"rounds|queries"):
            retrieve(str(checkpoint), **{"pictures": 5, **wrong})


def test_rankings_that_differ_are_not_timed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    see, seen = Retriever.see, []
    monkeypatch.setattr(  # the first time, whose result is kept, in another order
        Retriever, "see", lambda self, some: see(self, some if seen else seen.append(1) or list(reversed(some)))
    )
    with pytest.raises(ValueError, match="the rankings differ: anew"):
        retrieve(str(checkpoint), queries=2, pictures=5)


def broken_in(folder: Path) -> None:
    (folder / "torn.png").write_bytes((folder / "b.png").read_bytes()[:200])


@torch.no_grad()
def naive(paired: Paired, pictures: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """Cosines and log-odds of a match, every pair alone and without a mask: nothing is padding."""
    bridge: Any = paired.model.bridge
    features = paired.model.vision(paired.model.vision.preprocess(pictures)).float()
    cosines, odds = torch.zeros(len(pictures), len(TEXTS)), torch.zeros(len(pictures), len(TEXTS))
    for i in range(len(pictures)):
        memory = bridge.look(features[i : i + 1])
        seen = embed_images(bridge.heads, bridge.run(memory)[0])[0]
        for t, text in enumerate(TEXTS):
            ids, _ = bridge.words([text])
            read = embed_texts(bridge.heads, bridge.run(None, ids)[0][:, 0])[0]
            cosines[i, t] = (seen @ read).max()
            logits = bridge.heads.match(bridge.run(memory, ids)[0][0, :K]).mean(0)
            odds[i, t] = logits[1] - logits[0]
    return cosines.double(), odds.double()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_reranking_everything_is_scoring_every_pair_alone(
    paired: Paired, pictures: list[Image.Image], batch: int
) -> None:
    cosines, odds = naive(paired, pictures)
    scores = cosines / paired.model.bridge.heads.temperature.item() + odds / 2
    retriever = Retriever(paired, batch)
    seen, read = retriever.see(pictures), retriever.texts(TEXTS)
    for found, turned in (
        (retriever.find_texts(seen, read, k=99), lambda x: x),
        (retriever.find_pictures(seen, read, k=99), lambda x: x.T),
    ):
        close(found.cosines, turned(cosines))
        close(found.scores, turned(scores))
        close(found.probability, turned(odds.sigmoid()))
        for query, own in enumerate(turned(scores)):
            assert found.best(query, 2) == own.argsort(descending=True)[:2].tolist()


def test_what_is_not_among_the_nearest_lies_below_them_in_the_order_of_its_cosine(
    paired: Paired, pictures: list[Image.Image]
) -> None:
    cosines, odds = naive(paired, pictures)
    scores = cosines / paired.model.bridge.heads.temperature.item() + odds / 2
    retriever = Retriever(paired)
    seen, read = retriever.see(pictures), retriever.texts(TEXTS)
    checks: list[tuple[Ranking, Callable[[Tensor], Tensor]]] = [
        (retriever.find_texts(seen, read, k=2), lambda x: x),
        (retriever.find_pictures(seen, read, k=2), lambda x: x.T),
    ]
    for found, turned in checks:
        for query, own in enumerate(turned(cosines)):
            near = own.argsort(descending=True).tolist()
            first = sorted(near[:2], key=lambda c: -float(turned(scores)[query, c]))
            assert found.best(query, 99) == first + near[2:]
            assert found.probability[query].isnan().tolist() == [c not in near[:2] for c in range(len(own))]


def test_a_text_among_longer_ones_is_the_text_alone(paired: Paired) -> None:
    retriever = Retriever(paired)
    together = retriever.texts(TEXTS).embedded
    for place, text in enumerate(TEXTS):
        close(together[place], retriever.texts([text]).embedded[0])


def test_a_probability_is_softmaxed_once(paired: Paired, pictures: list[Image.Image]) -> None:
    head: Any = paired.model.bridge.heads
    with torch.no_grad():
        head.match.weight.zero_()
        head.match.bias.copy_(torch.tensor([-1.0, 2.0]))
    found = Retriever(paired).match(pictures[0], "A cat.")
    assert found.probability == pytest.approx(1 / (1 + torch.e**-3))  # a second softmax would make 0.71 of it
    assert found.cosine == pytest.approx(float(naive(paired, pictures[:1])[0][0, 0]), abs=1e-5)


def test_without_matching_the_order_is_that_of_cosines(
    tiny_clip: Path, tiny_bert_folder: Path, tmp_path: Path, pictures: list[Image.Image]
) -> None:
    retriever = Retriever(paired_with(tiny_clip, tiny_bert_folder, tmp_path, "sigmoid"))
    found = retriever.find_texts(retriever.see(pictures), retriever.texts(TEXTS))
    assert torch.equal(found.scores, found.cosines)
    assert found.probability.isnan().all()


@torch.no_grad()
def test_it_writes_the_likeliest_word_after_those_before(paired: Paired, pictures: list[Image.Image]) -> None:
    bridge: Any = paired.model.bridge
    features = paired.model.vision(paired.model.vision.preprocess(pictures))
    said = Retriever(paired).write(features, longest=6)
    assert len(set(said)) > 1
    for i, text in enumerate(said):
        ids = torch.tensor([[bridge.words.write]])
        for _ in range(6):
            hidden, _ = bridge.run(bridge.look(features[i : i + 1]), ids, writing(K, torch.ones_like(ids).bool()))
            word = write_logits(bridge, hidden[:, -1]).argmax(-1, keepdim=True)
            if int(word) == bridge.words.end:
                break
            ids = torch.cat([ids, word], dim=1)
        assert text == bridge.words.tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    bridge.heads.bias[bridge.words.end] = 1e4
    assert Retriever(paired).write(features) == ["", "", ""]


def test_kept_features_are_those_of_the_tower_and_it_does_not_run_again(
    paired: Paired, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = paired.model.vision
    first = Folder(folder, vision)
    assert [str(p.relative_to(folder)) for p in first.paths] == ["a.PNG", "b.png", "deeper/c.png"]
    fresh = torch.cat([vision(vision.preprocess([open_picture(path)])) for path in first.paths])
    close(first[[2, 0, 1]], fresh[[2, 0, 1]])
    ran: list[int] = []
    vision.register_forward_pre_hook(lambda _, given: ran.append(len(given[0])))
    (folder / "b.png").rename(folder / "deeper" / "moved.png")
    second = Folder(folder, vision)
    assert ran == []
    assert torch.equal(second[[2, 0]], first[[1, 0]])
    retriever = Retriever(paired)
    close(retriever.pictures(second).embedded, retriever.pictures(fresh[[0, 2, 1]]).embedded)


def test_a_picture_that_changed_is_seen_anew_even_with_the_size_and_date_it_had(paired: Paired, folder: Path) -> None:
    vision, path = paired.model.vision, folder / "b.bmp"
    Image.new("RGB", (16, 16), "red").save(path)
    before, date = Folder(folder, vision), path.stat()
    Image.new("RGB", (16, 16), "blue").save(path)
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
    after = Folder(folder, vision)
    assert path.stat().st_size == date.st_size
    assert not torch.equal(after[[1]], before[[1]])
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_another_tower_has_features_of_its_own(paired: Paired, tiny_clip: Path, folder: Path) -> None:
    from bridges.towers.vision import VisionTower

    other = VisionTower(str(tiny_clip), layer=-2)
    assert not torch.allclose(Folder(folder, other)[[0]], Folder(folder, paired.model.vision)[[0]])


def test_broken_pictures_are_skipped_and_listed(paired: Paired, folder: Path) -> None:
    broken_in(folder)
    (folder / "again.png").write_bytes((folder / "torn.png").read_bytes())
    found = Folder(folder, paired.model.vision)
    assert len(found) == len(found.paths) == 3
    lines = found.summary().splitlines()
    assert lines[0] == "2 of 5 pictures skipped"
    assert [re.sub(r"cannot open .*/(\w+\.png): .*", r"\1", line).strip() for line in lines[1:]] == [
        "again.png",
        "torn.png",
    ]
    for path in found.paths:
        path.unlink()
    with pytest.raises(ValueError, match=r"no picture in .* opens: cannot open"):
        Folder(folder, paired.model.vision)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    main(["retrieve", *map(str, arguments)])
    told = capsys.readouterr()
    return told.out, told.err


def test_the_command_lists_the_best_pictures_of_each_text(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, paired: Paired, folder: Path
) -> None:
    broken_in(folder)
    out, err = run(
        capsys, checkpoint, "--images", folder, "--text", TEXTS[0], "--text", TEXTS[1], "--top", 2, "--rerank", 1
    )
    assert "torn.png" in err
    retriever = Retriever(paired)
    seen = Folder(folder, paired.model.vision)
    found = retriever.find_pictures(retriever.pictures(seen), retriever.texts(TEXTS[:2]), k=1)
    rows = [line.split() for line in out.splitlines() if re.match(r" *\d ", line)]
    assert len(rows) == 4
    for query in range(2):
        for rank, best in enumerate(found.best(query, 2)):
            place, name, cosine, probability = rows[2 * query + rank]
            assert (place, name) == (str(rank + 1), str(seen.paths[best].relative_to(folder)))
            assert float(cosine) == pytest.approx(float(found.cosines[query, best]), abs=6e-4)
            assert (probability == "–") == (rank == 1)
    assert TEXTS[0] in out


def test_the_command_ranks_the_lines_of_a_file_for_a_picture(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, paired: Paired, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "said.txt").write_text("\n".join(["", *TEXTS, "", "cat " * 40]))
    out, err = run(capsys, checkpoint, "--image", folder / "b.png", "--texts", tmp_path / "said.txt", "--top", 1)
    texts = [*TEXTS, ("cat " * 40).strip()]
    retriever = Retriever(paired)
    found = retriever.find_texts(retriever.see([open_picture(folder / "b.png")]), retriever.texts(texts))
    (row,) = [line for line in out.splitlines() if re.match(r" *1 ", line)]
    assert texts[found.best(0, 1)[0]].split()[0] in row
    assert "only the first 30 tokens are read of: cat cat" in err


def test_the_command_explains_one_pair(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, paired: Paired, folder: Path
) -> None:
    out, _ = run(capsys, checkpoint, "--image", folder / "b.png", "--text", TEXTS[0])
    found = Retriever(paired).match(open_picture(folder / "b.png"), TEXTS[0])
    figures = [float(line.split()[0]) for line in out.splitlines()]
    assert figures == pytest.approx([found.probability, found.cosine], abs=6e-4)


def test_what_the_user_can_mend_is_one_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    def complaint(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["retrieve", *map(str, arguments)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    search = (checkpoint, "--images", folder)
    assert "no checkpoint in" in complaint(tmp_path / "empty", "--images", folder, "--text", "a cat")
    assert "give either --images" in complaint(checkpoint, "--text", "a cat")
    assert "give either --images" in complaint(*search, "--image", folder / "b.png", "--text", "a cat")
    assert "no text to compare with" in complaint(*search)
    assert "empty.txt is empty" in complaint(*search, "--texts", tmp_path / "empty.txt")
    assert "nearest name" in complaint(*search, "--texts", tmp_path / "empty.tex")
    assert "text 2 is empty" in complaint(*search, "--text", "a cat", "--text", " ")
    assert "at least 1" in complaint(*search, "--text", "a cat", "--rerank", 0)
    assert "at least 1" in complaint(*search, "--text", "a cat", "--top", 0)
    assert "no pictures in" in complaint(checkpoint, "--images", tmp_path / "empty", "--text", "a cat")
    assert "nearest name" in complaint(checkpoint, "--images", tmp_path / "mien", "--text", "a cat")
    assert "is a file" in complaint(checkpoint, "--images", folder / "b.png", "--text", "a cat")
    assert "nearest name" in complaint(checkpoint, "--image", folder / "bb.png", "--text", "a cat")


def test_a_checkpoint_with_a_language_model_is_refused(
    capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, folder: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["retrieve", str(tiny_checkpoint), "--images", str(folder), "--text", "a cat"])
    assert stopped.value.code == 2
    assert "was not trained on pairs" in capsys.readouterr().err
