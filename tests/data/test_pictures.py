import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridges.data.pictures import MAX_ASPECT, STRIP_LENGTH, BrokenPicture, SkipBroken, open_picture


@pytest.fixture(scope="module")
def weird(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures as people have them."""
    tmp_path = tmp_path_factory.mktemp("weird")
    red = Image.new("RGB", (16, 16), "red")
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.array([[0, 100, 257 * 128, 65535]], dtype=np.uint16)).save(tmp_path / "sixteen.png")
    Image.fromarray(np.array([[0, 70_000, 140_000]], dtype=np.int32)).save(tmp_path / "thirty_two.tiff")
    Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)).save(tmp_path / "float.tiff")
    red.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")] * 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left edge of the file is the top of the picture
    wide = Image.new("RGB", (32, 16), "blue")
    wide.paste(red, (0, 0))
    wide.save(tmp_path / "rotated.jpg", exif=exif, quality=95, subsampling=0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    grey.save(tmp_path / "la.png")
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "pixel.png")
    Image.new("RGB", (20000, 10), "red").save(tmp_path / "strip.png")
    (tmp_path / "empty.png").touch()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.gif", "cut.webp"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    red.save(tmp_path / 'drôle de "chat" 猫\'s.png')
    return tmp_path


def png_that_claims(width: int, height: int) -> bytes:
    """A header and no pixels: what a decompression bomb shows before it is decoded."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(b"\0" * 10)) + part(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("sixteen.png", [[0, 0, 128, 255]]),
        ("thirty_two.tiff", [[0, 128, 255]]),
        ("float.tiff", [[0, 128, 255]]),
        ("la.png", [[0, 255]]),
        ("bits.png", [[255, 255], [255, 255]]),
        ("palette.png", [[(255, 0, 0), (255, 255, 255)]]),
        ("half.png", [[(255, 127, 127)]]),
        ("pixel.png", [[(255, 0, 0)]]),
        ('drôle de "chat" 猫\'s.png', np.full((16, 16, 3), (255, 0, 0))),
        ("animated.gif", np.full((16, 16, 3), (255, 0, 0))),
    ],
)
def test_every_kind_of_picture_opens_as_the_rgb_that_one_sees(weird: Path, name: str, pixels):
    picture = open_picture(weird / name)
    expected = np.asarray(pixels)
    if expected.ndim == 2:
        expected = np.stack([expected] * 3, -1)
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), expected)


def test_a_cmyk_jpeg_keeps_its_colour(weird: Path):
    red, green, blue = open_picture(weird / "cmyk.jpg").getpixel((8, 8))
    assert red > 200
    assert green < 60
    assert blue < 60


def test_a_photo_taken_with_a_turned_camera_stands_upright_and_is_turned_once(weird: Path):
    picture = open_picture(weird / "rotated.jpg")
    for upright in (picture, open_picture(picture)):
        assert upright.size == (16, 32)
        top, bottom = upright.getpixel((8, 4)), upright.getpixel((8, 28))
        assert top[0] > 200 > top[2]
        assert bottom[2] > 200 > bottom[0]


def test_a_strip_is_shrunk_and_laid_on_white_so_that_no_side_comes_near_zero(weird: Path):
    picture = open_picture(weird / "strip.png")
    assert picture.size == (4096, 205)
    assert picture.getpixel((2000, 102)) == (255, 0, 0)
    assert picture.getpixel((2000, 0)) == (255, 255, 255)
    assert open_picture(Image.new("RGB", (1, MAX_ASPECT))).size == (1, MAX_ASPECT)
    assert open_picture(Image.new("RGB", (1, MAX_ASPECT + 1))).size == (2, MAX_ASPECT + 1)


def test_a_path_its_text_its_bytes_and_its_image_open_alike(weird: Path):
    path = weird / "rotated.jpg"
    pixels = [np.asarray(open_picture(source)) for source in (path, str(path), path.read_bytes(), Image.open(path))]
    for other in pixels[1:]:
        np.testing.assert_array_equal(pixels[0], other)


def test_a_given_image_is_copied(weird: Path):
    given = Image.new("RGB", (4, 4), "red")
    open_picture(given).putpixel((0, 0), (0, 0, 0))
    assert given.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.png", "it is empty (0 bytes)"),
        ("cut.png", ""),
        ("cut.jpg", "truncated"),
        ("cut.gif", ""),
        ("cut.webp", ""),
        ("text.png", "not a picture"),
        ("folder.png", "it is a folder"),
        ("Strip.PNG", "nearest name: {folder}/strip.png"),
        ("wholly-else", "no similar name in {folder}"),
        ("none/cut.png", "no folder {folder}/none"),
        ("text.png/cut.png", "no file"),
        ("x" * 300, "too long"),
    ],
)
def test_a_broken_picture_is_one_line_with_its_path_and_the_reason(weird: Path, name: str, reason: str):
    with pytest.raises(BrokenPicture) as error:
        open_picture(weird / name)
    line = str(error.value)
    assert str(weird / name) in line
    assert reason.format(folder=weird) in line
    assert "\n" not in line


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own, on the way
@pytest.mark.parametrize(("width", "height"), [(20_000, 10_001), (200_000, 200_000)])
def test_a_decompression_bomb_is_refused_with_its_size_before_it_is_decoded(width: int, height: int):
    with pytest.raises(BrokenPicture, match="pixels"):
        open_picture(png_that_claims(width, height))


