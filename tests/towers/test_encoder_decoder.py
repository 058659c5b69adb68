"""A T5 behind the interface of a causal model says, and learns, what transformers' own says and learns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import captioned, randomise, t5_tokenizer, tiny_encoder_decoder, tiny_language, tiny_recipe, tiny_vision
from PIL import Image
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration

from bridges.build import Assembled, build
from bridges.checkpoint import load
from bridges.config import Recipe
from bridges.data.batch import collate, rows_of
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID, Template
from bridges.inference.decoding import Choose, answers, greedy, until_end
from bridges.inference.session import Session
from bridges.layout import predecessors
from bridges.model import BridgedModel
from bridges.objectives.language import language_loss, target_nll
from bridges.projector import Projector
from bridges.towers.encoder_decoder import EncoderDecoderTower, language_tower, runs
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower
from bridges.training.loop import train


def bridged(clip: Path, t5: Path, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Assembled:
    """A T5 with four slots a picture, all weights of consequence."""
    vision = VisionTower(str(clip), layer=-2, dtype=torch.float32)
    language = EncoderDecoderTower(str(t5), dtype=dtype)
    bridge = Projector(vision.dim, vision.num_patches, language.dim, language.num_layers, depth=2, merge="shuffle")
    randomise(bridge).to(dtype)
    template = Template(language.tokenizer, bridge.num_slots, "t5")
    return Assembled(BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID), template, recipe)


@pytest.fixture
def two_halves(tiny_clip: Path, tiny_t5: Path, recipe: Recipe) -> Assembled:
    return bridged(tiny_clip, tiny_t5, recipe)


@pytest.fixture
def chats(pictures: list[Image.Image]) -> list[Conversation]:
    """With one picture, none, two of them and three answers, and one again."""
    a, b, c = pictures
    several = [Turn("user", ["Is ", b, " larger than ", c, "?"]), Turn("assistant", ["No."]), Turn("user", ["Sure?"])]
    several += [Turn("assistant", ["Yes. The house is larger."]), Turn("user", ["And it?"])]
    return [
        ask("Is it a cat?", "No.", a),
        Conversation([Turn("user", ["How many birds are there?"]), Turn("assistant", ["Four, I think."])]),
        Conversation([*several, Turn("assistant", ["Four."])]),
        ask("Describe the image.", "Two small birds sit above the blue car.", c),
    ]


def heard(assembled: Assembled, turns: Sequence[Turn]) -> Tensor:
    """What the encoder is to read, put together by hand: words from the table, a picture's slots in its place."""
    model, template, _ = assembled
    text = template.encode(turns, reply=True)
    parts, place = [], 0
    slots = list(model.bridge(model.vision(model.vision.preprocess(text.images)).to(model.language.dtype)).slots)
    while place < len(text.ids):
        if text.ids[place] == IMAGE_TOKEN_ID:
            parts.append(slots.pop(0))
            place += model.bridge.num_slots
        else:
            parts.append(model.language.model.shared(torch.tensor([text.ids[place]])))
            place += 1
    assert not slots
    return torch.cat(parts)[None]


def reference_loss(assembled: Assembled, reference: T5ForConditionalGeneration, chats: list[Conversation]) -> Tensor:
    """Each answer by itself, with transformers' own loss, summed."""
    total = torch.zeros((), dtype=torch.float64)
    for chat in chats:
        for place, turn in enumerate(chat.turns):
            if turn.role == "assistant":
                said = f"{turn.content[0]}</s>"
                labels = torch.tensor([assembled.template.tokenizer(said, add_special_tokens=False)["input_ids"]])
                out = reference(inputs_embeds=heard(assembled, chat.turns[:place]), labels=labels)
                total = total + out.loss * labels.numel()
    return total


