"""One reader of pictures: what a file shows, whatever its format and its metadata; and why where it cannot be had."""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from dyrate_kernels.pictures import UnreadableError, find_picture, read_picture, whole_pictures
from dyrate_kernels.shapes import draw, make_scene

PICTURE = draw(make_scene(3)).resize((60, 40))


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def close(one, two, most=12.0):
    return one.size == two.size and np.abs(np.asarray(one, dtype=float) - np.asarray(two, dtype=float)).mean() < most


def exif(orientation=6):
    made = Image.Exif()
    made[0x0112] = orientation
    made[0x010E] = "words " * 30
    return made.tobytes()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def behind_header(png, extra):
    return png[:33] + extra + png[33:]


GARBAGE = (b"Exif\0\0nonsense", b"\xff" * 40, b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 30, exif()[:30], b"")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_damaged_exif_beside_a_whole_picture(kind, garbage):
    if kind == "png":
        data = behind_header(encoded(PICTURE, "png"), chunk(b"eXIf", garbage))
    else:
        data = encoded(PICTURE, kind, **({"exif": garbage} if garbage else {}))
    assert close(read_picture(data), PICTURE)


def test_a_broken_check_sum_and_broken_texts_beside_a_whole_png():
    png = encoded(PICTURE, "png")
    wrong_sum = chunk(b"eXIf", exif(1))[:-1] + b"\0"
    bomb = chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"a" * (1 << 21)))
    profile = chunk(b"iCCP", b"name\0\0" + b"no deflate")
    for extra in (wrong_sum, bomb, profile, chunk(b"zTXt", b"comment\0\0broken")):
        assert np.array_equal(read_picture(behind_header(png, extra)), PICTURE)
    behind_pixels = png[:-12] + wrong_sum + png[-12:]
    assert np.array_equal(read_picture(behind_pixels), PICTURE)
    clear = encoded(Image.new("L", (4, 4), 9), "png", transparency=9)
    assert np.asarray(read_picture(behind_header(clear, wrong_sum))).max() == 9


def test_a_webp_file_that_is_cut_within_its_metadata():
    data = encoded(PICTURE, "webp", exif=exif(1), lossless=True)
    assert np.array_equal(read_picture(data[:-20]), PICTURE)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("where", [0.3, 0.6, 0.97])
def test_truncated_pictures_are_refused(kind, where, monkeypatch):
    """Though another package has Pillow fill them up in grey, and whatever their metadata are."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype="uint8")), kind)
    with pytest.raises(UnreadableError) as caught:
        read_picture(data[: int(len(data) * where)])
    assert caught.value.kind in ("broken", "not a picture")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_threads_leave_pillows_settings_as_they_were(monkeypatch):
    """The first of two that overlap may end before or after the second."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    begun, go_on = threading.Event(), threading.Event()

    def longer():
        with whole_pictures:
            begun.set()
            go_on.wait(20)
            assert ImageFile.LOAD_TRUNCATED_IMAGES is False

    thread = threading.Thread(target=longer)
    with whole_pictures:
        thread.start()
        assert begun.wait(20)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False  # the other is inside
    go_on.set()
    thread.join()
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg", "tiff"])
def test_pictures_are_upright(kind, orientation):
    from PIL import ImageOps

    made = PICTURE.getexif()
    made[0x0112] = orientation
    data = encoded(PICTURE, kind, exif=made)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(read_picture(data), ImageOps.exif_transpose(opened).convert("RGB"))
    assert read_picture(data).size == ((40, 60) if orientation in (5, 6, 7, 8) else (60, 40))
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(read_picture(opened), read_picture(data))  # a picture that a data set has opened


