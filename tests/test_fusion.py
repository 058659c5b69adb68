"""Blocks inside the language model: however a text is laid out, kept or cut, they see the same pictures in it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import FAMILIES, chatml_tokenizer, randomise, tiny_language
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    MptConfig,
)

from bridges.build import Assembled, build
from bridges.data.batch import Batch, Row, collate, cut, pack
from bridges.data.conversation import Turn, images_of
from bridges.data.template import IMAGE_TOKEN_ID, Encoded, Template
from bridges.flamingo import Flamingo, Gate
from bridges.inference.decoding import decode
from bridges.inference.session import Session
from bridges.layout import visible
from bridges.model import BridgedModel
from bridges.objectives.language import language_loss, target_nll
from bridges.sight import sight
from bridges.towers.language import LanguageTower, decoder_layers
from bridges.towers.vision import VisionTower

SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
# Those of FAMILIES, and these; all but one of them with ALiBi, which knows no positions.
OTHERS: dict[str, Callable[..., Any]] = {
    "mpt": lambda **k: MptConfig(d_model=32, n_layers=2, n_heads=4, **k),
    "bloom": lambda **k: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **k),
    "falcon": lambda **k: FalconConfig(**SIZES, **k),
    "falcon_alibi": lambda **k: FalconConfig(**SIZES, alibi=True, **k),
}
SMALL: dict[str, Any] = dict(latents=3, depth=1, resampler_heads=2, resampler_head_dim=8, heads=2, head_dim=8)
# Nothing but the words, so that a picture can be the very first thing.
BARE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-7}  # rotary angles are float32 in either
ways_of_seeing = pytest.mark.parametrize("sees", ["last", "all"])


def saved(config: Any, folder: Path) -> Path:
    """A language model of random weights, in a folder."""
    tokenizer = chatml_tokenizer()
    model: Any = randomise(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[*FAMILIES, *OTHERS])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageTower:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in OTHERS:
        saved(OTHERS[request.param](vocab_size=len(chatml_tokenizer())), folder)
    else:
        tiny_language(request.param, folder)
    # ALiBi is not for float64: transformers adds it in float32, to the lowest number there is
    return LanguageTower(str(folder), dtype=torch.float32 if request.param in OTHERS else torch.float64)


@pytest.fixture(scope="module")
def vision(tiny_clip: Path) -> VisionTower:
    return VisionTower(str(tiny_clip), layer=-2, dtype=torch.float64)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> LanguageTower:
    return LanguageTower(str(tiny_llama), dtype=torch.float64)


@pytest.fixture
def in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows side by side with padding, where they would be read end to end."""
    monkeypatch.setattr("bridges.model.LONGEST_LINE", 0)


def fused(vision: VisionTower, language: LanguageTower, **options: Any) -> tuple[BridgedModel, Template]:
    """Both towers with open gates between them, and a template of the bare words."""
    bridge = Flamingo(vision.dim, vision.num_patches, language.dim, language.num_layers, **SMALL, **options)
    opened(bridge).to(language.dtype)
    return BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID), Template(language.tokenizer, 0, BARE)


def opened(bridge: Flamingo) -> Flamingo:
    randomise(bridge)
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.6 if "attention" in name else -0.4)
    return bridge


@pytest.fixture(scope="module")
def conversations(pictures: list[Image.Image]) -> list[list[Turn]]:
    """A picture in front of the words, amid them, three here and there, two in a row, and none."""
    a, b, c = pictures
    return [
        [Turn("user", [a, "Is it a cat?"]), Turn("assistant", ["No."])],
        [Turn("user", ["Is there a cat in ", b, "? Name it."]), Turn("assistant", ["A small bird, I think."])],
        [
            Turn("user", ["Is ", a, " larger than ", c, "?"]),
            Turn("assistant", ["Yes."]),
            Turn("user", [b, "And this one? Look at it."]),
            Turn("assistant", ["No."]),
        ],
        [Turn("user", ["Look: ", c, b, "How many birds?"]), Turn("assistant", ["Two."])],
        [Turn("user", ["How many birds are there?"]), Turn("assistant", ["Four."])],
    ]


def batch_of(model: BridgedModel, rows: Sequence[Row], left: bool = False, share: bool = True) -> Batch:
    return collate(rows, model.vision.preprocess, left=left, share=share)


