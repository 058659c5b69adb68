"""Which demonstrations are chosen, and that none is the query itself."""

import pytest
import torch
from PIL import Image

from bridges.build import Assembled
from bridges.inference.demonstrations import drawn, fixed, gallery, nearest, text_only
from bridges.inference.features import AT_ONCE, Features, key


@pytest.fixture
def features(assembled: Assembled) -> Features:
    return Features(assembled)


def test_the_same_seed_draws_the_same_and_no_demonstration_twice() -> None:
    assert fixed(50, 8, seed=3) == fixed(50, 8, seed=3) != fixed(50, 8, seed=4)
    each = drawn(50, 8, 20, seed=3)
    assert all(len(set(places)) == 8 and max(places) < 50 for places in each)
    assert len({tuple(places) for places in each}) == 20, "each query has its own"
    assert drawn(3, 0, 2) == [[], []]


def test_the_nearest_stand_last_and_the_query_is_not_among_them(
    features: Features, pictures: list[Image.Image]
) -> None:
    one, other, third = pictures
    blends = [Image.blend(one.resize((32, 32)), other.resize((32, 32)), share) for share in (0.6, 0.1, 0.3)]
    pool = [third, blends[0], one.copy(), blends[1], blends[2]]
    (places,) = nearest(gallery(features, pool), gallery(features, [one]), 4)
    assert 2 not in places, "its own copy"
    vectors = features.pooled([one, *pool])
    cosines = vectors[1:] @ vectors[0]
    assert cosines[2] == pytest.approx(1, abs=1e-5)
    assert [cosines[place] for place in places] == sorted(cosines[place] for place in places)
    assert nearest(gallery(features, pool), gallery(features, [one]), 1) == [places[-1:]]


def test_a_gallery_is_looked_at_in_pieces_and_each_picture_once(features: Features) -> None:
    pool = [Image.new("RGB", (32, 32), (shade, 0, 0)) for shade in range(AT_ONCE + 5)]
    found = gallery(features, iter([*pool, pool[0].copy()]))
    assert found.vectors.shape[0] == len(found.keys) == AT_ONCE + 6
    assert features.encoded == AT_ONCE + 5
    torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(AT_ONCE + 6))


def test_pictures_are_equal_by_what_is_in_them() -> None:
    picture = Image.new("RGB", (8, 4), (1, 2, 3))
    assert key(picture) == key(picture.copy()) == key(picture.convert("RGBA"))
    palette = picture.convert("P")
    assert key(palette) == key(palette.convert("RGB"))
    assert key(picture) != key(Image.new("RGB", (4, 8), (1, 2, 3))) != key(Image.new("RGB", (4, 8), (1, 2, 4)))


def test_without_keeping_everything_is_encoded_again(assembled: Assembled, pictures: list[Image.Image]) -> None:
    features = Features(assembled, keep=False)
    twice = features([*pictures, *pictures])
    assert features.encoded == 6
    torch.testing.assert_close(twice, Features(assembled)([*pictures, *pictures]), atol=1e-5, rtol=1e-5)


def test_a_pool_that_is_empty_or_too_small_is_refused(features: Features, pictures: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="pool of demonstrations is empty"):
        fixed(0, 2)
    with pytest.raises(ValueError, match="pool of demonstrations is empty"):
        gallery(features, [])
    with pytest.raises(ValueError, match="4 demonstrations from a pool of 3"):
        drawn(3, 4, 1)
    pool = gallery(features, pictures)
    with pytest.raises(ValueError, match="3 demonstrations from a pool of 2"):
        nearest(pool, gallery(features, pictures[:1]), 3)
    with pytest.raises(ValueError, match="pool of demonstrations is empty"):
        nearest(gallery(features, pictures[:1]), gallery(features, pictures[:1]), 1)


def test_text_only_takes_the_pictures_out(pictures: list[Image.Image]) -> None:
    assert text_only([[pictures[0], "Output: a cat\n"], ["Look: ", pictures[1], "a dog\n"]]) == [
        ["Output: a cat\n"],
        ["Look: ", "a dog\n"],
    ]
