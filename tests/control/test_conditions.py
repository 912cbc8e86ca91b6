"""Conditions: maps keep their ids whatever file holds them, colours are told apart, edges are OpenCV's."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ether_diffusion.control.conditions import MAP_PALETTE, canny, colour_map, load_map
from ether_diffusion.images import UnreadableImageError
from ether_diffusion.playground.world import draw, random_scene

IDS = np.random.default_rng(0).integers(0, 16, (6, 9))


def test_a_map_keeps_its_ids_as_palette_and_as_grey_of_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    indices = Image.fromarray(IDS.astype(np.uint8))
    indices.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    for bits in (4, 8):
        indices.save(path, bits=bits)
        assert load_map(path).tolist() == IDS.tolist()
    for picture in (Image.fromarray(IDS.astype(np.uint8)), Image.fromarray(IDS.astype(np.uint16))):
        picture.save(path)
        assert load_map(path).tolist() == IDS.tolist()
    Image.fromarray((IDS * 300).astype(np.uint16)).save(path)
    assert load_map(path).tolist() == (IDS * 300).tolist()
    Image.fromarray(IDS > 7).save(path)
    assert load_map(path).tolist() == (IDS > 7).astype(int).tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_not_stretched(tmp_path: Path, bits: int) -> None:
    ids = IDS % 2**bits
    (tmp_path / "map.png").write_bytes(_grey_png(ids, bits))
    assert load_map(tmp_path / "map.png").tolist() == ids.tolist()


def _grey_png(ids: np.ndarray, bits: int) -> bytes:
    """A PNG of colour type 0, written by hand: Pillow only writes 8 and 16 bits."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = ids.shape
    rows = b""
    for row in ids:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big")
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_what_holds_no_ids_is_refused_by_name(tmp_path: Path) -> None:
    colours = tmp_path / "colours.png"
    colour_map(IDS).save(colours)
    with pytest.raises(UnreadableImageError, match=r"colours.png: .*one class id per pixel.*RGB"):
        load_map(colours)
    Image.fromarray(IDS.astype(np.uint8)).save(tmp_path / "map.jpg")
    with pytest.raises(UnreadableImageError, match=r"map.jpg: JPEG does not keep class ids"):
        load_map(tmp_path / "map.jpg")
    (tmp_path / "text.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError, match=r"text.png: not a picture"):
        load_map(tmp_path / "text.png")
    noise = np.random.default_rng(2).integers(0, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    with pytest.raises(UnreadableImageError, match=r"cut.png: cannot be decoded"):
        load_map(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError):
        load_map(tmp_path / "nowhere.png")


def test_every_id_has_its_own_colour() -> None:
    assert len(set(MAP_PALETTE)) == 256
    assert MAP_PALETTE[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))  # Pascal VOC's first
    assert MAP_PALETTE[255] == (224, 224, 192)
    shown = np.asarray(colour_map(np.arange(256).reshape(16, 16))).reshape(256, 3)
    assert [tuple(colour) for colour in shown.tolist()] == list(MAP_PALETTE)
    for ids in (np.array([[256]]), np.array([[-1]])):
        with pytest.raises(ValueError, match="0 to 255"):
            colour_map(ids)
    with pytest.raises(ValueError, match="height and a width"):
        colour_map(np.zeros((2, 2, 3), int))


def test_canny_is_opencvs_on_the_rgb_values() -> None:
    picture = draw(random_scene(5, 0)).image
    edges = np.asarray(canny(picture))
    assert edges.shape == (64, 64, 3)
    assert set(np.unique(edges)) == {0, 255}
    for channel in range(3):
        assert (edges[..., channel] == cv2.Canny(np.asarray(picture), 100, 200)).all()
    assert (np.asarray(canny(picture, 10, 20)) > 0).sum() > (edges > 0).sum()
    with pytest.raises(ValueError, match="0 <= low <= high"):
        canny(picture, 200, 100)


def test_canny_without_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"pip install 'ether-diffusion\[control\]'"):
        canny(Image.new("RGB", (8, 8)))