def logits_of(model: BridgedModel, batch: Batch) -> Tensor:
    """Everywhere but in padding, row by row."""
    at = (batch.segments >= 0).nonzero(as_tuple=True)
    return model(batch.input_ids, batch.segments, batch.positions, at, batch.pixel_values, looks=batch.looks)


@ways_of_seeing
@pytest.mark.parametrize("pictures_first", [True, False])
def test_what_all_rows_begin_with_is_read_once_in_a_line_and_learnt_alike(
    vision: VisionTower,
    llama: LanguageTower,
    conversations: list[list[Turn]],
    sees: Any,
    pictures_first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks train, so it is no constant; and rows that begin with a picture begin with the same words, its tag."""
    model, template = fused(vision, llama, every=1, sees=sees)
    template.system = "You are a helpful assistant."
    turns = [conversations[0], *conversations[:1]] if pictures_first else conversations
    batch = batch_of(model, [pack([template.encode(turn)]) for turn in turns])
    read = []
    model.language.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    gradients = []
    for keeps in (True, False):
        monkeypatch.setattr(model, "keeps_prefix", keeps)
        model.zero_grad()
        language_loss(model, batch)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in model.bridge.named_parameters() if p.grad is not None})
    assert read[0] < read[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def alone(model: BridgedModel, texts: Sequence[Encoded]) -> list[Tensor]:
    """The logits of each text in a batch of its own."""
    return [logits_of(model, batch_of(model, [pack([text])])) for text in texts]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std(0).max() > 0.1, "logits that are all alike would be close to anything"
    close = CLOSE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=close, rtol=close)


class Told(NamedTuple):
    """A model, texts, and their logits where each is read alone and in one pass."""

    model: BridgedModel
    texts: list[Encoded]
    logits: list[Tensor]


@pytest.fixture(scope="module", params=["last", "all"])
def told(request: Any, vision: VisionTower, tower: LanguageTower, conversations: list[list[Turn]]) -> Told:
    model, template = fused(vision, tower, sees=request.param)
    texts = [template.encode(turns) for turns in conversations]
    with torch.no_grad():
        return Told(model, texts, alone(model, texts))


@torch.no_grad()
def test_with_closed_gates_the_language_model_says_to_the_bit_what_it_says_alone(
    vision: VisionTower, tower: LanguageTower, conversations: list[list[Turn]]
):
    text = Template(tower.tokenizer, 0, BARE).encode(conversations[2])
    itself = AutoModelForCausalLM.from_pretrained(tower.name, dtype=tower.dtype).eval()
    expected = itself(torch.tensor([text.ids])).logits[0]
    kinds: list[Gate] = ["scalar", "vector", "none"]
    for gate in kinds:
        bridge = Flamingo(vision.dim, vision.num_patches, tower.dim, tower.num_layers, gate=gate, **SMALL)
        model = BridgedModel(vision, bridge.to(tower.dtype), tower, IMAGE_TOKEN_ID)
        assert torch.equal(alone(model, [text])[0], expected), gate


@torch.no_grad()
def test_texts_side_by_side_or_end_to_end_are_read_as_if_each_stood_alone(told: Told, request: pytest.FixtureRequest):
    model, texts, logits = told
    rows, expected = [pack([text]) for text in texts], torch.cat(logits)
    assert len({len(row.ids) for row in rows}) > 3
    assert_same(logits_of(model, batch_of(model, rows)), expected)  # end to end, in families that can
    request.getfixturevalue("in_rows")
    assert_same(logits_of(model, batch_of(model, rows)), expected)
    assert_same(logits_of(model, batch_of(model, rows, left=True, share=False)), expected)
    if model.language.takes_positions:  # padding then stands after the word that both begin with
        batch = batch_of(model, rows[1:3], left=True)
        assert batch.segments[:, 0].tolist() == [0, 0]
        assert -1 in batch.segments
        assert_same(logits_of(model, batch), torch.cat(logits[1:3]))


def side_by_side(texts: Sequence[Encoded]) -> Row:
    """Texts in one row that share nothing."""
    row = Row([], [], [], [], [], [], [])
    for number, text in enumerate(texts, start=1):
        row.looks.extend(look + len(row.images) * (look > 0) for look in text.looks)
        row.ids.extend(text.ids)
        row.labels.extend(text.labels)
        row.segments.extend([number] * len(text.ids))
        row.positions.extend(range(len(text.ids)))
        row.images.extend(text.images)
    return row


def test_texts_in_one_row_are_read_and_learnt_as_if_each_stood_alone(told: Told):
    model, texts, logits = told
    order = [0, 1, 4, 2, 3]
    rows = [side_by_side([texts[i] for i in some]) for some in (order[:2], order[2:])]
    if not model.language.takes_positions:
        with pytest.raises(ValueError, match=r"no positions to restart.*give it plain rows"):
            logits_of(model, batch_of(model, rows))
        return
    with torch.no_grad():
        assert_same(logits_of(model, batch_of(model, rows)), torch.cat([logits[i] for i in order]))
        assert_same(logits_of(model, batch_of(model, rows[:1])), torch.cat([logits[i] for i in order[:2]]))
    assert_learnt_the_same(model, rows, [pack([texts[i]]) for i in order])


def assert_learnt_the_same(model: BridgedModel, rows: Sequence[Row], others: Sequence[Row]) -> None:
    """The same negative log-likelihood of every target, and the same gradients of their sum."""
    (nll, gradients), (expected, wanted) = (learnt(model, each) for each in (rows, others))
    close = CLOSE[expected.dtype]
    torch.testing.assert_close(nll, expected, atol=close, rtol=close)
    for name, gradient in gradients.items():
        size = wanted[name].abs().max().item()
        assert size > 1e-4, f"{name}: a gradient of no consequence"
        torch.testing.assert_close(gradient, wanted[name], atol=close * max(1, size), rtol=close)


def learnt(model: BridgedModel, rows: Sequence[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    nll = target_nll(model, batch_of(model, rows))
    nll.sum().backward()
    return nll.detach(), {name: p.grad.clone() for name, p in model.bridge.named_parameters() if p.grad is not None}


def questions(template: Template, *asked: Sequence[str | Image.Image]) -> list[Encoded]:
    return [template.encode([Turn("user", list(words)), Turn("assistant", ["No, a dog."])]) for words in asked]


@ways_of_seeing
def test_questions_about_a_picture_share_it_and_are_learnt_as_if_each_stood_alone(
    vision: VisionTower, llama: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, llama, sees=sees)
    a, b, c = pictures
    first = questions(template, [a, "Is it a cat?"], [a, "Is it red?"], [a, "Is it a ", b, " or ", c, "?"])
    second = questions(template, ["In ", b, " is a cat?"], ["In ", b, " is no cat?"])
    packed = [pack(first), pack(second)]
    assert all(row.segments.count(0) > 1 for row in packed)
    assert_learnt_the_same(model, packed, [pack([text]) for text in [*first, *second]])


@ways_of_seeing
def test_questions_about_different_pictures_share_nothing_that_saw_one(
    vision: VisionTower, llama: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, llama, sees=sees)
    a, b, c = pictures
    texts = questions(template, ["Is ", a, " a cat?"], ["Is ", b, " a cat?"], ["Is ", c, " a dog?"])
    assert_learnt_the_same(model, [pack(texts)], [pack([text]) for text in texts])


def test_a_picture_that_questions_share_is_encoded_once(llama: LanguageTower, pictures: list[Image.Image]):
    template = Template(llama.tokenizer, 0, BARE)
    texts = questions(template, [pictures[0], "Is it a cat?"], [pictures[0], "Is it red?"], [pictures[0], "Is it?"])
    assert pack(texts).images == pictures[:1]


@torch.no_grad()
@ways_of_seeing
def test_every_picture_of_several_in_a_row_tells_something(
    vision: VisionTower, llama: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, llama, sees=sees)
    a, b, c = pictures
    one, other = alone(model, questions(template, [a, b, "Which is larger?"], [c, b, "Which is larger?"]))
    assert (one[-1] - other[-1]).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_said_from_the_cache_is_what_is_read_in_one_pass(told: Told):
    model, texts, whole = told
    tower, more = model.language, 4
    rows = [pack([cut(text, len(text.ids) - more)]) for text in texts]
    batch = batch_of(model, rows, left=True, share=tower.takes_positions)
    read = (batch.input_ids, batch.segments, batch.positions, batch.pixel_values)
    logits, cache, seen = model.prefill(*read, looks=batch.looks)
    mask, lengths = (batch.segments >= 0).long(), torch.tensor([len(row.ids) for row in rows])
    steps: list[Tensor] = []

    def choose(given: Tensor) -> Tensor:
        steps.append(given)
        return torch.tensor([text.ids[len(steps) - 1 - more] for text in texts])

    for _ in zip(range(more), decode(tower, logits, mask, lengths, cache, choose, seen), strict=False):
        pass
    expected = torch.cat([logits[-more - 1 : -1] for logits in whole])
    assert_same(torch.stack(steps, dim=1).flatten(0, 1), expected)


@torch.no_grad()
def test_a_text_read_in_pieces_is_what_is_read_in_one_pass(told: Told):
    model, tower = told.model, told.model.language
    for text, logits in zip(told.texts, told.logits, strict=True):
        if len(text.images) < 2:
            continue
        ids, looks = torch.tensor([text.ids]), torch.tensor([text.looks])
        whole = model.sight(model.see(model.vision.preprocess(text.images)).memory, looks, torch.zeros_like(ids))
        assert whole is not None
        cache, found = tower.empty_cache(), []
        for begin, end in ((0, 1), (1, 5), (5, len(text.ids))):
            at = (torch.zeros(end - begin, dtype=torch.long), torch.arange(end - begin))
            read, positions = torch.ones(1, end, dtype=torch.long), torch.arange(begin, end)[None]
            piece = slice(begin, end)
            found.append(tower(tower.embed(ids[:, piece]), read, positions, at, cache, whole.of(piece)))
        assert_same(torch.cat(found), logits)


@torch.no_grad()
@ways_of_seeing
def test_what_stands_before_a_picture_does_not_know_it(
    vision: VisionTower, tower: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, tower, sees=sees)
    a, b, c = pictures
    first, second, other = questions(
        template,
        ["Is ", a, " larger than ", b, "?"],
        ["Is ", a, " larger than ", c, "?"],
        ["Is ", c, " larger than ", b, "?"],
    )
    one, two, three = alone(model, [first, second, other])
    begin, again = first.looks.index(1), first.looks.index(2)
    assert begin > 0
    assert len({len(text.ids) for text in (first, second, other)}) == 1
    assert torch.equal(one[:again], two[:again])
    assert torch.equal(one[:begin], three[:begin])
    assert ((one[again:] - two[again:]).abs().amax(1) > 1e-3).all(), "a picture of no consequence"
    assert ((one[begin:again] - three[begin:again]).abs().amax(1) > 1e-3).all(), "a picture of no consequence"


@torch.no_grad()
@ways_of_seeing
def test_a_text_does_not_see_the_pictures_of_those_beside_it(
    vision: VisionTower, family: LanguageTower, pictures: list[Image.Image], sees: str
):
    model, template = fused(vision, family, sees=sees)
    a, b, c = pictures
    middle = questions(template, ["Is ", a, " larger?"])[0]

    def between(before: Image.Image, after: Image.Image) -> Tensor:
        left, right = questions(template, [before, "Name it."], ["Is ", after, " a cat?"])
        logits = logits_of(model, batch_of(model, [side_by_side([left, middle, right])]))
        return logits[len(left.ids) : -len(right.ids)]

    found = between(b, b)
    assert torch.equal(found, between(c, c))
    assert_same(found, alone(model, [middle])[0])


@torch.no_grad()
def test_the_attention_gives_exactly_nothing_where_there_is_nothing_to_see():
    block: Any = opened(Flamingo(16, 4, 32, 2, **SMALL)).blocks["0"]
    hidden, memory = torch.randn(2, 6, 32), torch.randn(2, 3, 16)
    mask = torch.zeros(2, 1, 6, 3, dtype=torch.bool)
    mask[0, :, 4:] = True
    found = block(hidden, block.keys_values(memory), mask)
    block.attention_gate.zero_()
    nothing = block(hidden, block.keys_values(memory), mask)
    assert torch.equal(found[1], nothing[1])
    assert torch.equal(found[0, :4], nothing[0, :4])
    assert ((found - nothing)[0, 4:].abs().amax(1) > 1e-3).all()
    assert ((found - hidden).abs().amax(2) > 1e-3).all(), "the feed-forward works on every token"


def seen_by(sees: Any, looks: list[int], segments: list[int], pictures: int) -> list[set[int]]:
    """The numbers of the pictures that each position of a row sees."""
    bridge = Flamingo(16, 4, 32, 1, sees=sees, **{**SMALL, "latents": 1})
    row = torch.tensor([looks])
    found = sight(bridge, torch.randn(pictures, 1, 16), row, visible(torch.tensor([segments])))
    there = row[row > 0].unique().tolist() or [0]
    return [{there[i] for i in places.nonzero()[:, 0].tolist()} for places in found.mask[0, 0]]


def test_a_position_sees_the_last_picture_or_all_of_its_own_text():
    plain = ([0, 3, 3, 4, 4, 0], [0, 0, 0, 0, 0, -1])
    assert seen_by("last", *plain, 5)[:-1] == [set(), {3}, {3}, {4}, {4}]
    assert seen_by("all", *plain, 5)[:-1] == [set(), {3}, {3}, {3, 4}, {3, 4}]
    packed = ([0, 1, 1, 2, 1, 3, 0], [0, 0, 1, 1, 2, 2, -1])
    assert seen_by("last", *packed, 3)[:-1] == [set(), {1}, {1}, {2}, {1}, {3}]
    assert seen_by("all", *packed, 3)[:-1] == [set(), {1}, {1}, {1, 2}, {1}, {1, 3}]
    assert seen_by("all", [0, 1, 0, 0, 2], [1, 1, 2, 2, 2], 2) == [set(), {1}, set(), set(), {2}]


@ways_of_seeing
def test_markers_and_pictures_of_other_numbers_are_refused_both_ways(
    vision: VisionTower, conversations: list[list[Turn]], llama: LanguageTower, sees: str
):
    model, template = fused(vision, llama, sees=sees)
    batch = batch_of(model, [pack([template.encode(turns)]) for turns in conversations])
    pixels = batch.pixel_values
    assert pixels is not None
    for given, number in ((pixels[:-1], 6), (None, 0), (torch.cat([pixels, pixels[:2]]), 9)):
        with pytest.raises(ValueError, match=rf"^the texts look at 7 pictures, and there are {number};"):
            logits_of(model, replace(batch, pixel_values=given))


@torch.no_grad()
@ways_of_seeing
def test_turns_of_a_session_are_read_as_the_conversation_in_one_go(
    built: Assembled, pictures: list[Image.Image], sees: str
):
    assembled = build(replace(built.recipe, bridge={"name": "flamingo", "sees": sees, **SMALL}))
    model, template, _ = assembled
    assert isinstance(model.bridge, Flamingo)
    opened(model.bridge)
    a, b, c = pictures
    replies, steps = ["Two small birds.", "Yes, it is.", "A blue car.", "No."], []
    session = Session(assembled)
    asked = [[a, "What is it?"], ["Is it a cat?"], ["Look: ", b, " and ", c, ". Name it."], ["Is ", a, " larger?"]]
    for words, reply in zip(asked, replies, strict=True):
        ids = iter([*template.tokenizer(reply, add_special_tokens=False)["input_ids"], template.tokenizer.eos_token_id])

        def choose(logits: Tensor, ids: Any = ids) -> Tensor:
            steps.append(logits)
            return torch.tensor([next(ids)])

        session.append(Turn("user", words))
        assert "".join(session.stream(16, choose)) == reply
    text = template.encode(session.turns)
    targets = [place for place, label in enumerate(text.labels) if label >= 0]
    assert len(targets) > 12
    assert_same(torch.cat(steps), alone(model, [text])[0][torch.tensor(targets) - 1])
    assert len(images_of(session.turns)) == 4


def test_nothing_is_kept_for_the_layers_below_the_first_block(
    vision: VisionTower, conversations: list[list[Turn]], tmp_path: Path
):
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 5, "intermediate_size": 48}
    config = LlamaConfig(**sizes, vocab_size=len(chatml_tokenizer()))
    language = LanguageTower(str(saved(config, tmp_path)), dtype=torch.float32)
    model, template = fused(vision, language, every=2, offset=2)
    batch = batch_of(model, [pack([template.encode(turns)]) for turns in conversations])
    kept, entered, entering = Counter(), {}, ["bridge"]

    def enters(index: int) -> Callable[..., None]:
        return lambda *_: entering.append(f"layer {index}")

    def has_entered(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: entered.update(
            {index: (args[0] if args else kwargs["hidden_states"]).requires_grad}
        )

    for index, layer in enumerate(language.layers):
        layer.register_forward_pre_hook(enters(index), prepend=True)  # before its block
        layer.register_forward_pre_hook(has_entered(index), with_kwargs=True)  # after it

    def keep(tensor: Tensor) -> Tensor:
        kept.update(entering[-1:])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = language_loss(model, batch)
    assert entered == {0: False, 1: False, 2: True, 3: True, 4: True}
    assert set(kept) == {"bridge", "layer 2", "layer 3", "layer 4"}
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.bridge.parameters())


def test_layers_of_every_family_are_found_and_run_in_their_order(tower: LanguageTower):
    assert len(tower.layers) == tower.num_layers == 2
    ran: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: ran.append(layer)) for layer in tower.layers]
    tower.model(torch.tensor([[3, 4, 5]]))
    for hook in hooks:
        hook.remove()
    assert ran == tower.layers
    assert len({type(layer) for layer in tower.layers}) == 1
    assert decoder_layers(tower.model, 3) == []


def test_a_language_model_without_a_list_of_its_layers_is_refused(recipe: Any, tmp_path: Path):
    sizes: dict[str, Any] = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32)
    heads: dict[str, Any] = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    decoder: dict[str, Any] = dict(is_decoder=True, is_encoder_decoder=False, tie_word_embeddings=False)
    # says that it has as many layers as its encoder has, which is not there
    config = BartConfig(
        vocab_size=len(chatml_tokenizer()), encoder_layers=2, decoder_layers=3, **sizes, **heads, **decoder
    )
    BartForCausalLM(config).save_pretrained(tmp_path / "bart")
    chatml_tokenizer().save_pretrained(tmp_path / "bart")
    language = replace(recipe.language, name=str(tmp_path / "bart"))
    with pytest.raises(
        ValueError, match=r"^flamingo puts blocks between the layers of a decoder, and .*bart shows no list of layers$"
    ):
        build(replace(recipe, language=language, bridge={"name": "flamingo", **SMALL}))
    build(replace(recipe, language=language))


@pytest.mark.parametrize("wrong", [{"every": 3}, {"every": 0}, {"every": 2, "offset": 2}, {"offset": 5}])
def test_blocks_where_there_is_no_layer_are_refused(recipe: Any, wrong: dict[str, int]):
    every, offset = wrong.get("every", 1), wrong.get("offset", 0)
    with pytest.raises(
        ValueError, match=f"^blocks before every {every}. layer from {offset} on: .* has 2 layers; choose a smaller .*$"
    ):
        build(replace(recipe, bridge={"name": "flamingo", **SMALL, **wrong}))


def test_an_encoder_decoder_is_refused(recipe: Any, tiny_t5: Path):
    language = replace(recipe.language, name=str(tiny_t5), template="t5")
    with pytest.raises(ValueError, match=r"^flamingo puts blocks .* has an encoder; choose a causal language model$"):
        build(replace(recipe, language=language, bridge={"name": "flamingo", **SMALL}))


@ways_of_seeing
def test_layers_computed_again_give_the_same_gradients_and_keep_less(
    vision: VisionTower, tower: LanguageTower, conversations: list[list[Turn]], sees: str, tmp_path: Path
):
    """Gradient checkpointing, of the layers and of the blocks before them."""
    again = LanguageTower(tower.name, dtype=tower.dtype)
    again.checkpoint_gradients()
    found = []
    for language in (tower, again):
        model, template = fused(vision, language, sees=sees)
        rows = [pack([template.encode(turns)]) for turns in conversations]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            loss, _ = language_loss(model, batch_of(model, rows))
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.bridge.named_parameters()}, sum(kept)))
    (loss, gradients, bytes_kept), (other, others, fewer) = found
    torch.testing.assert_close(other, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, msg=name)
    assert fewer < 0.7 * bytes_kept