def test_sixteen_bits_are_scaled_and_turned(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    made = Image.Exif()
    made[0x0112] = 6
    for suffix, options in (("png", {}), ("tif", {}), ("jp2", {"irreversible": False}), ("png", {"exif": made})):
        Image.fromarray(ramp).save(tmp_path / f"x.{suffix}", **options)
        want = np.rot90(ramp >> 8, -1) if options.get("exif") else ramp >> 8
        assert np.array_equal(np.asarray(read_picture(tmp_path / f"x.{suffix}"))[..., 0], want)
    assert np.array_equal(np.asarray(read_picture(Image.fromarray(ramp)))[..., 1], ramp >> 8)
    (tmp_path / "x.pgm").write_bytes(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(read_picture(tmp_path / "x.pgm"))[..., 0], ramp >> 8)


@pytest.mark.parametrize("mode, words", [("float32", "floating point"), ("int32", "32 bits")])
def test_pixels_without_a_known_white_are_refused(mode, words, tmp_path):
    picture = Image.fromarray(np.full((8, 8), 70_000, mode))
    picture.save(tmp_path / "x.tif")
    for source in (tmp_path / "x.tif", picture):
        with pytest.raises(UnreadableError, match=words) as caught:
            read_picture(source)
        assert caught.value.kind == "not a picture"


@pytest.mark.filterwarnings("error")
def test_modes_and_frames():
    red, frames = Image.new("RGB", (8, 8), (200, 10, 10)), [Image.new("RGB", (8, 8), colour) for colour in ((200, 10, 10), (0, 0, 255))]
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    sources = [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("gif", "webp", "png")]
    sources += [encoded(red.convert("CMYK"), "jpeg"), encoded(red.convert("RGBA"), "png"), encoded(palette, "png", transparency=b"\0\x80"),
                encoded(palette, "png", transparency=0)]  # fmt: skip
    for data in sources:
        assert close(read_picture(data), red, 6) and read_picture(data).mode == "RGB"
    for mode in ("1", "L", "LA", "PA", "RGBX", "YCbCr", "HSV"):
        assert read_picture(Image.new(mode, (5, 4))).mode == "RGB"
    palette.putalpha(7)
    assert palette.mode != "RGB" and close(read_picture(palette), red, 6)


def test_what_is_no_picture_says_what_it_is(tmp_path):
    for source, kind in ((tmp_path / "none.png", "missing"), (tmp_path, "not a picture"), (b"", "empty"), (b"words", "not a picture"),
                         (tmp_path / ("x" * 300), "missing")):  # fmt: skip
        with pytest.raises(UnreadableError) as caught:
            read_picture(source)
        assert caught.value.kind == kind


# -- what cells of tables and entries of files hold ----------------------------------------------------------------------------------------


PNG = encoded(PICTURE, "png")
TEXT = base64.b64encode(PNG).decode()
PIXELS = np.asarray(PICTURE)


@pytest.mark.parametrize(
    "value",
    [
        PNG, bytearray(PNG), memoryview(PNG), TEXT, TEXT.rstrip("="), base64.urlsafe_b64encode(PNG).decode(),
        base64.encodebytes(PNG).decode(),
        "data:image/png;base64," + TEXT, "data:;base64," + TEXT, "data:image/png;charset=utf-8;base64," + TEXT.replace("=", "%3D"),
        TEXT.encode(), ("data:image/png;base64," + TEXT).encode(), "a.png", {"bytes": PNG, "path": None}, {"bytes": None, "path": "a.png"},
        {"bytes": b"", "path": "a.png"}, {"path": "a.png"}, {"url": "data:image/png;base64," + TEXT}, [PNG],
        [{"bytes": PNG, "path": "x"}], [None, "a.png"],
        list(PNG), tuple(PNG), np.frombuffer(PNG, dtype=np.uint8), PIXELS, PIXELS.tolist(), PICTURE, [PICTURE, PICTURE],
    ],
)  # fmt: skip
def test_pictures_in_cells_of_every_type(value, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    assert np.array_equal(read_picture(find_picture(value, tmp_path)), PICTURE)


def test_a_path_stands_before_base64(tmp_path):
    (tmp_path / "abcd").write_bytes(PNG)
    assert find_picture("abcd", tmp_path) == tmp_path / "abcd" == find_picture((tmp_path / "abcd").as_uri(), tmp_path)
    damaged = behind_header(PNG, chunk(b"eXIf", exif())[:-1] + b"\0")
    assert np.array_equal(read_picture(find_picture(base64.b64encode(damaged).decode(), tmp_path)), PICTURE)


@pytest.mark.parametrize(
    "value, kind, words",
    [
        (None, "empty", "null"), ("", "empty", "empty text"), ([], "empty", "empty list"), ([None], "empty", "empty list"),
        ({"bytes": None, "path": None}, "empty", "neither bytes nor a path"), ({"width": 3}, "not a picture", "the keys width"),
        ({}, "not a picture", "the keys none"), (5, "not a picture", r"5 \(int\)"), (True, "not a picture", "bool"),
        (float("nan"), "not a picture", r"nan \(float\)"), ([1.5, 2.0], "not a picture", "1.5"), ([1, 300], "not a picture", "no bytes"),
        ([[1, 2], [3]], "not a picture", "no bytes"), ([[[1, 2]]], "not a picture", r"\[1, 1, 2\]"),
        ("b.png", "missing", r"no such file: .*b\.png"),
        ("x/" * 400, "not a picture", "a text of 800 characters"), ("https://host/a.png", "not a picture", "nothing is downloaded"),
        ("s3://host/a.png", "not a picture", "nothing is downloaded"), ("data:image/png;base64,???", "not a picture", "data URL"),
        (json.loads("[" * 700 + "]" * 700), "not a picture", "nested too deeply"),
        ("a\0b", "missing", "no such file"), ("caf\udce9.png", "missing", "no such file"),
    ],
)  # fmt: skip
def test_cells_that_hold_no_picture_say_what_they_hold(value, kind, words, tmp_path):
    with pytest.raises(UnreadableError, match=words) as caught:
        read_picture(find_picture(value, tmp_path))
    assert caught.value.kind == kind
