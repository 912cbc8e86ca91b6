from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ether_diffusion.images import (
    MissingDecoderError,
    UnreadableImageError,
    list_images,
    load_captions,
    load_image,
)

Pixels = npt.NDArray[np.uint8]


@pytest.fixture
def pixels() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def loaded(path: Path) -> Pixels:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def save_photo(path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


ORIENTATIONS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_turns_the_picture_upright(tmp_path: Path, pixels: Pixels, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "photo.png"), ORIENTATIONS[orientation](pixels))


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp"])
def test_lossless_rgb_is_read_exactly(tmp_path: Path, pixels: Pixels, name: str) -> None:
    Image.fromarray(pixels).save(tmp_path / name, lossless=True)  # only webp heeds it
    np.testing.assert_array_equal(loaded(tmp_path / name), pixels)


def test_jpeg_keeps_its_colour(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(loaded(tmp_path / "a.jpg").mean((0, 1)), (200, 100, 50), atol=2)


def test_first_picture_of_an_mpo_is_taken(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    np.testing.assert_allclose(loaded(tmp_path / "a.jpg").mean((0, 1)), (255, 0, 0), atol=2)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (3, 1))
    n_colours = len(mode) - 1
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*[40] * n_colours, alpha))
    image.save(tmp_path / "a.png")
    expected = [255 + (40 - 255) * alpha / 255 for alpha in (0, 128, 255)]
    np.testing.assert_allclose(loaded(tmp_path / "a.png")[0], np.repeat(np.array(expected)[:, None], 3, 1), atol=1)


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    np.testing.assert_array_equal(loaded(tmp_path / "a.png")[0], [[255, 255, 255], [40, 50, 60]])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(loaded(tmp_path / name)[0, :, 1], [0, 0, 1, 1, 100, 255])


def test_8_bit_grey_and_black_and_white_fill_the_channels(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 77, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(loaded(tmp_path / "grey.png")[0], [[0] * 3, [77] * 3, [255] * 3])
    np.testing.assert_array_equal(loaded(tmp_path / "bits.png")[0], [[0] * 3, [255] * 3])


def test_cmyk_ink_absorbs_light(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (255, 0, 0, 51)).save(tmp_path / "a.jpg", quality=95)  # full cyan, a fifth of black
    np.testing.assert_allclose(loaded(tmp_path / "a.jpg").mean((0, 1)), (0, 204, 204), atol=3)


def test_pixels_without_a_white_point_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(UnreadableImageError, match=r"float\.tif.*floating-point"):
        load_image(tmp_path / "float.tif")
    with pytest.raises(UnreadableImageError, match=r"wide\.tif.*70000.*16 bits"):
        load_image(tmp_path / "wide.tif")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_truncated_picture_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save_photo(tmp_path / name)
    truncate(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=name):
        load_image(tmp_path / name)


def test_file_that_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(UnreadableImageError, match=r"a\.jpg: not a picture"):
        load_image(tmp_path / "a.jpg")


def test_missing_picture_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.jpg"):
        load_image(tmp_path / "a.jpg")


def test_listing_sorts_by_name_and_skips_what_is_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.png", "a.jpg", "C.webp", "broken.jpg", ".hidden.png"):
        save_photo(tmp_path / name)
    truncate(tmp_path / "broken.jpg")
    (tmp_path / "a.txt").write_text("a caption")
    (tmp_path / "metadata.jsonl").write_text("{}")
    (tmp_path / "folder").mkdir()
    save_photo(tmp_path / "folder" / "d.png")

    with caplog.at_level(logging.WARNING):
        paths = list_images(tmp_path)

    assert [path.name for path in paths] == ["C.webp", "a.jpg", "b.png"]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3
    assert "hidden" in warnings[0]
    assert "broken.jpg" in warnings[1]
    assert "truncated" in warnings[1]
    assert "metadata.jsonl" in warnings[2]


def test_folder_that_cannot_be_used_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"absent does not exist.*check the path"):
        list_images(tmp_path / "absent")
    with pytest.raises(NotADirectoryError, match="give the folder"):
        list_images(tmp_path / "file")
    with pytest.raises(ValueError, match=r"empty.*put \.jpg"):
        list_images(tmp_path / "empty")


def test_caption_is_the_stripped_text_beside_the_picture(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  ein süßer Hund\n", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text(" \n")
    assert load_captions(tmp_path / "a.jpg") == ("ein süßer Hund",)
    assert load_captions(tmp_path / "b.jpg") == ()
    assert load_captions(tmp_path / "c.jpg") == ()


def test_caption_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("süß".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8.*save it as UTF-8"):
        load_captions(tmp_path / "a.jpg")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the name of a socket has at most 107 characters


def make_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL = {"a named pipe": make_fifo, "a socket": make_socket, "a character device": make_link_to_device}


@pytest.mark.parametrize("kind", SPECIAL)
def test_pipes_sockets_and_devices_are_named_and_never_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    SPECIAL[kind](tmp_path / "a.png")
    save_photo(tmp_path / "b.png")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in list_images(tmp_path)] == ["b.png"]
    assert f"skipping {tmp_path / 'a.png'} is {kind}" in caplog.text
    with pytest.raises(OSError, match=rf"a\.png is {kind}"):
        load_image(tmp_path / "a.png")
    SPECIAL[kind](tmp_path / "b.txt")
    with pytest.raises(OSError, match=rf"b\.txt is {kind}"):
        load_captions(tmp_path / "b.png")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((12_000, 9_000), "12000 x 9000 pixels; at most 105,000,000 are read"),  # Pillow warns at most
        ((40_000, 40_000), "exceeds limit"),  # Pillow's own limit
        ((100_000, 1), "100000 x 1 pixels: one side is over 64 times the other"),
    ],
)
def test_a_picture_that_would_take_gigabytes_is_refused_by_its_header(
    tmp_path: Path, size: tuple[int, int], message: str
) -> None:
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(UnreadableImageError, match=rf"a\.png: .*{message}"):
        load_image(tmp_path / "a.png")


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(
        UnreadableImageError, match=r"a\.jpg: .*EPS is a program that draws a picture, which is not run"
    ):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("name", ["a.txt", "a.jpg.txt", "a.TXT", "a.jpg.TXT"])