@pytest.mark.parametrize("tied", [False, True], ids=["Flan-T5", "the first T5, which scales its logits"])
def test_the_loss_and_its_gradient_are_those_of_transformers(
    tiny_clip: Path, recipe: Recipe, chats: list[Conversation], tmp_path: Path, tied: bool
) -> None:
    kind = "gated-gelu" if not tied else "relu"
    folder = tiny_encoder_decoder(tmp_path, tie_word_embeddings=tied, feed_forward_proj=kind)
    assembled = bridged(tiny_clip, folder, recipe, torch.float64)
    assert assembled.model.language.model.config.scale_decoder_outputs == tied
    reference = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    expected = reference_loss(assembled, reference, chats)
    weights = list(assembled.model.bridge.parameters())
    wanted = torch.autograd.grad(expected, weights)

    rows = rows_of(Example(chats), assembled.template, share=assembled.model.language.shares(1))
    assert len({len(row.ids) for row in rows}) == len(rows) == 4
    batch = collate(rows, assembled.model.vision.preprocess)
    whose, targets = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    at = (whose, predecessors(batch.segments)[whose, targets])
    logits = assembled.model(batch.input_ids, batch.segments, batch.positions, at, batch.pixel_values)
    loss = F.cross_entropy(logits, batch.labels[whose, targets], reduction="sum")
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)  # T5 norms and weighs in float32 in any case
    assert language_loss(assembled.model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, weights), wanted, strict=True):
        assert theirs.abs().max() > 1e-3, "a gradient of no consequence"
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_targets_side_by_side_have_the_likelihood_that_each_row_has_alone(
    two_halves: Assembled, chats: list[Conversation]
) -> None:
    model, template, _ = two_halves
    rows = rows_of(Example(chats), template, share=False)
    together = target_nll(model, collate(rows, model.vision.preprocess))
    alone = torch.cat([target_nll(model, collate([row], model.vision.preprocess)) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def recorded(steps: list[Tensor]) -> Choose:
    """Greedy, and keeps the logits."""

    def choose(logits: Tensor) -> Tensor:
        steps.append(logits)
        return greedy(logits)

    return choose


def said(assembled: Assembled, prompts: Sequence[Sequence[Turn]], count: int = 12) -> Tensor:
    """Logits "b t vocab" of greedy answers of just `count` tokens."""
    steps: list[Tensor] = []
    ends, assembled.model.language.end_ids = assembled.model.language.end_ids, frozenset()
    answers(assembled, prompts, max_new_tokens=count, choose=recorded(steps))
    assembled.model.language.end_ids = ends
    return torch.stack(steps, dim=1)


@torch.no_grad()
def test_greedy_answers_are_those_of_transformers_generate(
    two_halves: Assembled, tiny_t5: Path, chats: list[Conversation]
) -> None:
    reference = T5ForConditionalGeneration.from_pretrained(tiny_t5, dtype=torch.float32).eval()
    prompts = [chat.turns[:-1] for chat in chats]
    spoken = said(two_halves, prompts).argmax(-1).tolist()
    ends = two_halves.model.language.end_ids
    assert ends == {1}
    for prompt, ids in zip(prompts, spoken, strict=True):
        embeds = heard(two_halves, prompt)
        # with a cache, transformers 5.23 fails where the decoder is deeper than the encoder
        own = reference.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False, use_cache=False)[0].tolist()
        assert own[0] == two_halves.model.language.start_id
        assert until_end(ids, ends) == until_end(own[1:], ends)
    assert len({tuple(ids) for ids in spoken}) == 4, "answers that are all alike would hide a mix-up"


def test_a_batch_answers_as_each_prompt_alone(two_halves: Assembled, chats: list[Conversation]) -> None:
    prompts = [chat.turns[:-1] for chat in chats]
    together = said(two_halves, prompts)
    alone = torch.cat([said(two_halves, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert together.argmax(-1).tolist() == alone.argmax(-1).tolist()


@torch.no_grad()
def test_a_session_answers_each_turn_as_the_whole_conversation_read_anew(
    two_halves: Assembled, pictures: list[Image.Image]
) -> None:
    images: list[int] = []
    two_halves.model.vision.register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    session = Session(two_halves)
    images.clear()
    turns = [Turn("user", [pictures[0], "What is in the picture?"]), Turn("user", ["How many birds are there?"])]
    turns += [Turn("user", ["Is ", pictures[1], " larger?"])]
    for turn in turns:
        ours: list[Tensor] = []
        session.append(turn)
        asked, pieces = list(session.turns), list(session.stream(6, recorded(ours)))
        assert session.turns == [*asked, Turn("assistant", ["".join(pieces)])]
        count, theirs = len(images), []
        answers(two_halves, [asked], max_new_tokens=6, choose=recorded(theirs))
        del images[count:]
        torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), atol=1e-4, rtol=1e-4)
    assert images == [1, 1], "an image is encoded once"


def test_a_reply_that_is_broken_off_stays_and_the_talk_goes_on(
    two_halves: Assembled, pictures: list[Image.Image]
) -> None:
    session = Session(two_halves)
    session.append(Turn("user", [pictures[0], "What is in the picture?"]))
    pieces = session.stream(6)
    words = next(pieces) + next(pieces)
    pieces.close()
    assert session.turns[1:] == [Turn("assistant", [words])]
    session.append(Turn("user", ["And now?"]))
    (expected,) = answers(two_halves, [session.turns], max_new_tokens=4)
    assert "".join(session.stream(4)) == expected


def test_the_tower_is_that_of_the_model(tiny_t5: Path, tiny_llama: Path) -> None:
    assert type(language_tower(str(tiny_llama))) is LanguageTower
    tower = language_tower(str(tiny_t5))
    assert isinstance(tower, EncoderDecoderTower)
    assert (tower.dim, tower.num_layers, tower.context, tower.window, tower.start_id) == (32, 2, None, None, 0)
    assert tower.end_ids == {1}
    assert not tower.shares(2)
    every = torch.arange(len(t5_tokenizer()))[None]
    assert tower.embedding_rms() == pytest.approx(tower.embed(every).pow(2).mean().sqrt().item(), rel=0.1)
    assert tower.decode(tower.tokenizer("A cat, and a dog.")["input_ids"]) == "A cat, and a dog."


def test_gradients_pass_through_and_none_stays_behind_nor_does_dropout_wake(tiny_t5: Path) -> None:
    tower = EncoderDecoderTower(str(tiny_t5), dtype=torch.float32).train()
    ids = torch.arange(3, 15)[None]
    mask, at = torch.ones_like(ids), (torch.zeros(4, dtype=torch.long), torch.tensor([3, 4, 8, 9]))
    embeds = tower.embed(ids).clone().requires_grad_()
    logits = tower(embeds, mask, ids, at)
    assert torch.equal(logits, tower(embeds, mask, ids, at))
    logits.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[0, :10].abs().amax(-1).min() > 0
    assert not embeds.grad[0, 10:].any(), "nothing after the last target is read"
    assert all(not p.requires_grad and p.grad is None for p in tower.parameters())
    assert tower(embeds, mask, ids, (ids[0, :0], ids[0, :0])).shape == (0, len(t5_tokenizer()))


def test_neighbouring_columns_are_one_answer() -> None:
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1, 2]), torch.tensor([4, 5, 8, 9, 10, 2, 3])
    whose, last, run, place = runs((rows, columns))
    assert whose.tolist() == [0, 0, 1, 1, 2]
    assert last.tolist() == [4, 8, 9, 2, 3]
    assert run.tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert place.tolist() == [0, 1, 0, 0, 1, 0, 0]


