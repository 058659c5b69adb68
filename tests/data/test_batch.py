import re

import pytest
import torch
from conftest import chatml_tokenizer
from PIL import Image

from bridges.data.batch import Batch, collate, common_text, pack, rows_of, shorten
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID, Encoded, Template

SLOTS = 4
CAT, DOG = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))
VOCABULARY = ["<user>", "<assistant>", "Is", "it", "a", "cat?", "Yes.", "Name", "it.", "A", "cat."]
WORDS = {word: number for number, word in enumerate(VOCABULARY, 10)}


def text(words: str, images: list[Image.Image], said: int = 1) -> Encoded:
    """Ids of a drawn text, where P is a picture's slot; the last `said` words are the target."""
    ids = [IMAGE_TOKEN_ID if word == "P" else WORDS[word] for word in words.split()]
    looks = [-(-ids[: place + 1].count(IMAGE_TOKEN_ID) // SLOTS) for place in range(len(ids))]
    return Encoded(ids, [IGNORE_INDEX] * (len(ids) - said) + ids[-said:], images, looks=looks)


def test_the_drawing_of_a_packed_row_is_what_pack_does():
    lines = [line for line in (pack.__doc__ or "").splitlines() if "<user>" in line]
    drawn = [re.split(r"\s+(?:segments|positions)\s+", line.strip()) for line in lines]
    texts = [
        text(words.replace("PPPP", "P P P P"), [CAT], said) for (words, _), said in zip(drawn, (1, 2), strict=True)
    ]
    segments, positions = ([*figures.split()] for _, figures in drawn)
    # "0000" and "1234" are written without spaces, as the slots are
    segments = [*segments[0], *segments[1], *segments[2:]]
    positions = [*positions[0], *positions[1], *positions[2:]]
    row = pack(texts)
    assert row.segments == [int(s) for s in segments]
    assert row.positions == [int(p) for p in positions]
    shared = row.segments.count(0)
    assert row.ids == texts[0].ids + texts[1].ids[shared:]
    assert row.labels == texts[0].labels + texts[1].labels[shared:]
    assert row.images == [CAT]


def test_one_text_is_a_plain_row():
    row = pack([text("<user> P P P P Is it", [CAT])])
    assert row.segments == [0] * 7
    assert row.positions == list(range(7))


def test_other_pictures_are_not_shared_though_their_tokens_are_alike():
    first = text("<user> P P P P Is it", [CAT])
    assert pack([first, text("<user> P P P P Name it.", [CAT])]).images == [CAT]
    row = pack([first, text("<user> P P P P Name it.", [DOG])])
    assert row.segments == [0] + [1] * 6 + [2] * 6
    assert [id(image) for image in row.images] == [id(CAT), id(DOG)]


def test_of_several_pictures_those_at_the_beginning_are_shared():
    row = pack([text("<user> P P P P Is P P P P it", [CAT, DOG]), text("<user> P P P P Name P P P P it.", [CAT, CAT])])
    assert row.ids.count(IMAGE_TOKEN_ID) == SLOTS * len(row.images)
    assert [id(image) for image in row.images] == [id(CAT), id(DOG), id(CAT)]


def test_what_the_assistant_says_is_nobodys_to_share():
    same = "<user> P P P P Is it <assistant> Yes."
    row = pack([text(same, [CAT]), text(same, [CAT]), text(same, [CAT])])
    assert row.segments == [0] * 8 + [1, 2, 3]
    assert [label for label in row.labels if label != IGNORE_INDEX] == [WORDS["Yes."]] * 3


def test_a_text_that_another_begins_with_keeps_a_token_of_its_own():
    row = pack([text("<user> Is", [], said=1), text("<user> Is it a", [])])
    assert row.segments == [0, 1, 2, 2, 2]


def test_a_text_that_is_too_long_is_cut_at_its_end_but_never_through_a_picture():
    long = text("<user> P P P P Is it a cat?", [CAT])
    cut = shorten(long, 6)
    assert (cut.ids, cut.labels, cut.images) == (long.ids[:6], long.labels[:6], [CAT])
    assert shorten(long, 9) is shorten(long, None) is long
    with pytest.raises(ValueError, match=r"text of 9 tokens has pictures beyond max_length 4; raise data.max_length"):
        shorten(long, 4)


@pytest.fixture(scope="module")
def template() -> Template:
    return Template(chatml_tokenizer(), SLOTS)


def test_texts_about_the_same_picture_are_one_row_or_one_each_where_nothing_can_be_shared(template: Template):
    example = Example([ask("Is it a cat?", "Yes.", CAT), ask("Name it.", "A cat.", CAT)])
    (together,) = rows_of(example, template)
    apart = rows_of(example, template, share=False)
    assert len(apart) == 2
    assert len(together.images) == 1
    assert max(together.segments) == 2
    assert [max(row.segments) for row in apart] == [0, 0]

    def targets(rows):
        return [label for row in rows for label in row.labels if label != IGNORE_INDEX]

    assert targets([together]) == targets(apart)
    assert len(together.ids) < sum(len(row.ids) for row in apart)


def collated(left: bool, share: bool = True) -> Batch:
    texts = [text("<user> Is P P P P it", [CAT]), text("<user> Is it a cat? P P P P P P P P Yes.", [DOG, CAT])]
    pictures = []

    def preprocess(images: list[Image.Image]) -> torch.Tensor:
        pictures.extend(images)
        return torch.zeros(len(images), 3, 2, 2)

    batch = collate([pack([t]) for t in texts], preprocess, left, share)
    assert [id(picture) for picture in pictures] == [id(CAT), id(DOG), id(CAT)], "not in reading order"
    return batch


def test_padding_on_the_right_belongs_to_nobody():
    batch = collated(left=False)
    assert batch.input_ids.shape == (2, 14)
    assert batch.segments.tolist() == [[0] * 7 + [-1] * 7, [0] * 14]
    assert batch.positions[0].tolist() == [*range(7), *[0] * 7]
    assert batch.num_targets == 2
    assert (batch.labels[0, 7:] == IGNORE_INDEX).all()


def test_padding_for_generation_stands_between_the_common_text_and_the_rest():
    batch = collated(left=True)
    assert batch.segments.tolist() == [[0, 0] + [-1] * 7 + [0] * 5, [0] * 14]
    assert batch.positions[0].tolist() == [0, 1, *[0] * 7, 2, 3, 4, 5, 6]
    assert batch.input_ids[:, -1].tolist() == [WORDS["it"], WORDS["Yes."]]


def test_padding_stands_in_front_where_nothing_can_be_shared():
    batch = collated(left=True, share=False)
    assert batch.segments.tolist() == [[-1] * 7 + [0] * 7, [0] * 14]
    assert batch.positions[0].tolist() == [*[0] * 7, *range(7)]


def test_common_text_ends_at_a_difference_a_picture_or_the_end_of_a_row():
    p = IMAGE_TOKEN_ID
    assert common_text([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_text([[1, p, 3], [1, p, 3]]) == 1
    assert common_text([[1, 2], [1, 2, 4]]) == 2
    assert common_text([[5, 2], [1, 2, 4]]) == 0


def test_a_batch_moves_as_a_whole():
    batch = collated(left=False).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 5
    assert all(value.is_meta for value in tensors)


def test_a_conversation_without_pictures_makes_a_row_too(template: Template):
    (row,) = rows_of(Example([Conversation([Turn("user", ["Hi."]), Turn("assistant", ["Yes."])])]), template)
    assert row.images == []
    assert IMAGE_TOKEN_ID not in row.ids
