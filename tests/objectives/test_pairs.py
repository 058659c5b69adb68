"""Objectives on pairs: beside naive loops, and on two processes as on one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import randomise
from torch import Tensor

from bridges.data.pairs import PairBatch
from bridges.layers import writing
from bridges.objectives.captioning import captioning_loss, written
from bridges.objectives.contrastive import (
    Compared,
    contrastive_loss,
    embed_images,
    embed_texts,
    sigmoid_loss,
    similarity,
)
from bridges.objectives.matching import hard_negatives, matching_loss
from bridges.objectives.pairs import PairObjective, compare, held_out_pairs
from bridges.pairs import PairHeads, PairModel
from bridges.qformer import QFormer
from bridges.towers.vision import VisionTower

B, P, K = 6, 16, 3
OBJECTIVES = ({"contrastive": 1.0}, {"sigmoid": 1.0}, {"matching": 1.0}, {"captioning": 1.0})
ALL = {"contrastive": 1.0, "sigmoid": 0.5, "matching": 2.0, "captioning": 0.25}


def qformer(bert: Path) -> QFormer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"queries": K, "layers": 2, "width": 32, "heads": 4, "dropout": 0.0}
    made = QFormer(16, P, 0, 0, **sizes, reads="pairs", words=str(bert))
    randomise(made)
    with torch.no_grad():
        made.heads.log_temperature.fill_(math.log(0.2))
    return made.double()


def batch_of(size: int = B) -> PairBatch:
    """Pairs 0 and 1 have equal captions, pairs 2 and 3 equal pictures."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size, P, 16, generator=generator).double()
    ids = torch.randint(5, 40, (size, 7), generator=generator)
    real = torch.arange(7) < torch.tensor([[7], [7], [4], [5], [6], [3]] * (size // 6 + 1))[:size]
    ids, features = ids * real, features.clone()
    ids[:, 0] = 2
    if size > 3:
        ids[1], real[1], features[3] = ids[0], real[0], features[2]
    pictures, captions = torch.arange(size), torch.arange(size)
    if size > 3:
        pictures[3], captions[1] = pictures[2], captions[0]
    return PairBatch(ids, real, pictures, captions, features=features)


def model_of(clip: Path, bert: Path) -> PairModel:
    return PairModel(VisionTower(str(clip)), qformer(bert))


@pytest.fixture
def model(tiny_clip: Path, tiny_bert_folder: Path) -> PairModel:
    return model_of(tiny_clip, tiny_bert_folder)


def allowed(i: int, j: int) -> bool:
    return i == j or {i, j} not in ({0, 1}, {2, 3})


def compared_of(model: PairModel, batch: PairBatch) -> Compared:
    assert batch.features is not None
    return compare(model.bridge, model.bridge.look(batch.features), batch)[0]  # pyright: ignore[reportArgumentType]


def naive_cosines(bridge: QFormer, batch: PairBatch) -> Tensor:
    """Each picture and each text embedded alone; the nearest query counts."""
    assert batch.features is not None
    table = torch.zeros(len(batch.ids), len(batch.ids), dtype=torch.float64)
    for i, features in enumerate(batch.features):
        queries = embed_images(bridge.heads, bridge.run(bridge.look(features[None]))[0])[0]
        for j in range(len(batch.ids)):
            ids = batch.ids[j][batch.real[j]][None]
            text = embed_texts(bridge.heads, bridge.run(None, ids)[0][:, 0])[0]
            table[i, j] = max(float(query @ text) for query in queries)
    return table


@torch.no_grad()
def test_contrastive_is_the_naive_loop(model: PairModel) -> None:
    batch, heads = batch_of(), model.bridge.heads
    logits = naive_cosines(model.bridge, batch) / 0.2  # pyright: ignore[reportArgumentType]
    expected = 0.0
    for table in (logits, logits.T):
        for i in range(B):
            some = [j for j in range(B) if allowed(i, j)]
            log_probability = table[i, some].log_softmax(0)
            own = log_probability[some.index(i)]
            expected -= 0.5 * float(0.9 * own + 0.1 * log_probability.mean())
    assert float(contrastive_loss(compared_of(model, batch), heads)) == pytest.approx(expected, abs=2e-5)


@torch.no_grad()
def test_sigmoid_is_the_naive_loop_and_starts_where_pairs_and_others_weigh_alike(model: PairModel) -> None:
    batch, heads = batch_of(), model.bridge.heads
    heads.shift.fill_(0.3)
    logits = naive_cosines(model.bridge, batch) / 0.2 + 0.3 - math.log(B)  # pyright: ignore[reportArgumentType]
    expected = -sum(
        float(torch.nn.functional.logsigmoid(logits[i, j] * (1 if i == j else -1)))
        for i in range(B)
        for j in range(B)
        if allowed(i, j)
    )
    assert float(sigmoid_loss(compared_of(model, batch), heads)) == pytest.approx(expected, abs=2e-5)


def test_similarity_is_of_the_nearest_query() -> None:
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(similarity(images, texts), torch.tensor([[1.0, 1.0], [0.8, 0.6]]))


def test_hard_negatives_are_never_true_pairs_and_mostly_the_nearest(model: PairModel) -> None:
    heads = PairHeads(8, 10)
    keys = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, 4, 0])
    unit = torch.nn.functional.normalize(torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(3)), dim=-1)
    compared = Compared(unit, unit[:, 0], *keys)
    drawn: list[Tensor] = []
    for seed in range(200):
        chosen, some = hard_negatives(compared.to_texts, compared.negative, heads, seed)
        assert some.all()
        assert compared.negative.gather(1, chosen[:, None]).all()
        drawn.append(chosen)
    counts = torch.nn.functional.one_hot(torch.stack(drawn), 6).sum(0)
    weights = (compared.to_texts / heads.temperature).masked_fill(~compared.negative, -torch.inf).softmax(1)
    assert torch.equal(counts > 0, counts * compared.negative > 0)
    assert (counts / 200 - weights).abs().max() < 0.12


