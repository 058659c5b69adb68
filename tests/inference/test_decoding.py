"""Many answers at once are the answers one at a time; what is drawn is drawn from where it should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chatml_tokenizer, randomise, tiny_language
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, MptConfig

from bridges.build import Assembled
from bridges.config import Recipe
from bridges.data.conversation import Turn, images_of
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.inference.decoding import Choose, answers, greedy, room, until_end
from bridges.inference.sampling import sampler
from bridges.inference.session import Session
from bridges.model import BridgedModel
from bridges.projector import Projector
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower


@pytest.fixture
def prompts(pictures: list[Image.Image]) -> list[list[Turn]]:
    """Of different lengths, with one picture, none, two, and with a conversation before."""
    return [
        [Turn("user", [pictures[0], "What is in the picture?"])],
        [Turn("user", ["Name it."])],
        [Turn("user", [pictures[1], "Is it larger than", pictures[2], "? Describe the image."])],
        [Turn("user", ["Is it a cat?"]), Turn("assistant", ["No. A dog."]), Turn("user", [pictures[2], "And now?"])],
    ]


def recorded(steps: list[Tensor]) -> Choose:
    """Greedy, and keeps the logits."""

    def choose(logits: Tensor) -> Tensor:
        steps.append(logits)
        return greedy(logits)

    return choose


def said(assembled: Assembled, prompts: list[list[Turn]], count: int = 12) -> tuple[Tensor, Tensor]:
    """(ids "b t", logits "b t vocab") of greedy answers of just `count` tokens."""
    steps: list[Tensor] = []
    ends, assembled.model.language.end_ids = assembled.model.language.end_ids, frozenset()
    answers(assembled, prompts, max_new_tokens=count, choose=recorded(steps))
    assembled.model.language.end_ids = ends
    logits = torch.stack(steps, dim=1)
    return logits.argmax(-1), logits


def same_as_one_at_a_time(assembled: Assembled, prompts: list[list[Turn]]) -> None:
    ids, logits = said(assembled, prompts)
    for row, prompt in enumerate(prompts):
        alone, logits_alone = said(assembled, [prompt])
        assert ids[row].tolist() == alone[0].tolist()
        torch.testing.assert_close(logits[row], logits_alone[0], atol=1e-4, rtol=1e-4)
    assert logits.std(0).mean() > 0.01, "answers that are all alike would hide a mix-up"


def test_a_batch_answers_as_each_prompt_alone(assembled: Assembled, prompts: list[list[Turn]]) -> None:
    same_as_one_at_a_time(assembled, prompts)


def between(clip: Path, language: LanguageTower, recipe: Recipe) -> Assembled:
    """A fresh projector between the two."""
    vision = VisionTower(str(clip))
    torch.manual_seed(0)
    bridge = Projector(vision.dim, vision.num_patches, language.dim, language.num_layers)
    bridge.match_scale(language.embedding_rms())
    model = BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID)
    return Assembled(model, Template(language.tokenizer, bridge.num_slots), recipe)


def test_every_family_answers_a_batch_as_each_prompt_alone(
    family: LanguageTower, tiny_clip: Path, recipe: Recipe, prompts: list[list[Turn]]
) -> None:
    same_as_one_at_a_time(between(tiny_clip, family, recipe), prompts)


@pytest.mark.parametrize(
    "config", [BloomConfig(hidden_size=32, n_layer=2, n_head=4), MptConfig(d_model=32, n_layers=2, n_heads=4)]
)
def test_a_model_with_alibi_answers_a_batch_as_each_prompt_alone(
    config: Any, tiny_clip: Path, recipe: Recipe, prompts: list[list[Turn]], tmp_path: Path
) -> None:
    tokenizer = chatml_tokenizer()
    config.vocab_size = len(tokenizer)
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    language = LanguageTower(str(tmp_path), dtype=torch.float32)
    same_as_one_at_a_time(between(tiny_clip, language, recipe), prompts)


def test_a_model_with_a_short_window_answers_a_batch_as_each_prompt_alone(
    tiny_clip: Path, recipe: Recipe, prompts: list[list[Turn]], tmp_path: Path
) -> None:
    folder = tiny_language("mistral", tmp_path, sliding_window=24)
    same_as_one_at_a_time(between(tiny_clip, LanguageTower(str(folder), dtype=torch.float32), recipe), prompts)


def test_the_common_beginning_is_read_once_for_all_and_changes_nothing(
    assembled: Assembled, prompts: list[list[Turn]]
) -> None:
    widths: list[int] = []
    assembled.model.language.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    said(assembled, prompts, 1)
    beginning = len(assembled.template.tokenizer("<|im_start|>user\n")["input_ids"])
    longest = max(len(assembled.template.encode(prompt, reply=True).ids) for prompt in prompts)
    assert widths == [beginning, longest - beginning]
    said(assembled, prompts, 1)
    assert widths[2:] == [longest - beginning], "it is kept for the next batch"
    ids, logits = said(assembled, prompts)
    for row, prompt in enumerate(prompts):
        for_itself = Session(assembled)  # has no prefix
        for turn in prompt:
            for_itself.append(turn)
        steps: list[Tensor] = []
        list(for_itself.stream(12, recorded(steps)))
        torch.testing.assert_close(torch.cat(steps), logits[row, : len(steps)], atol=1e-4, rtol=1e-4)
        assert torch.cat(steps).argmax(-1).tolist() == ids[row, : len(steps)].tolist()


def test_features_may_replace_the_pictures(assembled: Assembled, prompts: list[list[Turn]]) -> None:
    vision = assembled.model.vision
    features = vision(vision.preprocess([picture for prompt in prompts for picture in images_of(prompt)]))
    expected = answers(assembled, prompts, max_new_tokens=8)
    assert answers(assembled, prompts, features, max_new_tokens=8) == expected
    assert answers(assembled, prompts, features.flip(0), max_new_tokens=8) != expected


def test_an_answer_ends_at_its_end_token_though_others_go_on(assembled: Assembled, prompts: list[list[Turn]]) -> None:
    language = assembled.model.language
    ids, _ = said(assembled, prompts)
    language.end_ids = frozenset({int(ids[0, 3])})
    stop = [until_end(row, language.end_ids) for row in ids.tolist()]
    assert len(stop[0]) <= 3 < max(len(row) for row in stop)
    assert answers(assembled, prompts, max_new_tokens=12) == [language.decode(row).rstrip("\ufffd") for row in stop]


def test_a_prompt_without_room_for_its_answer_is_refused_with_the_numbers(
    assembled: Assembled, prompts: list[list[Turn]]
) -> None:
    longest = max(len(assembled.template.encode(prompt, reply=True).ids) for prompt in prompts)
    assert len(answers(assembled, prompts[:1], max_new_tokens=1)) == 1
    with pytest.raises(
        ValueError, match=rf"prompt of {longest} tokens and an answer of {513 - longest} exceed the 512"
    ):
        answers(assembled, prompts, max_new_tokens=513 - longest)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        answers(assembled, prompts, max_new_tokens=0)
    room(assembled.model.language, 500, 12)
    with pytest.raises(ValueError, match="prompt is empty"):
        room(assembled.model.language, 0, 12)


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])


def drawn(temperature: float, top_p: float, seed: int = 0, rows: int = 4000) -> Tensor:
    """How often each of five tokens is drawn, as a share."""
    tokens = sampler(temperature, top_p, seed)(LOGITS.expand(rows, -1))
    return tokens.bincount(minlength=len(LOGITS)) / rows


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_model_says(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(drawn(temperature, 1.0), expected, atol=0.03, rtol=0)


@given(top_p=st.floats(0.01, 0.99), temperature=st.floats(0.3, 3.0), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_only_the_smallest_set_with_top_p_of_the_probability_is_drawn_from(
    top_p: float, temperature: float, seed: int
) -> None:
    cumulative = (LOGITS / temperature).softmax(-1).cumsum(-1)  # they are in order already
    size = int((cumulative < top_p).sum()) + 1
    shares = drawn(temperature, top_p, seed)
    assert shares[size:].sum() == 0
    nucleus = (LOGITS[:size] / temperature).softmax(-1)
    torch.testing.assert_close(shares[:size], nucleus, atol=0.05, rtol=0)


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    rows = LOGITS.expand(50, -1)
    one, again, other = sampler(1.0, 1.0, 3), sampler(1.0, 1.0, 3), sampler(1.0, 1.0, 4)
    first = one(rows)
    assert torch.equal(first, again(rows))
    assert not torch.equal(first, other(rows))
    assert not torch.equal(first, one(rows)), "the next token is drawn anew"


def test_temperature_0_takes_the_likeliest() -> None:
    assert drawn(0.0, 0.5).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [(-1.0, 1.0, "temperature -1.0 is below 0"), (1.0, 0.0, "top_p 0.0 must be"), (0.0, 1.5, "top_p 1.5 must be")],
)
def test_settings_of_no_meaning_are_refused(temperature: float, top_p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(temperature, top_p, 0)
