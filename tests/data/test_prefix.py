"""The beginning of a caption is read, the rest is learnt; nothing of it is lost, and all else stays as it is."""

import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import captioned, chatml_tokenizer, t5_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bridges.config import Data
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.prefix import Prefixed, split
from bridges.data.sources import open_split
from bridges.data.template import IGNORE_INDEX, Template

PICTURE = Image.new("RGB", (2, 2))
CAPTION = "Two small birds sit above the blue car."


def words_of(conversation: Conversation) -> tuple[str, str]:
    """What is asked, without the picture, and what is said."""
    asked, said = conversation.turns
    assert asked.content[0] is PICTURE
    return "".join(p for p in asked.content if isinstance(p, str)), "".join(str(p) for p in said.content)


@given(caption=st.text(min_size=1, max_size=40), seed=st.integers(0, 99))
def test_both_parts_are_the_caption_and_the_first_is_one_word_to_half_of_them(caption: str, seed: int) -> None:
    read, said = words_of(split(ask("", caption, PICTURE, "caption"), random.Random(seed)))
    assert read + said == caption
    count = len(caption.split())
    if count < 2:
        assert not read
    else:
        assert 1 <= len(read.split()) <= count // 2
        assert len(read.split()) + len(said.split()) == count, "split amid a word"


def test_every_place_is_as_likely() -> None:
    rows = [Example([ask("", CAPTION, PICTURE, "caption")])] * 2000
    prefixed = Prefixed(rows)
    lengths = Counter(len(words_of(prefixed[i].conversations[0])[0].split()) for i in range(len(prefixed)))
    assert set(lengths) == {1, 2, 3, 4}
    assert all(430 < count < 570 for count in lengths.values())


def test_an_example_is_always_split_alike_and_captions_of_one_picture_each_for_itself() -> None:
    rows = [Example([ask("", CAPTION, PICTURE, "caption")] * 3, frozenset({"bird"}))] * 20
    first, again = Prefixed(rows), Prefixed(rows)
    assert len(first) == 20
    assert [first[i] for i in range(20)] == [again[i - 20] for i in range(20)]
    assert any(len({words_of(c) for c in first[i].conversations}) > 1 for i in range(20))
    assert first[0].names == {"bird"}


def test_the_first_words_stand_behind_the_prompt_and_other_conversations_stay() -> None:
    question = ask("Is it a cat?", "No, it is a bird.", PICTURE, "existence")
    (example,) = Prefixed([Example([ask("Describe it.", "A cat.", PICTURE, "caption"), question])])
    assert words_of(example.conversations[0]) == ("Describe it. A", " cat.")
    assert example.conversations[1] is question


@pytest.mark.parametrize("template", ["plain", "t5"])
def test_tokens_of_both_parts_are_those_of_the_caption(template: str) -> None:
    tokenizer = t5_tokenizer() if template == "t5" else chatml_tokenizer()
    whole, halves = ask("", CAPTION, PICTURE, "caption"), Template(tokenizer, 2, template)
    parts = halves.encode(split(whole, random.Random(1)).turns)
    target = [label for label in parts.labels if label != IGNORE_INDEX]
    every = [label for label in halves.encode(whole.turns).labels if label != IGNORE_INDEX]
    assert 1 < len(target) < len(every)
    assert target == every[-len(target) :]
    read = [i for i in parts.ids[: -len(target)] if i >= 0 and i != tokenizer.eos_token_id]
    assert [i for i in read if i != tokenizer.bos_token_id] == every[: -len(target)]


def test_captions_are_split_where_they_are_trained_on_and_whole_where_they_are_held_out(tmp_path: Path) -> None:
    captioned(tmp_path, [CAPTION] * 4, [PICTURE] * 4)
    data = Data(source=str(tmp_path), prompts=[""], prefix=True)
    train, held_out = open_split(data, "train"), open_split(data, "val")
    assert len(train) == 3
    assert train[0].conversations[0].turns[1] != Turn("assistant", [CAPTION])
    assert held_out[0].conversations[0].turns[1] == Turn("assistant", [CAPTION])
    whole = open_split(Data(source=str(tmp_path), prompts=[""]), "train")
    assert whole[0].conversations[0].turns[1] == Turn("assistant", [CAPTION])
