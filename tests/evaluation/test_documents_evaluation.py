"""What a document says after a picture is of that picture, or of another one of the document."""

import pytest
from conftest import CHATML
from PIL import Image

from bridges.build import Assembled
from bridges.data.conversation import Conversation, Example, Turn
from bridges.data.documents import END
from bridges.data.scene_documents import SceneDocuments
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.evaluation.documents import pieces, right_picture, up_to_pictures
from bridges.evaluation.tasks import Said, listen, tabulate
from bridges.objectives.controls import CONTROLS

NOUNS = {"cat", "dog", "bird", "car"}


def document(*nouns: str) -> Example:
    """A picture and a text for each noun."""
    parts = [part for noun in nouns for part in (Image.new("RGB", (8, 8)), f"A {noun}.{END}")]
    turns = [Turn("user", parts[:1]), Turn("assistant", parts[1:])]
    return Example([Conversation(turns, "document")], frozenset(nouns))


@pytest.mark.parametrize("slots", [3, 0])
def test_a_prompt_ends_with_its_picture(built: Assembled, slots: int) -> None:
    template = Template(built.template.tokenizer, slots, CHATML)
    example = document("cat", "dog", "bird")
    prompts = up_to_pictures(template, example.conversations[0])
    assert [len(prompt.images) for prompt in prompts] == [2, 3]
    for number, prompt in enumerate(prompts, start=2):
        assert prompt.ids[-len(template.tag) :] == template.tag
        assert prompt.looks[-len(template.tag) :] == [number] * len(template.tag)
        words = template.tokenizer.decode([token for token in prompt.ids if token != IMAGE_TOKEN_ID])
        assert ("dog" in words, "bird" in words) == (number == 3, False), "it may not read what it is to say"


def test_a_picture_is_the_right_one_if_no_other_has_as_much_of_what_was_said() -> None:
    shown = [frozenset({"cat", "dog"}), frozenset({"dog", "car"}), frozenset({"bird"})]
    assert right_picture(frozenset({"dog", "car"}), shown, 1)
    assert not right_picture(frozenset({"dog", "car"}), shown, 0)
    assert not right_picture(frozenset({"dog"}), shown, 1), "it is in two"
    assert not right_picture(frozenset(), shown, 2)


def test_the_table_tells_how_often_beside_its_baselines() -> None:
    said = [
        Said(
            document(*nouns),
            nll=dict.fromkeys(CONTROLS, (1.0, 1)),
            captions={},
            answers={c: [] for c in CONTROLS},
            continued={"image": told, "shuffled": [f"A {n}." for n in nouns[:-1]], "blank": ["", ""][: len(told)]},
        )
        for nouns, told in [(("cat", "dog", "bird"), ["A dog.", "A bird."]), (("cat", "car"), ["A cat."])]
    ]
    assert pieces(said[0].example) == [f"A {noun}.{END}" for noun in ("cat", "dog", "bird")]
    table = tabulate(said, lambda text: frozenset(w.strip(".\n") for w in text.split()) & NOUNS)
    figures = table["right_picture"]
    assert (figures["image"], figures["shuffled"], figures["blank"], figures["n"]) == (2 / 3, 0, 0, 3)
    assert figures["majority"] == pytest.approx((2 * 1 / 3 + 1 / 2) / 3)


def test_documents_of_scenes_go_on_under_every_control(assembled: Assembled) -> None:
    examples = list(SceneDocuments("val", 3, questions=1))
    for example, one in zip(examples, listen(assembled, examples), strict=True):
        for control in CONTROLS:
            assert len(one.continued[control]) == len(pieces(example)) - 1
            assert all(END not in text for text in one.continued[control])
