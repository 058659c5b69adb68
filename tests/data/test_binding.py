"""An episode can be answered only by looking: neither names, nor order, nor the last thing shown give it away."""

import re
from collections import Counter
from collections.abc import Iterator

import pytest
from PIL import Image

from bridges.data import binding
from bridges.data.binding import NAMES, Binding, Episode, sprites
from bridges.data.scenes import PICTURES

Shown = list[tuple[str, bytes]]
SETTINGS = [(2, 1, 0), (2, 3, 0), (2, 5, 1), (5, 1, 3), (5, 3, 0)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Image.Image]]:
    """(code, picture) of every sprite that is drawn, with the real drawing."""
    seen: list[tuple[str, Image.Image]] = []
    real = binding.draw

    def watched(code, rng):
        seen.append((code, real(code, rng)))
        return seen[-1][1]

    monkeypatch.setattr(binding, "draw", watched)
    return seen


def supports(episode: Episode, induction: bool = True) -> list[tuple[str, Image.Image]]:
    """(name, picture) in the order shown."""
    *shown, query, question = episode.prompt[int(induction) :]
    assert isinstance(query, Image.Image)
    assert question == "What is this? This is a"
    pairs = []
    for picture, said in zip(shown[::2], shown[1::2], strict=True):
        match = re.fullmatch(r"This is a (\w+)\.\n\n", str(said))
        assert match
        assert isinstance(picture, Image.Image)
        pairs.append((match[1], picture))
    return pairs


def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank pictures, for tests that count many episodes."""
    monkeypatch.setattr(binding, "draw", lambda code, rng: Image.new("RGB", (1, 1)))


@pytest.mark.parametrize(("ways", "shots", "repeats"), SETTINGS)
def test_every_thing_is_shown_in_so_many_pictures_so_many_times(ways: int, shots: int, repeats: int) -> None:
    episode = Binding(ways, shots, repeats)[7]
    shown = supports(episode)
    assert episode.labels == NAMES[:ways]
    assert Counter(name for name, _ in shown) == dict.fromkeys(NAMES[:ways], shots * (1 + repeats))
    for name in episode.labels:
        times = Counter(id(picture) for other, picture in shown if other == name)
        assert list(times.values()) == [1 + repeats] * shots
    different = {picture.tobytes() for _, picture in shown} | {episode.prompt[-2].tobytes()}  # pyright: ignore
    assert len(different) == ways * shots + 1, "no two pictures are equal, and the question's is another"


def test_the_induction_announces_the_labels_or_is_left_out() -> None:
    assert Binding(2)[0].prompt[0] == "Answer with dax or blicket.\n\n"
    assert Binding(5)[0].prompt[0] == "Answer with dax, blicket, slation, perpo or shously.\n\n"
    told, untold = Binding(2, 3)[4], Binding(2, 3, induction=False)[4]
    assert [p if isinstance(p, str) else p.tobytes() for p in told.prompt[1:]] == [
        p if isinstance(p, str) else p.tobytes() for p in untold.prompt
    ]


def test_a_name_means_one_noun_and_the_sprite_of_the_question_is_a_new_one_of_it(drawn) -> None:
    noun_of = {code: noun for noun, codes in PICTURES.items() for code in codes}
    meant: dict[str, set[str]] = {name: set() for name in NAMES}
    for ways, shots, repeats in SETTINGS:
        episodes = Binding(ways, shots, repeats)
        for index in range(8):
            drawn.clear()
            episode = episodes[index]
            code = {id(picture): code for code, picture in drawn}
            codes = {name: {code[id(p)] for other, p in supports(episode) if other == name} for name in episode.labels}
            nouns = {name: {noun_of[c] for c in of} for name, of in codes.items()}
            assert all(len(of) == 1 for of in nouns.values())
            assert len(set().union(*nouns.values())) == ways
            query = code[id(episode.prompt[-2])]
            noun = noun_of[query]
            assert nouns[episode.answer] == {noun}
            assert query not in codes[episode.answer] or len(PICTURES[noun]) == 1
            assert len(codes[episode.answer]) == min(shots, max(1, len(PICTURES[noun]) - 1)), "as many as there are"
            for name, of in nouns.items():
                meant[name] |= of
    assert all(len(nouns) > 5 for nouns in meant.values()), "a name means another noun in every episode"


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_no_name_is_the_answer_more_often_and_none_goes_with_the_last_one_shown(
    ways: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_drawing(monkeypatch)
    size = 4 * ways**2
    found = [(e.answer, supports(e)[-1][0]) for e in episodes(Binding(ways, 3, size=size))]
    assert Counter(found) == {(a, b): 4 for a in NAMES[:ways] for b in NAMES[:ways]}


@pytest.mark.parametrize("place", [0, 1, -2])
def test_what_is_shown_at_no_other_place_tells_the_answer(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    size = 400
    right = sum(supports(e)[place][0] == e.answer for e in episodes(Binding(2, 3, size=size)))
    assert abs(2 * right - size) < 3 * size**0.5


def test_supports_stand_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    without_drawing(monkeypatch)
    orders = Counter(tuple(name for name, _ in supports(e)) for e in episodes(Binding(2, 2, size=120)))
    assert len(orders) == 6
    assert min(orders.values()) >= 8


def test_the_sprites_of_the_things_that_are_not_asked_about_are_chosen_alike() -> None:
    from random import Random

    for noun, codes in PICTURES.items():
        kept, *others = sprites(noun, 5, Random(0))
        assert len(others) == 5
        assert set(others) == (set(codes) - {kept} or {kept})


def test_an_episode_is_a_function_of_seed_and_index() -> None:
    def parts(episode: Episode) -> list[str | bytes]:
        return [part if isinstance(part, str) else part.tobytes() for part in episode.prompt]

    assert parts(Binding(2, 3)[5]) == parts(Binding(2, 3, size=6)[-1])
    assert parts(Binding(2, 3)[5]) != parts(Binding(2, 3, seed=1)[5])
    assert len(Binding(size=3)) == len(list(episodes(Binding(size=3)))) == 3


def episodes(rows: Binding) -> Iterator[Episode]:
    """All, until IndexError."""
    return iter(rows)  # pyright: ignore


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"ways": 6}, "6 ways: there are names for 2 to 5 things"),
        ({"ways": 1}, "1 ways: there are names"),
        ({"shots": 0}, "0 shots and 0 repeats: show at least 1 picture of each thing"),
        ({"repeats": -1}, "1 shots and -1 repeats"),
    ],
)
def test_an_episode_that_cannot_be_is_refused(options: dict[str, int], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Binding(**options)  # pyright: ignore