def test_a_caption_may_be_called_as_the_whole_file_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a dog")
    assert load_captions(tmp_path / "a.jpg") == ("a dog",)


def test_two_captions_of_a_picture_must_agree(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "a.jpg.txt").write_text(" a dog ")
    assert load_captions(tmp_path / "a.jpg") == ("a dog",)
    (tmp_path / "a.jpg.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"a\.jpg has several captions that differ, a\.jpg\.txt and a\.txt"):
        load_captions(tmp_path / "a.jpg")


def test_texts_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_photo(tmp_path / "a.png")
    for name in ("a.png.txt", "b.txt", "a_caption.TXT", "prompt.txt"):
        (tmp_path / name).write_text("a dog")
    with caplog.at_level(logging.WARNING):
        list_images(tmp_path)
    assert "not read: a_caption.TXT, b.txt in" in caplog.text


def test_every_line_of_a_text_is_a_caption_and_the_first_stands_for_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n a dog\r\n\r\none dog\ra dog", newline="")
    assert load_captions(tmp_path / "a.jpg") == ("a dog", "one dog")
    assert load_captions(tmp_path / "b.jpg") == ()


def test_sub_folders_are_searched_when_asked_for(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.png", "a/deep/y.png", ".hidden/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_photo(tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [path.name for path in list_images(tmp_path)] == ["b.png"]
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path, nested=True)]
    assert found == ["a/deep/y.png", "a/z.png", "b.png"]


def test_a_folder_with_pictures_in_its_sub_folders_alone_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.png", "c.png"):
        save_photo(tmp_path / "a" / name)
    (tmp_path / "a" / "b.txt").write_text("a dog")
    with pytest.raises(ValueError, match=r"are not searched.*2 pictures are in sub-folders: .*add --nested_folders"):
        list_images(tmp_path)


def test_files_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_photo(tmp_path / "a.png")
    for name in ("a.txt", "a.npz", "a.xmp", "b.jpg"):
        (tmp_path / name).write_text("a dog")
    with caplog.at_level(logging.INFO):
        list_images(tmp_path)
    assert caplog.messages[-1] == f"3 of 4 files in {tmp_path} are left out"


@pytest.mark.parametrize(("kind", "suffix"), [("HEIF", ".heic"), ("HEIF", ".jpg"), ("AVIF", ".avif")])
def test_photos_of_phones_are_read_upright(kind: str, suffix: str, tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("Pillow reads AVIF from 11.3 on")
    image, exif = Image.new("RGB", (64, 32), "red"), Image.Exif()
    image.paste("blue", (0, 0, 32, 32))
    exif[0x0112] = 6  # to be turned clockwise: the left half comes to the top
    path = tmp_path / f"a{suffix}"
    image.save(path, kind, exif=exif.tobytes(), quality=95)
    pillow_heif_is_forgotten()
    upright = load_image(path)
    assert upright.size == (32, 64)
    top, bottom = upright.getpixel((16, 8)), upright.getpixel((16, 56))
    assert top[2] > 200 > 60 > top[0]
    assert bottom[0] > 200 > 60 > bottom[2]
    assert list_images(tmp_path) == [path]


def pillow_heif_is_forgotten() -> None:
    """As in a process that has not read a HEIC file yet."""
    for known in (Image.OPEN, Image.ID):
        for name in [name for name in known if name == "HEIF"]:
            known.pop(name) if isinstance(known, dict) else known.remove(name)


def test_a_heic_file_without_its_package_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_photo(tmp_path / "a.png")
    (tmp_path / "b.HEIC").write_bytes(b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (lambda: list_images(tmp_path), lambda: load_image(tmp_path / "b.HEIC")):
        with pytest.raises(MissingDecoderError, match=r"b\.HEIC is a HEIC file.*pip install 'ether-diffusion\[heic\]'"):
            read()


def test_a_broken_heic_file_is_left_out_like_any_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pillow_heif")
    save_photo(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(100))
    assert [path.name for path in list_images(tmp_path)] == ["a.png"]
    assert f"skipping {tmp_path / 'b.heic'}: " in caplog.text


def test_avif_in_an_old_pillow_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(100))
    monkeypatch.setattr(Image, "registered_extensions", lambda: {".png": "PNG"})
    with pytest.raises(MissingDecoderError, match=r"a\.avif is an AVIF file.*pip install -U pillow"):
        load_image(tmp_path / "a.avif")
