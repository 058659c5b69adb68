"""The Q-Former beside transformers' own, its masks beside their drawings, and how one stage begins with another."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise, tiny_bert
from torch import Tensor
from transformers import (
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from bridges.interop.blip2 import from_blip2, names, to_blip2
from bridges.layers import apart, together, writing
from bridges.qformer import QFormer
from bridges.text import Words

B, K, T, P = 3, 8, 10, 17
SIZES: dict[str, Any] = {"queries": K, "layers": 4, "width": 64, "heads": 4, "inner": 128, "dropout": 0.0}
THEIRS: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "encoder_hidden_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_implementation": "eager",
}
DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("wide"), hidden_size=64, num_hidden_layers=4, intermediate_size=128)


def ours(folder: Path, reads: str = "pairs", **options: Any) -> QFormer:
    return QFormer(48, P, 24, 2, **{**SIZES, "words": str(folder), "reads": reads, **options}).eval()


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of variance 1/fan-in, and biases that show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = 1.0 if p.ndim == 1 and "weight" in name else 0.0
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else one + 0.1 * noise)
    return module


@pytest.fixture(params=DTYPES, ids=["fp64", "fp32"])
def pair(request: pytest.FixtureRequest, bert: Path) -> tuple[QFormer, Blip2QFormerModel, float]:
    """Ours and theirs with the same random weights."""
    dtype, atol = request.param
    theirs = spread(Blip2QFormerModel(Blip2QFormerConfig(use_qformer_text_input=True, **THEIRS))).eval()
    mine = spread(ours(bert))
    given = {f"qformer.{name}": tensor for name, tensor in theirs.state_dict().items()}
    converted = from_blip2(given, 4, "blip-2")
    assert len(converted) == len(given), "a tensor of theirs has no place here"
    mine.load_state_dict(mine.state_dict() | converted)
    return mine.to(dtype), theirs.to(dtype), atol


def inputs(mine: QFormer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, ids, where they are no padding (ragged), and the embeddings of the ids."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(B, P, 48, generator=generator).to(mine.queries.dtype)
    ids = torch.randint(5, 40, (B, T), generator=generator)
    real = torch.arange(T) < torch.tensor([[10], [7], [3]])
    return features, ids, real, mine.word_table(ids) + mine.place_table.weight[:T]


def seen(mine: QFormer, features: Tensor) -> Tensor:
    return mine.vision_norm(features)


def test_queries_alone_are_those_of_transformers(pair: tuple[QFormer, Blip2QFormerModel, float]) -> None:
    mine, theirs, atol = pair
    features, *_ = inputs(mine)
    queries = mine.queries.expand(B, K, 64)
    expected = theirs(query_embeds=queries, encoder_hidden_states=seen(mine, features)).last_hidden_state
    torch.testing.assert_close(mine.run(mine.look(features))[0], expected, atol=atol, rtol=0)


def test_text_alone_is_that_of_transformers(pair: tuple[QFormer, Blip2QFormerModel, float]) -> None:
    mine, theirs, atol = pair
    _, ids, real, text = inputs(mine)
    expected = theirs(query_embeds=text, query_length=0, attention_mask=real.long()).last_hidden_state
    found, _ = mine.run(None, ids, together(0, real))
    torch.testing.assert_close(found[real], expected[real], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["matching", "captioning", "contrastive"])
def test_both_together_are_those_of_transformers(pair: tuple[QFormer, Blip2QFormerModel, float], kind: str) -> None:
    mine, theirs, atol = pair
    features, ids, real, text = inputs(mine)
    mask = {"matching": together, "captioning": writing, "contrastive": apart}[kind](K, real)
    both = torch.cat([mine.queries.expand(B, K, 64), text], dim=1)
    if kind == "matching":
        given: Tensor = torch.cat([real.new_ones(B, K), real], dim=1).long()
    else:  # a bool mask of four dimensions would be added as 0 and 1
        given = torch.zeros(B, 1, K + T, K + T, dtype=both.dtype).masked_fill(~mask, torch.finfo(both.dtype).min)
    expected = theirs(
        query_embeds=both, query_length=K, attention_mask=given, encoder_hidden_states=seen(mine, features)
    ).last_hidden_state
    found, _ = mine.run(mine.look(features), ids, mask)
    kept = torch.cat([real.new_ones(B, K), real], dim=1)
    torch.testing.assert_close(found[kept], expected[kept], atol=atol, rtol=0)


def test_gradients_are_those_of_transformers(pair: tuple[QFormer, Blip2QFormerModel, float]) -> None:
    mine, theirs, atol = pair
    features, ids, real, text = inputs(mine)
    both = torch.cat([mine.queries.expand(B, K, 64), text], dim=1)
    kept = torch.cat([real.new_ones(B, K), real], dim=1)
    expected = theirs(
        query_embeds=both,
        query_length=K,
        attention_mask=kept.long(),
        encoder_hidden_states=seen(mine, features).detach(),
    ).last_hidden_state
    weights = torch.linspace(-1, 1, 64, dtype=features.dtype)
    theirs_only = torch.autograd.grad((expected[kept] * weights).sum(), list(theirs.parameters()))
    found, _ = mine.run(mine.look(features), ids, together(K, real))
    (found[kept] * weights).sum().backward()
    there = names(4, "blip-2")
    gradients = dict(zip([f"qformer.{n}" for n, _ in theirs.named_parameters()], theirs_only, strict=True))
    compared = [n for n, p in mine.named_parameters() if there.get(n) in gradients and ".key.bias" not in n]
    assert len(compared) > 80
    for name in compared:
        gradient, expected_gradient = mine.get_parameter(name).grad, gradients[there[name]]
        assert gradient is not None
        assert (gradient - expected_gradient).abs().max() <= 10 * atol * max(1, expected_gradient.abs().max()), name


@pytest.mark.parametrize(("dtype", "atol"), DTYPES)
def test_with_instructions_it_is_the_one_of_instructblip(bert: Path, dtype: torch.dtype, atol: float) -> None:
    mine = spread(ours(bert, "instructions")).to(dtype)
    config = InstructBlipQFormerConfig(vocab_size=mine.words.size, **THEIRS)
    theirs = InstructBlipQFormerModel(config).eval().to(dtype)
    given = {n.removeprefix("qformer."): t for n, t in to_blip2(mine.state_dict(), 4, "instructblip").items()}
    theirs.load_state_dict({n: t for n, t in given.items() if n.startswith(("encoder", "embeddings"))}, strict=True)
    features, *_ = inputs(mine)
    asked = ["What is in the picture?", "Is it a cat?", ""]
    ids, real = mine.words(asked)
    expected = theirs(
        input_ids=ids,
        attention_mask=torch.cat([real.new_ones(B, K), real], dim=1).long(),
        query_embeds=mine.queries.expand(B, K, 64),
        encoder_hidden_states=seen(mine, features),
    ).last_hidden_state[:, :K]
    slots = mine(features, asked).slots
    torch.testing.assert_close(slots, mine.projection(expected), atol=atol, rtol=0)
    assert not torch.allclose(slots, mine(features, ["", "", ""]).slots, atol=1e-3)


def drawing(mask: Any) -> Tensor:
    """The x and . of a docstring."""
    rows = re.findall(r"^ +[qw*-]   ([x. ]+)$", mask.__doc__, re.M)
    return torch.tensor([[mark == "x" for mark in row.split()] for row in rows])


@pytest.mark.parametrize(("mask", "real"), [(apart, [1, 1, 0]), (together, [1, 1, 0]), (writing, [1, 1, 1])])
def test_masks_are_as_drawn(mask: Any, real: list[int]) -> None:
    made = mask(2, torch.tensor([real]).bool())[0, 0]
    assert len(made) in (1, 5)
    assert torch.equal(made, drawing(mask))


@torch.no_grad()
def test_writing_from_kept_queries_is_writing_in_one_pass(bert: Path) -> None:
    mine = spread(ours(bert)).double()
    features, ids, real, _ = inputs(mine)
    memory = mine.look(features)
    whole, _ = mine.run(memory, ids, writing(K, real))
    _, kept = mine.run(memory)
    text, _ = mine.run(None, ids, writing(K, real)[:, :, K:], kept)
    torch.testing.assert_close(text[real], whole[:, K:][real], atol=1e-12, rtol=0)


@torch.no_grad()
def test_words_ahead_are_not_seen_in_writing(bert: Path) -> None:
    mine = spread(ours(bert)).double()
    features, ids, real, _ = inputs(mine)
    other = ids.clone()
    other[:, 5:] = 7
    memory = mine.look(features)
    one, two = (mine.run(memory, i, writing(K, torch.ones_like(real)))[0] for i in (ids, other))
    assert torch.equal(one[:, : K + 5], two[:, : K + 5])
    assert (one[:, K + 5 :] - two[:, K + 5 :]).abs().max() > 1e-3


def test_it_begins_with_berts_weights_and_the_queries_with_a_copy_of_the_texts(bert: Path) -> None:
    mine = ours(bert, bert=str(bert))
    mine.begin()
    theirs: Any = BertModel.from_pretrained(bert).eval()
    layer = theirs.encoder.layer[1]
    assert torch.equal(mine.layers[1].attention.query.weight, layer.attention.self.query.weight)
    assert torch.equal(mine.layers[1].feed[0].weight, layer.intermediate.dense.weight)
    assert torch.equal(mine.layers[1].text_feed[0].weight, layer.intermediate.dense.weight)
    assert mine.layers[1].feed[0].weight is not mine.layers[1].text_feed[0].weight
    ids, real = mine.words(["a cat", "two small birds"])
    with torch.no_grad():  # BERT adds its first token type everywhere, BLIP-2 none
        mine.place_table.weight += theirs.embeddings.token_type_embeddings.weight[0]
        found, _ = mine.run(None, ids, together(0, real))
        expected = theirs(input_ids=ids, attention_mask=real.long()).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 32, "heads": 4}, "has width 64 and 4 heads, the qformer 32 and 4"),
        ({"layers": 5}, "has 4 layers with feed-forwards of 128, the qformer 5 with 128"),
        ({"inner": 64}, "feed-forwards of 128, the qformer 4 with 64"),
    ],
)
def test_a_bert_of_other_sizes_is_refused(bert: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(bert, bert=str(bert), **options).begin()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries 0 of the qformer"),
        ({"heads": 5}, "5 heads do not divide the width 64"),
        ({"words": None}, "reads pairs needs a tokenizer"),
        ({"words": "/nowhere/bert"}, "no folder /nowhere/bert"),
    ],
)
def test_sizes_that_cannot_be_are_refused(bert: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(bert, **options)


def test_the_second_stage_begins_with_the_first(bert: Path) -> None:
    first, second = randomise(ours(bert), 1), randomise(ours(bert, "nothing"), 2)
    fresh = second.projection.weight.clone()
    second.adopt(first.state_dict())
    features, *_ = inputs(first)
    assert torch.equal(second.run(second.look(features))[0], first.run(first.look(features))[0])
    assert torch.equal(second.projection.weight, fresh)
    with pytest.raises(ValueError, match=r"of other sizes: .* such as layers\.0\.feed\.0\.bias"):
        ours(bert, "nothing", inner=64).adopt(first.state_dict())
    with pytest.raises(ValueError, match=r"of other sizes: .* such as layers\.3"):
        ours(bert, "nothing", layers=3).adopt(first.state_dict())


def test_instructions_begin_with_the_first_stage_or_with_the_second_and_a_bert(bert: Path) -> None:
    first, second = ours(bert), ours(bert, "nothing")
    ours(bert, "instructions").adopt(first.state_dict())
    ours(bert, "instructions", bert=str(bert)).adopt(second.state_dict())
    with pytest.raises(ValueError, match=r"layers\.0\.text_feed"):
        ours(bert, "instructions").adopt(second.state_dict())


def test_a_frozen_one_trains_its_projection_only(bert: Path) -> None:
    mine = ours(bert, "nothing", frozen=True, dropout=0.5).train()
    assert [n for n, p in mine.named_parameters() if p.requires_grad] == ["projection.weight", "projection.bias"]
    features = torch.randn(B, P, 48)
    assert torch.equal(mine(features).slots, mine(features).slots), "its dropout is asleep"


def test_instructions_are_dropped_in_training_as_often_as_asked(bert: Path) -> None:
    mine = ours(bert, "instructions", instruction_dropout=0.5)
    features = torch.randn(1, P, 48).expand(200, P, 48)
    asked = ["Is it a cat?"] * 200
    with torch.no_grad():
        silent = mine(features[:1], [""]).slots
        assert not torch.isclose(mine(features, asked).slots, silent).all(-1).any(), "asleep, every one is read"
        torch.manual_seed(0)
        mine.train()
        dropped = torch.isclose(mine(features, asked).slots, silent, atol=1e-5).all(-1).all(-1)
    assert 70 < int(dropped.sum()) < 130


def test_words_have_a_first_and_a_last_token_and_are_cut(bert: Path) -> None:
    words = Words(str(bert), longest=6)
    ids, real = words(["a cat", "a cat and a dog and a bird"])
    assert ids.shape == (2, 6)
    assert real.sum(1).tolist() == [4, 6]
    assert ids[:, 0].tolist() == [words.start] * 2
    assert [ids[0, 3], ids[1, 5]] == [words.end] * 2
    assert words.write == words.size - 1 == len(words.tokenizer)
    assert words([])[0].shape[0] == 0