def test_a_pair_without_any_negative_asks_itself_only(model: PairModel) -> None:
    batch = batch_of(2)
    batch.captions[1] = batch.captions[0]
    bridge: Any = model.bridge
    memory = bridge.look(batch.features)
    compared, _ = compare(bridge, memory, batch)
    loss, difference, true = matching_loss(bridge, batch.features, memory, batch.ids, batch.real, compared)
    assert true.tolist() == [True, True]
    assert float(loss) == pytest.approx(float(torch.nn.functional.softplus(-difference).sum()) / 3, rel=1e-6)


@torch.no_grad()
def test_matching_of_a_row_is_that_of_the_row_alone(model: PairModel) -> None:
    bridge: Any = model.bridge
    batch = batch_of()
    memory = bridge.look(batch.features)
    compared, _ = compare(bridge, memory, batch)
    _, difference, true = matching_loss(bridge, batch.features, memory, batch.ids, batch.real, compared)
    assert true.tolist() == [True] * B + [False] * 2 * B
    for i in range(B):
        ids = batch.ids[i][batch.real[i]][None]
        hidden, _ = bridge.run(bridge.look(batch.features[i : i + 1]), ids)  # nothing is padding: no mask
        logits = bridge.heads.match(hidden[:, :K]).mean(1)[0]
        assert float(difference[i]) == pytest.approx(float(logits[1] - logits[0]), abs=1e-6)