def test_float16_is_never_chosen(tiny_t5: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fastest, chosen in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        monkeypatch.setattr("bridges.towers.language.fastest_dtype", lambda _, fastest=fastest: fastest)
        assert language_tower(str(tiny_t5)).dtype == chosen
        assert language_tower(str(tiny_llama)).dtype == fastest


@torch.no_grad()
def test_bfloat16_is_close_to_float32(tiny_t5: Path) -> None:
    ids = torch.arange(3, 43).view(2, 20)
    at = (torch.tensor([0, 0, 1]), torch.tensor([9, 10, 19]))
    exact, rough = (
        tower(tower.embed(ids), torch.ones_like(ids), ids, at).float()
        for tower in (EncoderDecoderTower(str(tiny_t5), dtype=d) for d in (torch.float32, torch.bfloat16))
    )
    assert (exact - rough).abs().mean() < 0.05 * exact.std()


def test_what_is_no_t5_is_refused_in_one_line(tmp_path: Path) -> None:
    config = BartConfig(vocab_size=200, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    t5_tokenizer().save_pretrained(tmp_path / "bart")
    with pytest.raises(ValueError, match=r"bart is a bart; .* only those built like T5 are known \(T5, Flan-T5"):
        language_tower(str(tmp_path / "bart"))
    with pytest.raises(ValueError, match=r"no folder .*gone"):
        language_tower(str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no language model in '.*empty'"):
        language_tower(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"no causal language model in '.*eye'"):
        language_tower(str(tiny_vision(tmp_path / "eye")))


def test_a_t5_without_a_template_names_the_one_for_it(tiny_clip: Path, tiny_t5: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no chat template; choose one of plain, .*t5"):
        build(tiny_recipe(tiny_clip, tiny_t5, tmp_path))


@pytest.mark.parametrize("template", ["plain", "t5"])
@pytest.mark.parametrize("answer", ["A cat.", "Xylophone? 42!", "猫 it is", " above the house"])
def test_targets_are_the_tokens_that_t5_itself_has_for_the_answer(template: str, answer: str) -> None:
    tokenizer = t5_tokenizer()
    picture = Image.new("RGB", (2, 2))
    encoded = Template(tokenizer, 3, template).encode(ask("", answer, picture).turns)
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == tokenizer(answer)["input_ids"]
    assert encoded.ids[:3] == [IMAGE_TOKEN_ID] * 3


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Eight pictures in a folder with their captions."""
    words = [("cat", "dog", "tree")[i % 3] for i in range(8)]
    return captioned(tmp_path / "pictures", [f"There is a {word} on the left of the red house." for word in words])


@pytest.fixture(params=["t5", "opt"])
def run(request: pytest.FixtureRequest, tiny_clip: Path, tiny_t5: Path, captions: Path, tmp_path: Path) -> Recipe:
    """BLIP-2's two kinds of second stage, with a projector: prefix language modelling through T5, captions through OPT."""
    both = request.param == "t5"
    language = tiny_t5 if both else tiny_language("opt", tmp_path / "opt")
    recipe = tiny_recipe(tiny_clip, language, tmp_path / "run")
    recipe.language.template = "t5" if both else "plain"
    recipe.data = replace(recipe.data, source=str(captions), prompts=[""], prefix=both)
    recipe.train = replace(recipe.train, steps=60, batch=4, lr=1e-1, warmup=2, log_every=1, evaluate_every=30)
    return recipe


def test_it_learns_is_saved_and_loaded_answers_and_chats(run: Recipe, pictures: list[Image.Image]) -> None:
    before = build(run)
    folder = train(run)
    assembled = load(folder)
    assert isinstance(assembled.model.language, EncoderDecoderTower) == run.data.prefix
    chat = ask("", "There is a cat on the left of the red house.", pictures[0], "caption")
    nll = [
        float(language_loss(m.model, collate(rows_of(Example([chat]), m.template), m.model.vision.preprocess))[0])
        for m in (before, assembled)
    ]
    assert nll[1] < nll[0] - 5
    session = Session(assembled)
    for question in ([pictures[0], "There"], ["Is it a cat?"]):
        session.append(Turn("user", list(question)))
        asked = list(session.turns)
        assert "".join(session.stream(8)) == answers(assembled, [asked], max_new_tokens=8)[0]
    assert len(session.turns) == 4


def test_a_step_changes_the_bridge_and_no_bit_of_the_towers(run: Recipe, pictures: list[Image.Image]) -> None:
    model, template, _ = build(run)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = rows_of(Example([ask("", "There is a cat.", pictures[0])]), template)
    model.train()
    loss, targets = language_loss(model, collate(rows, model.vision.preprocess))
    (loss / targets).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("bridge."), name