@pytest.mark.filterwarnings("error")
def test_two_hundred_megapixels_pass_the_limit_without_a_warning():
    with pytest.raises(
        BrokenPicture, match=r"truncated|broken|incomplete|not enough"
    ):  # not the limit: the pixels lack
        open_picture(png_that_claims(20_000, 10_000))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff\xe0", b"BM" + b"\0" * 60, b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_only_begin_like_a_picture_are_a_broken_picture(data: bytes):
    with pytest.raises(BrokenPicture, match=f"the given {len(data)} bytes"):
        open_picture(data)


class Folder:
    """A data set of `size` rows; the rows in `bad` do not open."""

    def __init__(self, size: int, bad: set[int]) -> None:
        self.size, self.bad, self.asked = size, bad, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        if index in self.bad:
            open_picture(f"gone/{index}.png")
        return index


def test_a_broken_row_gives_the_next_one_and_the_first_follows_the_last():
    rows = SkipBroken(Folder(50, {7, 8, 49}))
    assert [rows[6], rows[7], rows[8], rows[49], rows[-1]] == [6, 9, 9, 0, 0]
    assert list(rows.broken) == [7, 8, 49]
    assert len(rows) == 50
    with pytest.raises(IndexError):
        rows[50]


def test_a_broken_row_is_tried_and_counted_once_however_often_it_is_asked_for():
    rows = SkipBroken(folder := Folder(100, {3}))
    assert [rows[3] for _ in range(50)] == [4] * 50
    assert folder.asked.count(3) == 1
    assert (
        rows.summary()
        == "1 of 2 rows tried were skipped\n  row 3: no file gone/3.png: no folder gone; "
        + (rows.broken[3].partition("; ")[2])
    )


def test_one_broken_row_in_twenty_passes_and_two_do_not():
    rows = SkipBroken(Folder(20, {19}))
    assert [rows[i] for i in range(20)] == [*range(19), 0]
    rows = SkipBroken(Folder(20, {0, 19}))
    assert [rows[i] for i in range(1, 19)] == list(range(1, 19))
    assert rows[0] == 1  # 1 of 19 is over 5 %, but too few were tried to judge
    with pytest.raises(ValueError, match=r"2 of 20 rows tried") as error:
        rows[19]
    assert "row 19: no file gone/19.png" in str(error.value)


def test_an_unlucky_beginning_is_no_reason_to_stop_and_a_bad_one_is():
    rows = SkipBroken(Folder(1000, {5, 6, 7}))
    assert [rows[i] for i in range(30)][:9] == [0, 1, 2, 3, 4, 8, 8, 8, 8]
    rows = SkipBroken(Folder(1000, set(range(0, 1000, 5))))
    with pytest.raises(ValueError, match=r"too many pictures are broken: [4-9] of \d+ rows tried"):
        [rows[i] for i in range(1000)]


def test_a_panorama_opens_and_one_that_would_fill_the_memory_does_not(tmp_path: Path):
    Image.new("RGB", (30_000, 600), "red").save(tmp_path / "wide.png")
    picture = open_picture(tmp_path / "wide.png")
    assert max(picture.size) <= STRIP_LENGTH
    assert picture.getpixel((2000, picture.height // 2)) == (255, 0, 0)
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    with pytest.raises(BrokenPicture, match=r"huge\.png: .*900000000 pixels"):
        open_picture(tmp_path / "huge.png")


def test_a_link_in_a_circle_is_told(tmp_path: Path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(BrokenPicture, match=r"loop\.png is a symbolic link to nothing or to itself"):
        open_picture(tmp_path / "loop.png")


def test_the_error_lists_the_first_twenty_broken_rows_and_the_summary_all():
    rows = SkipBroken(Folder(1000, set(range(100, 150))))
    for index in range(100):
        rows[index]
    with pytest.raises(ValueError, match="too many"):
        rows[100]
    while len(rows.broken) < 30:
        with pytest.raises(ValueError, match="too many"):
            rows[100]
    with pytest.raises(ValueError, match="too many") as error:
        rows[100]
    assert str(error.value).count("row ") == 20
    assert "… and 11 more" in str(error.value)
    assert rows.summary().count("row ") == 31


def test_a_data_set_of_broken_rows_only_is_refused_again_and_again():
    rows = SkipBroken(Folder(3, {0, 1, 2}))
    for _ in range(2):
        with pytest.raises(ValueError, match="no picture opens: 3 of 3"):
            rows[1]


def test_other_errors_than_a_broken_picture_are_not_skipped():
    class Wrong(Folder):
        def __getitem__(self, index: int) -> int:
            raise ValueError("row 0 has no caption")

    with pytest.raises(ValueError, match="no caption"):
        SkipBroken(Wrong(3, set()))[0]


def test_bytes_of_a_picture_in_memory_open():
    memory = io.BytesIO()
    Image.new("RGB", (3, 2), "blue").save(memory, "WEBP", lossless=True)
    assert open_picture(memory.getvalue()).getpixel((0, 0)) == (0, 0, 255)
