"""A picture as several images: a grid by its shape, and the whole of it; the same in training, in chat, after loading."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import captioned
from PIL import Image

from bridges.build import build
from bridges.checkpoint import load, save_checkpoint
from bridges.config import Recipe
from bridges.data.batch import rows_of
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.documents import END
from bridges.data.template import IMAGE_TOKEN_ID
from bridges.evaluation.documents import up_to_pictures
from bridges.evaluation.tasks import listen
from bridges.inference.decoding import answers
from bridges.inference.fewshot import complete
from bridges.inference.session import Session
from bridges.objectives.controls import controlled
from bridges.towers.framing import Tiler, grid_of, wholes
from bridges.training.inspection import inspect
from bridges.training.loop import train
from chat.show import tokens
from chat.state import Chat

COLOURS = ("red", "lime", "blue", "white")


def panorama(side: int = 64) -> Image.Image:
    """Four squares in a row."""
    image = Image.new("RGB", (4 * side, side))
    for place, colour in enumerate(COLOURS):
        image.paste(colour, (place * side, 0, (place + 1) * side, side))
    return image


@pytest.fixture
def tiled(recipe: Recipe) -> Recipe:
    recipe.vision.tiles = 4
    return recipe


def test_the_grid_follows_the_shape_and_the_size() -> None:
    def grid(width: int, height: int, most: int = 4) -> tuple[int, int]:
        return grid_of(width, height, most, (32, 32))

    assert grid(256, 64) == (1, 4)
    assert grid(64, 256) == (4, 1)
    assert grid(64, 64) == grid(500, 500) == (2, 2)
    assert grid(640, 480, most=6) == (2, 3)
    assert grid(32, 32) == grid(20, 8) == grid(34, 33) == (1, 1)  # nothing is gained
    assert grid(64, 32, most=12) == (1, 2)  # and nothing is enlarged
    assert all(rows * columns <= 5 for rows, columns in [grid(w, 200, most=5) for w in range(20, 3000, 70)])


def test_a_panorama_is_four_tiles_in_reading_order_and_the_whole() -> None:
    image = panorama()
    *tiles, whole = Tiler(4, (32, 32))(image)
    assert whole is image
    assert [tile.size for tile in tiles] == [(32, 32)] * 4
    assert [tile.getpixel((16, 16)) for tile in tiles] == [image.getpixel((32 + 64 * n, 32)) for n in range(4)]


def test_tiles_are_the_same_objects_as_long_as_the_picture_lives() -> None:
    tiler, image = Tiler(4, (32, 32)), panorama()
    first = tiler(image)
    assert all(one is other for one, other in zip(first, tiler(image), strict=True))
    del image, first
    for number in range(20):
        image = Image.new("RGB", (256, 64), (number, 0, 0))
        assert tiler(image)[0].getpixel((0, 0)) == (number, 0, 0)
    assert len(tiler._cut) <= 2


def test_each_tile_takes_the_slots_of_an_image_and_texts_share_them(tiled: Recipe) -> None:
    model, template, _ = build(tiled)
    image, small = panorama(), Image.new("RGB", (16, 16))
    example = Example([ask("What is it?", "A cat.", image), ask("Is it red?", "Yes.", image)])
    (row,) = rows_of(example, template)
    assert len(row.images) == 5
    assert row.ids.count(IMAGE_TOKEN_ID) == 5 * model.bridge.num_slots
    (row,) = rows_of(Example([ask("What is it?", "A cat.", small)]), template)
    assert len(row.images) == 1


def test_a_trained_checkpoint_cuts_pictures_as_in_training(tiled: Recipe, tmp_path: Path) -> None:
    numbers = range(8)
    pictures = [panorama(40 + number) for number in numbers]
    tiled.data.source = str(captioned(tmp_path / "d", [f"A cat number {number}." for number in numbers], pictures))
    made = load(train(tiled))
    assert made.recipe.vision.tiles == 4
    turns = [Turn("user", [panorama(), "What is it?"])]
    (said,) = answers(made, [turns], max_new_tokens=8)
    session = Session(made)
    session.append(turns[0])
    assert "".join(session.stream(8)) == said
    assert session.spent.encoded == 5
    untiled = made._replace(template=build(_without_tiles(tiled)).template)
    asked = [made.template.encode(turns, reply=True), untiled.template.encode(turns, reply=True)]
    assert len(asked[0].ids) - len(asked[1].ids) == 4 * made.model.bridge.num_slots
    assert complete(made, [[panorama(), "It is"]], max_new_tokens=2)[0] is not None


def _without_tiles(recipe: Recipe) -> Recipe:
    recipe.vision.tiles = None
    return recipe


def test_saved_and_loaded_it_says_the_same(tiled: Recipe) -> None:
    made = build(tiled)
    save_checkpoint(Path(tiled.output), made)
    prompts = [[Turn("user", [panorama(), "What is it?"])], [Turn("user", [Image.new("RGB", (9, 9)), "And this?"])]]
    assert answers(load(tiled.output), prompts, max_new_tokens=8) == answers(made, prompts, max_new_tokens=8)


def test_the_shuffled_control_shows_another_picture_and_not_another_tile(tiled: Recipe) -> None:
    vision = build(tiled).model.vision
    pictures = torch.arange(4).repeat_interleave(5)  # of each of twenty images
    features = pictures[:, None, None].float().expand(20, vision.num_patches, vision.dim)
    other = controlled(features, vision, "shuffled")[:, 0, 0]
    assert (other != pictures).all()


def test_where_tiles_make_no_sense_they_are_refused(tiled: Recipe) -> None:
    tiled.bridge = {"name": "flamingo", "latents": 4, "depth": 1, "every": 1, "heads": 2, "head_dim": 16}
    with pytest.raises(ValueError, match=r"sees the last image alone.*set bridge.sees to all"):
        build(tiled)
    tiled.bridge["sees"] = "all"
    made = build(tiled)
    assert len(made.template.encode([Turn("user", [panorama(), "What?"])]).images) == 5
    tiled.vision.tiles = 1
    with pytest.raises(ValueError, match="at least 2 tiles"):
        build(tiled)
    tiled.vision.tiles, tiled.objectives = 4, {"contrastive": 1.0}
    with pytest.raises(ValueError, match="leave it out for objectives"):
        train(tiled)


def test_tiles_show_what_one_small_image_cannot(tiled: Recipe) -> None:
    """Stripes finer than the encoder's pixels are grey in the whole picture, and not in its tiles."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    *tiles, whole = Tiler(16, (32, 32))(Image.fromarray(stripes))
    assert len(tiles) == 16
    small = np.asarray(whole.resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
    assert small[4:-4, 4:-4].std() < 10 < np.asarray(tiles[5]).astype(float).std()


def page_of_two() -> Example:
    """A document with two pictures, each in five images."""
    parts = [panorama(), f"A cat.{END}", panorama(70), "A dog."]
    return Example([Conversation([Turn("user", parts[:1]), Turn("assistant", parts[1:])], "document")])


def test_a_document_of_two_pictures_in_ten_images_has_two_pictures(
    tiled: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        panorama(64 + number).save(tmp_path / f"{number}.png")
    parts = [{"type": "image", "path": "0.png"}, {"type": "text", "text": "A cat."}]
    parts += [{"type": "image", "path": "1.png"}, {"type": "text", "text": "A dog."}]
    (tmp_path / "pages.jsonl").write_text("\n".join([json.dumps({"content": parts})] * 3))
    tiled.data.source = str(tmp_path / "pages.jsonl")
    inspect(tiled, samples=1, html=tmp_path / "inspect.html")
    told = " ".join(capsys.readouterr().out.split())
    assert "1 text, 2 pictures in 10 images, " in told
    assert told.count("[picture: 80 slots]") == 2
    assert "slots an image 16 pictures an example 2 to 2, " in told
    assert "images they are cut into 10 to 10, " in told


def test_a_document_goes_on_after_each_picture_and_not_after_each_tile(tiled: Recipe) -> None:
    made, example = build(tiled), page_of_two()
    (prompt,) = up_to_pictures(made.template, example.conversations[0])
    assert [len(wholes(prompt.images)), len(prompt.images)] == [2, 10]
    assert [
        sum(1 for _ in same) for slot, same in groupby(token == IMAGE_TOKEN_ID for token in prompt.ids) if slot
    ] == [5 * made.model.bridge.num_slots] * 2
    (said,) = listen(made, [example])
    assert [len(texts) for texts in said.continued.values()] == [1, 1, 1]


def test_tokens_tells_pictures_and_what_they_became(tiled: Recipe) -> None:
    chat = Chat(Session(build(tiled)))
    chat.session.append(Turn("user", [panorama(), panorama(), "Which?"]))
    assert "160  2 pictures in 10 images of 16" in tokens(chat, "")