@torch.no_grad()
def test_captioning_predicts_each_token_from_those_before(model: PairModel) -> None:
    bridge: Any = model.bridge
    batch = batch_of()
    memory = bridge.look(batch.features)
    _, kept = compare(bridge, memory, batch)
    loss, tokens = captioning_loss(bridge, kept, batch.ids, batch.real, 0.1)
    logits, rows, _ = written(bridge, kept, batch.ids, batch.real)
    assert tokens == int(batch.real[:, 1:].sum()) == len(logits)
    expected = 0.0
    for i in range(B):
        length = int(batch.real[i].sum())
        ids = torch.cat([torch.tensor([bridge.words.write]), batch.ids[i, 1 : length - 1]])[None]
        everything = torch.ones_like(ids).bool()
        hidden, _ = bridge.run(bridge.look(batch.features[i : i + 1]), ids, writing(K, everything))
        head = bridge.heads.transform(hidden[0, K:]) @ bridge.word_table.weight.T + bridge.heads.bias
        torch.testing.assert_close(logits[rows == i], head.float(), atol=1e-5, rtol=0)
        log_probability = head.log_softmax(-1)
        for place, target in enumerate(batch.ids[i, 1:length]):
            expected -= float(0.9 * log_probability[place, target] + 0.1 * log_probability[place].mean())
    assert float(loss) == pytest.approx(expected, abs=1e-3)


def test_the_weighted_sum_is_the_sum_of_the_parts(model: PairModel) -> None:
    batch = batch_of()
    alone = {}
    for name in ALL:
        loss, parts = PairObjective({name: 1.0})(model, batch)
        assert float(loss) / B == pytest.approx(parts[name], rel=1e-6)
        alone[name] = float(loss)
    loss, parts = PairObjective(ALL)(model, batch)
    assert parts.keys() == ALL.keys()
    assert float(loss) == pytest.approx(sum(ALL[name] * alone[name] for name in ALL), rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"contrastve": 1.0}, "did you mean contrastive"), ({"matching": 0.0}, "weight 0.0; give it one above 0")],
)
def test_an_objective_that_is_none_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairObjective(weights)


def test_held_out_figures_stand_beside_a_guess(model: PairModel) -> None:
    figures = held_out_pairs(model, batch_of())
    assert figures["recall@1"]["chance"] == pytest.approx(1 / B)
    assert figures["matching"]["majority"] == pytest.approx(2 / 3)
    assert 0 <= figures["recall@1"]["image"] <= 1
    assert 0 <= figures["matching"]["image"] <= 1


def results(folders: tuple[Path, Path], batch: PairBatch, processes: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss over all pairs and gradient, for each objective, as the loop makes them."""
    found = []
    for weights in (*OBJECTIVES, ALL):
        model = model_of(*folders)
        loss, _ = PairObjective(weights)(model, batch)
        (loss * processes / B).backward()
        total = loss.detach().clone()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if processes > 1:  # what a parallel wrapper does
            dist.all_reduce(total)
            for gradient in gradients.values():
                dist.all_reduce(gradient)
                gradient.div_(processes)
        found.append((float(total) / B, gradients))
    return found


def work(rank: int, folders: tuple[Path, Path], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = batch_of()
    mine = slice(rank * B // 2, (rank + 1) * B // 2)
    part = PairBatch(**{name: x[mine] if x is not None else None for name, x in vars(whole).items()})
    longest = int(part.real.sum(1).max())  # processes pad their texts to their own longest
    part.ids, part.real = part.ids[:, :longest], part.real[:, :longest]
    found = results(folders, part, 2)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_in_loss_and_gradient(tiny_clip: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    folders = (tiny_clip, tiny_bert_folder)
    mp.spawn(work, (folders, tmp_path), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    together = torch.load(tmp_path / "found.pt")
    for weights, one, two in zip((*OBJECTIVES, ALL), results(folders, batch_of(), 1), together, strict=True):
        assert two[0] == pytest.approx(one[0], rel=1e-6), weights
        assert one[1].keys() == two[1].keys()
        for name, gradient in one[1].items():
            torch.testing.assert_close(two[1][name], gradient, atol=1e-6, rtol=1e-5, msg=f"{weights} {name}")
