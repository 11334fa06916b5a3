from __future__ import annotations

import io
import json
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import AppendingTiffWriter
from urllib3 import HTTPResponse

import chestxray_covid
from chestxray_covid.datasets.synthetic import SyntheticChestXray
from chestxray_covid.errors import (
    ConfigError,
    ImageError,
    ImageNotFoundError,
    MissingExtraError,
    ResourceError,
)
from chestxray_covid.image import (
    ImageWarning,
    Preprocess,
    load_image,
    read_image,
)
from chestxray_covid.pixels import (
    _GREY_CHROMA,
    COLOURED_CHANNELS,
    MAX_JPEG_SCANS,
    check_jpeg,
)
from conftest import Elsewhere, no_more_files

pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")


def ramp(height: int = 40, width: int = 64) -> np.ndarray:
    """0 to 255, different in every corner, so that turns and flips show."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    pixels = 255 * (0.7 * x / (width - 1) + 0.3 * (y / (height - 1)) ** 2)
    return np.rint(pixels).astype(np.uint8)


def colours(height: int = 40, width: int = 64) -> np.ndarray:
    grey = ramp(height, width)
    return np.stack([grey, grey[::-1], 255 - grey], axis=-1)


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(source: Any, **options: Any) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "L"
    assert type(image) is Image.Image
    assert image.info == {}
    return np.asarray(image).astype(int)


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, as in Pillow's documentation of `convert`."""
    return np.rint(rgb.astype(float) @ [0.299, 0.587, 0.114]).astype(int)


def stretched(values: np.ndarray) -> np.ndarray:
    values = values.astype(float)
    return np.rint(255 * (values - values.min()) / (values.max() - values.min())).astype(int)


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_every_lossless_format_gives_the_pixels_that_were_saved(kind: str) -> None:
    assert np.array_equal(loaded(encode(ramp(), kind)), ramp())


def test_webp_and_jpeg_give_nearly_the_pixels_that_were_saved() -> None:
    assert np.array_equal(loaded(encode(ramp(), "WEBP", lossless=True)), ramp())
    assert np.abs(loaded(encode(ramp(), "JPEG", quality=95)) - ramp()).max() <= 4


def test_path_bytes_stream_image_array_and_tensor_give_the_same_image(tmp_path: Path) -> None:
    data = encode(ramp(), "PNG")
    path = tmp_path / "x.png"
    path.write_bytes(data)
    stream = io.BytesIO(data)
    stream.seek(0, io.SEEK_END)  # a seekable stream is read from its start
    sources = [path, str(path), data, bytearray(data), memoryview(data), stream]
    sources += [Image.open(path), ramp(), torch.from_numpy(ramp()), torch.from_numpy(ramp())[None]]
    for source in sources:
        assert np.array_equal(loaded(source), ramp()), type(source)


def test_a_stream_that_cannot_seek_and_comes_in_pieces_is_read_to_its_end() -> None:
    reading, writing = os.pipe()
    data = encode(ramp(), "PNG")
    with open(writing, "wb") as end:  # noqa: PTH123 - a descriptor
        end.write(data)
    with open(reading, "rb", buffering=0) as stream:  # noqa: PTH123
        assert not stream.seekable()
        assert np.array_equal(loaded(stream), ramp())


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(ramp(), "PNG"))
    assert np.array_equal(loaded(path), ramp())


def test_members_of_a_tar_archive_are_read_also_where_it_is_a_stream_and_may_break() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64), np.uint8)
    data, packed = encode(pixels, "PNG"), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        (info := tarfile.TarInfo("a.png")).size = len(data)
        archive.addfile(info, io.BytesIO(data))
    for mode in ("r|", "r:"):
        with tarfile.open(fileobj=io.BytesIO(packed.getvalue()), mode=mode) as archive:
            member = archive.extractfile(next(iter(archive)))
            assert np.array_equal(loaded(member), pixels)
    cut = io.BytesIO(packed.getvalue()[: len(data) - 100])
    with tarfile.open(fileobj=cut, mode="r|") as archive:
        member = archive.extractfile(next(iter(archive)))
        with pytest.raises(ImageError, match="<stream> cannot be read: ReadError"):
            load_image(member)


def test_an_answer_of_requests_may_break() -> None:
    cut = HTTPResponse(io.BytesIO(bytes(9)), {"Content-Length": "10"}, preload_content=False)
    with pytest.raises(ImageError, match="<stream> cannot be read: ProtocolError"):
        load_image(cut)


def test_an_upload_of_an_asynchronous_service_says_that_it_is_to_be_awaited() -> None:
    class Later:
        def __await__(self) -> None: ...

    class Upload:
        def read(self, size: int = -1) -> Later:
            return Later()

    with pytest.raises(TypeError, match=r"got one of Later; .* or await what it reads and pass"):
        load_image(Upload())  # type: ignore[arg-type]


def test_streams_of_text_closed_ones_and_endless_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a binary stream, got one of str"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]
    picture = tmp_path / "x.png"
    picture.write_bytes(encode(ramp(), "PNG"))
    with (
        picture.open(encoding="utf-8") as text,
        pytest.raises(TypeError, match="got one of text; open it with 'rb'"),
    ):
        load_image(text)  # type: ignore[arg-type]
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageError, match="<stream> cannot be read: ValueError"):
        load_image(closed)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_an_endless_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chestxray_covid.encoded.MAX_STREAM_BYTES", 1 << 22)
    message = "<stream> is longer than 4194304 bytes"
    with Path("/dev/zero").open("rb") as endless, pytest.raises(ImageError, match=message):
        load_image(endless)


def test_an_address_is_named_not_where_its_copy_would_be(tmp_path: Path) -> None:
    for folder in ("s3://bucket/a", Elsewhere("s3://bucket/a", tmp_path / "nothing")):
        with pytest.raises(ImageNotFoundError, match=r"^s3://bucket/a does not exist; it looks"):
            load_image(folder)
    with pytest.raises(ImageNotFoundError, match=r"^s3://bucket/a is a folder"):
        load_image(Elsewhere("s3://bucket/a", tmp_path))


def test_of_a_member_of_an_archive_and_of_a_column_of_text_it_is_said_what_to_pass() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writing:
        writing.writestr("x.png", encode(ramp(), "PNG"))
    member = zipfile.Path(archive, "x.png")
    with pytest.raises(TypeError, match=r"in an archive, what its read_bytes\(\) gives"):
        load_image(member)  # type: ignore[arg-type]
    assert load_image(member.read_bytes()).size == ramp().shape[::-1]

    class Column:  # as polars has it
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            return np.array(["x.png", "y.png"])

    with pytest.raises(ImageError, match=r"dtype <U5, .* Pass a column of paths as a list"):
        load_image(Column())  # type: ignore[arg-type]


def test_a_socket_is_no_tensor_and_stays_open() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(TypeError, match=r"expected a path, .* got socket"):
            load_image(ours)  # type: ignore[arg-type]
        theirs.sendall(encode(ramp(), "PNG"))
        theirs.shutdown(socket.SHUT_WR)
        with ours.makefile("rb") as stream:
            assert np.array_equal(loaded(stream), ramp())


@pytest.mark.parametrize("source", [None, 3, [[1, 2]], object()])
def test_a_source_of_another_type_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match=rf"expected a path, .* got {type(source).__name__}"):
        load_image(source)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (ramp(), ramp()),
        (ramp()[None], ramp()),
        (ramp()[..., None], ramp()),
        (ramp()[:, ::-2], ramp()[:, ::-2]),
        (colours(), luma(colours())),
        (np.moveaxis(colours(), -1, 0), luma(colours())),
        (np.dstack([colours(), ramp()]), np.rint(luma(colours()) * (ramp() / 255))),
        (ramp() > 99, 255 * (ramp() > 99)),
        (ramp().astype(np.uint16), ramp()),
        (ramp().astype(np.int64), ramp()),
        (ramp().astype(np.uint16) * 257, ramp()),
        (ramp().astype(">u2") * 257, ramp()),
        (ramp().astype(np.int16) * 16 - 1024, ramp()),
        (ramp().astype(np.int32) * 100_000 + 2**30, ramp()),
        (ramp() / 255, ramp()),
        ((ramp() / 255).astype(np.float16), ramp()),
        (ramp().astype(np.float32), ramp()),
        (ramp() * 1e30 - 1e30, ramp()),
        (colours() / 255, luma(colours())),
        (colours().astype(np.uint16) * 257, luma(colours())),
    ],
)
def test_arrays_of_any_layout_and_depth_give_8_bit_grey(
    array: np.ndarray, expected: np.ndarray
) -> None:
    result = loaded(array)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 1


def test_twelve_bits_in_sixteen_do_not_come_out_black() -> None:
    twelve = ramp().astype(np.uint16) << 4
    assert np.array_equal(loaded(twelve), stretched(twelve))
    assert np.array_equal(loaded(encode(twelve, "PNG")), stretched(twelve))


def test_a_float_image_just_above_one_is_not_taken_for_8_bits() -> None:
    overshoot = ramp() / 255 * 1.02
    assert np.array_equal(loaded(overshoot), stretched(overshoot))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.4, 1.0000001], [102, 255]),
        ([-1e-9, 0.5, 1.0009], [0, 128, 255]),
        ([0.0, 51.0, 255.2], [0, 51, 255]),
        ([-0.2, 51.0, 255.0], [0, 51, 255]),
    ],
)
def test_rounding_at_the_ends_does_not_change_the_scale(
    values: list[float], expected: list[int]
) -> None:
    assert loaded(np.array([values])).tolist() == [expected]


@pytest.mark.parametrize(
    ("grey", "opaque"),
    [
        (np.arange(0, 4095, 45).reshape(7, 13).astype(np.uint16), 65535),
        (np.arange(0, 4095, 45).reshape(7, 13).astype(np.uint16), 4095),
        (np.linspace(0, 255, 91).reshape(7, 13), 1.0),
        (np.linspace(0, 1, 91).reshape(7, 13), 1.0),
        (np.linspace(0, 1, 91).reshape(7, 13), 255.0),
    ],
)
def test_opacity_is_scaled_apart_from_colour(grey: np.ndarray, opaque: float) -> None:
    rgba = np.stack([grey] * 3 + [np.full_like(grey, opaque)], axis=-1)
    assert np.array_equal(loaded(rgba), loaded(grey))
    rgba[0, :, 3] = 0
    assert not loaded(rgba)[0].any()
    assert np.array_equal(loaded(rgba)[1:], loaded(grey)[1:])


@pytest.mark.parametrize("kind", ["uint8", "int16", "int64"])
def test_an_opacity_of_1_is_opaque_among_floats_alone(kind: str) -> None:
    rgba = np.stack([ramp()] * 3 + [np.ones_like(ramp())], axis=-1)
    assert np.array_equal(loaded(rgba.astype(np.float32)), ramp())
    assert loaded(rgba.astype(kind)).max() == 1  # of 255, whatever holds it


def test_a_dim_float_image_in_0_to_1_stays_dim() -> None:
    assert loaded(np.full((3, 5), 0.2)).max() == 51


@pytest.mark.parametrize("value", [0, 5, 4000, -3, 3.5, -7.25, 1e9])
def test_a_constant_image_is_constant_whatever_its_depth(value: float) -> None:
    result = loaded(np.full((7, 9), value))
    assert len(np.unique(result)) == 1
    assert result[0, 0] == (round(value) if 2 <= value <= 255 or value == 0 else 0)


def test_the_result_does_not_share_memory_with_the_array() -> None:
    array = ramp()
    image = load_image(array)
    array[:] = 0
    assert np.asarray(image).max() == 255


def test_a_masked_array_that_hides_nan_is_told_to_replace_it() -> None:
    masked = np.ma.masked_invalid([[np.nan, 1.0, 2.0]])
    with pytest.raises(ImageError, match=r"Replace them first; a mask of NumPy is not looked at"):
        load_image(masked)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_pixels_are_refused(bad: float) -> None:
    pixels = (ramp() / 255).astype(np.float32)
    pixels[3, 4] = bad
    for source in (pixels, torch.from_numpy(pixels), Image.fromarray(pixels)):
        with pytest.raises(ImageError, match="NaN, infinite or huge values"):
            load_image(source)
    with pytest.raises(ImageError, match="<bytes> holds NaN"):
        load_image(encode(pixels, "TIFF"))


def test_a_range_beyond_floating_point_is_refused() -> None:
    with pytest.raises(ImageError, match="huge"):
        load_image(np.array([[-1.7e308, 1.7e308]]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"shape \(\)"),
        ((5,), r"shape \(5,\)"),
        ((2, 5, 6), r"shape \(2, 5, 6\): expected one image"),
        ((5, 6, 2), r"shape \(5, 6, 2\): expected one image"),
        ((8, 1, 5, 6), "Pass a batch image by image"),
        ((3, 5, 3), "ambiguous"),
        ((1, 5, 1), "ambiguous"),
        ((0, 5), "5x0 pixels, expected at least 1x1"),
        ((3, 5, 0), "0x5 pixels"),
    ],
)
def test_arrays_of_impossible_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", [object, complex, "U3", "datetime64[s]"])
def test_arrays_of_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ImageError, match="expected bool, an integer or a float"):
        load_image(np.zeros((5, 6), dtype))


def test_tensors_with_gradient_and_half_precision_are_taken() -> None:
    pixels = torch.from_numpy(ramp() / 255).requires_grad_()
    assert np.array_equal(loaded(pixels), ramp())
    assert np.abs(loaded(pixels.to(torch.bfloat16)) - ramp()).max() <= 1
    planes = torch.from_numpy(colours()).permute(2, 0, 1)
    assert np.abs(loaded(planes) - luma(colours())).max() <= 1


def test_tensors_without_values_are_refused() -> None:
    with pytest.raises(ImageError, match="cannot become a NumPy array"):
        load_image(torch.zeros((5, 6), device="meta"))


@pytest.mark.parametrize("error", [OSError("unable to read chunk 3"), KeyError("scan")])
def test_an_array_that_is_read_only_now_may_break(error: Exception) -> None:
    class Lazy:  # as h5py, zarr and xarray have it
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            raise error

    with pytest.raises(ImageError, match=rf"<array> cannot become .* {type(error).__name__}: "):
        load_image(Lazy())  # type: ignore[arg-type]


def test_a_limit_of_pixels_that_is_text_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match="max_pixels must be a number, got '10'"):
        load_image(ramp(), max_pixels=cast(int, "10"))
    with pytest.raises(TypeError, match="min_size must be a number, got 'a'"):
        load_image(ramp(), min_size=cast("tuple[int, int]", ("a", "b")))


@pytest.mark.parametrize("options", [{"max_pixels": 0}, {"min_size": (0, 5)}])
def test_limits_that_are_not_positive_are_value_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        load_image(ramp(), **options)


# ---------------------------------------------------------------- faults, row 19: golden files


def ycck_jpeg() -> tuple[bytes, np.ndarray]:
    """A JPEG whose Adobe segment says YCCK; Pillow writes CMYK, inverted, and says so (0)."""
    cyan, black = ramp(), np.full_like(ramp(), 60)
    middle = np.full_like(ramp(), 127)
    image = Image.merge("CMYK", [Image.fromarray(p) for p in (cyan, middle, middle, black)])
    data = bytearray(encode(image, "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    # Stored 255-c, 128, 128, 255-k: neutral, so that CMY becomes 255-c and the grey c*(255-k)/255.
    return bytes(data), cyan * (195 / 255)


@cache
def golden_files() -> dict[str, tuple[bytes, np.ndarray]]:
    grey, rgb = ramp(), colours()
    alpha = ramp()[::-1]
    on_black = np.rint(luma(rgb) * (alpha / 255))
    cmyk = Image.fromarray(rgb).convert("CMYK")
    few = np.array([[0, 1], [2, 3]], np.uint8).repeat(20, 0).repeat(32, 1)
    palette = Image.fromarray(few, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 255, 255, 255])
    table = np.array([0, 76, 150, 255])  # luma of black, red, green, white
    frames = [Image.fromarray(grey), Image.fromarray(255 - grey)]
    turned = Image.Exif()
    turned[0x0112] = 6  # the stored top is the right-hand side
    ycck, ycck_grey = ycck_jpeg()
    white_is_zero = Image.fromarray(grey.astype(np.uint16) * 257)
    return {
        "16-bit png": (encode(grey.astype(np.uint16) * 257, "PNG"), grey),
        "16-bit tiff": (encode(grey.astype(np.uint16) * 257, "TIFF"), grey),
        "16-bit tiff, white is zero": (
            encode(white_is_zero, "TIFF", tiffinfo={262: 0}),
            255 - grey,
        ),
        "12-in-16 png": (encode(grey.astype(np.uint16) << 4, "PNG"), grey),
        "float tiff": (encode((grey / 255).astype(np.float32), "TIFF"), grey),
        "32-bit tiff": (encode(grey.astype(np.int32) * 1000, "TIFF"), grey),
        "1-bit png": (encode(Image.fromarray(grey > 99), "PNG"), 255 * (grey > 99)),
        "1-bit tiff": (encode(Image.fromarray(grey > 99), "TIFF"), 255 * (grey > 99)),
        "cmyk tiff": (encode(cmyk, "TIFF"), luma(rgb)),
        "cmyk jpeg": (encode(cmyk, "JPEG", quality=100, subsampling=0), luma(rgb)),
        "ycck jpeg": (ycck, ycck_grey),
        "la png": (encode(np.dstack([grey, alpha]), "PNG"), np.rint(grey * (alpha / 255))),
        "rgba png": (encode(np.dstack([rgb, alpha]), "PNG"), on_black),
        "rgba webp": (encode(np.dstack([rgb, alpha]), "WEBP", lossless=True, exact=True), on_black),
        "p png": (encode(palette, "PNG"), table[few]),
        "p png, one transparent": (
            encode(palette, "PNG", transparency=3),
            (table * [1, 1, 1, 0])[few],
        ),
        "p png, alphas": (
            encode(palette, "PNG", transparency=bytes([255, 128, 0, 51])),
            np.array([0, 38, 0, 51])[few],
        ),
        "l png, one transparent": (encode(few * 80, "PNG", transparency=240), (few * 80) % 240),
        "animated gif": (encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), grey),
        "turned png": (encode(grey, "PNG", exif=turned), grey.T[:, ::-1]),
        "icc png": (encode(rgb, "PNG", icc_profile=b"not a profile"), luma(rgb)),
    }


@pytest.mark.parametrize("name", golden_files())
@pytest.mark.filterwarnings("ignore::chestxray_covid.image.ImageWarning")
def test_golden_files_of_every_pixel_kind_come_out_within_one_grey_level(name: str) -> None:
    data, expected = golden_files()[name]
    result = loaded(data)
    assert result.shape == expected.shape
    tolerance = 4 if "jpeg" in name else 1  # the largest error of JPEG at quality 100 here
    assert np.abs(result - expected).max() <= tolerance
    assert abs(result.mean() - expected.mean()) <= 1


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "RGBa", "PA", "RGBX", "I;16B"])
def test_rarer_modes_of_pillow_give_the_grey_of_the_same_picture(mode: str) -> None:
    grey = Image.fromarray(ramp())
    if mode == "I;16B":
        image = Image.frombytes("I;16B", grey.size, (ramp().astype(">u2") * 257).tobytes())
    elif mode == "PA":
        image = grey.convert("P").convert("PA")
    else:
        image = grey.convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    assert np.abs(loaded(image) - ramp()).max() <= 1


def test_premultiplied_grey_is_the_grey_on_black() -> None:
    image = Image.merge("LA", [Image.fromarray(ramp()), Image.fromarray(ramp()[::-1])])
    assert np.abs(loaded(image.convert("La")) - loaded(image)).max() <= 1


def test_a_later_frame_of_a_gif_without_a_palette_is_decoded() -> None:
    frames = [Image.fromarray(np.roll(ramp(), k, 0)) for k in range(3)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False)
    for k, frame in enumerate(frames):
        gif = Image.open(io.BytesIO(data))
        gif.seek(k)
        if k == 1:
            gif.load()
            gif._mode, gif.palette = "P", None  # as the decoder leaves the second of some files
            gif.im.putpalette("RGB", "RGB", bytes(np.arange(256).repeat(3).astype(np.uint8)))
        assert np.abs(loaded(gif) - np.asarray(frame)).max() <= 1


# ---------------------------------------------------------------- channels of 16 bits


def deep_png(
    planes: np.ndarray, colour_type: int, *, depth: int = 16, hidden: tuple[int, ...] = ()
) -> bytes:
    height, width, _ = planes.shape

    def packed(row: np.ndarray) -> bytes:
        if depth == 16:
            return row.astype(">u2").tobytes()
        bits = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)
        return np.packbits(bits[:, -depth:]).tobytes()

    rows = b"".join(b"\0" + packed(row) for row in planes)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    if hidden:
        parts = chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden)) + parts
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + parts


def deep_tiff(
    planes: np.ndarray, order: str = "<", *, deflate: bool = False, kind: int = 2, **tags: int
) -> bytes:
    """A TIFF of one strip, with ``kind`` its photometric interpretation."""
    height, width, count = planes.shape
    data = planes.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflate else data
    data += b"\0" * (len(data) % 2)
    entries = {
        256: width,
        257: height,
        258: 8 + len(data),
        259: 8 if deflate else 1,
        262: kind,
        273: 8,
        274: tags.get("orientation", 1),
        277: count,
        278: height,
        279: len(data),
        284: tags.get("planar", 1),
    }
    if count == 4 and kind == 2:
        entries[338] = tags.get("extra", 2)
    start = 8 + len(data) + 2 * count
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start) + data
    out += struct.pack(f"{order}{count}H", *[16] * count) + struct.pack(f"{order}H", len(entries))
    for tag, value in entries.items():
        many = count if tag == 258 else 1
        out += struct.pack(f"{order}HHI", tag, 3 if tag == 258 else 4, many)
        out += struct.pack(f"{order}I", value)
    return out + bytes(4)


def twelve_in_sixteen(channels: int) -> np.ndarray:
    """12 bits of grey in so many channels, with an opaque last one if there are 2 or 4."""
    grey = np.rint(ramp().astype(float) * 4095 / 255).astype(np.uint16)
    opaque = [np.full_like(grey, 65535)] if channels in (2, 4) else []
    return np.stack([grey] * (channels - len(opaque)) + opaque, axis=-1)


@pytest.mark.parametrize(
    "data",
    [
        deep_png(twelve_in_sixteen(2), 4),
        deep_png(twelve_in_sixteen(3), 2),
        deep_png(twelve_in_sixteen(4), 6),
        *(deep_tiff(twelve_in_sixteen(n), o) for n in (3, 4) for o in "<>"),
        *(deep_tiff(twelve_in_sixteen(n), o, deflate=True) for n in (3, 4) for o in "<>"),
        deep_tiff(twelve_in_sixteen(4), extra=0),
    ],
)
def test_twelve_bits_in_several_channels_of_sixteen_do_not_come_out_black(data: bytes) -> None:
    assert np.array_equal(loaded(data), ramp())
    assert read_image(data)[1].colour == 0


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("depth", "channels"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)]
)
def test_a_level_that_is_transparent_is_black_at_every_depth(
    depth: int, channels: int, orientation: int
) -> None:
    most = 2**depth - 1
    levels = np.rint(ramp() * (most / 255)).astype(np.uint16)
    levels[:5] = most
    planes = np.stack([levels] * channels, axis=-1)
    data = deep_png(planes, channels - 1, depth=depth, hidden=(most,) * channels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    chunk = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk)) + b"eXIf" + chunk
    data = data[:33] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + data[33:]
    expected = np.where(levels == most, 0, np.rint(levels * (255 / most)))
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    assert np.abs(loaded(data) - expected).max() <= 1
    assert np.abs(loaded(Image.open(io.BytesIO(data))) - expected).max() <= 1


@pytest.mark.parametrize(
    ("kind", "channels"), [("PNG", 2), ("PNG", 3), ("PNG", 4), ("TIFF", 3), ("TIFF", 4)]
)
def test_deep_channels_that_pillow_has_opened_are_those_of_the_file(
    kind: str, channels: int, tmp_path: Path
) -> None:
    planes = twelve_in_sixteen(channels)
    data = deep_png(planes, {2: 4, 3: 2, 4: 6}[channels]) if kind == "PNG" else deep_tiff(planes)
    (tmp_path / "deep").write_bytes(data)
    opened = Image.open(tmp_path / "deep")  # whose file is closed, or it would warn
    assert np.array_equal(loaded(opened), ramp())
    assert opened.tobytes() == Image.open(io.BytesIO(data)).tobytes(), "left as it was"


@pytest.mark.parametrize("deflate", [False, True])
def test_a_page_of_a_deep_tiff_that_pillow_was_turned_to_keeps_its_depth(
    deflate: bool, tmp_path: Path
) -> None:
    pages = [np.roll(twelve_in_sixteen(3), k, 0) for k in range(3)]
    with AppendingTiffWriter(tmp_path / "pages.tif") as file:
        for page in pages:
            file.write(deep_tiff(page, deflate=deflate))
            file.newFrame()
    with Image.open(tmp_path / "pages.tif") as opened:
        for k in (1, 2, 0):
            opened.seek(k)
            assert np.array_equal(loaded(opened), np.roll(ramp(), k, 0))


def test_a_signed_tiff_that_pillow_has_opened_does_not_wrap_around() -> None:
    values = np.arange(-100, 100, dtype=np.int8).reshape(10, 20)
    opened = Image.open(io.BytesIO(grey_tiff(values, "<", deflate=False)))
    assert np.array_equal(loaded(opened), loaded(values))


def test_colour_and_opacity_of_sixteen_bits_are_those_of_the_array() -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 65536, (20, 30, 4)).astype(np.uint16)
    planes[0, 0, 3] = 65535
    assert np.array_equal(loaded(deep_png(planes, 6)), loaded(planes))
    assert np.array_equal(loaded(deep_png(planes[..., :3], 2)), loaded(planes[..., :3]))


@pytest.mark.parametrize("deflate", [False, True])
def test_a_deep_colour_tiff_is_turned_upright_once(deflate: bool) -> None:
    data = deep_tiff(twelve_in_sixteen(3), deflate=deflate, orientation=6)
    assert np.array_equal(loaded(data), ramp().T[:, ::-1])


def test_a_deep_colour_png_is_turned_upright_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    data = deep_png(twelve_in_sixteen(3), 2)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    assert np.array_equal(loaded(data[:33] + chunk + data[33:]), ramp().T[:, ::-1])


@pytest.mark.parametrize(
    "data",
    [
        deep_tiff(twelve_in_sixteen(3), planar=2),
        deep_tiff(twelve_in_sixteen(3), planar=2, deflate=True),
        deep_tiff(twelve_in_sixteen(4), extra=1),
        deep_tiff(twelve_in_sixteen(4), kind=5),
    ],
)
def test_layouts_of_which_bits_would_be_lost_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"TIFF of 16 bits a channel .* Save it as 16-bit grey"):
        load_image(data)


def grey_tiff(values: np.ndarray, order: str, *, deflate: bool) -> bytes:
    """A TIFF of one strip and one channel, of whole or floating-point numbers."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if deflate else data
    data += b"\0" * (len(data) % 2)
    entries = {
        256: values.shape[1],
        257: values.shape[0],
        258: 8 * values.dtype.itemsize,
        259: 8 if deflate else 1,
        262: 1,
        273: 8,
        277: 1,
        278: values.shape[0],
        279: len(data),
        339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind],
    }
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data)) + data
    out += struct.pack(f"{order}H", len(entries))
    for tag, value in entries.items():
        out += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return out + bytes(4)


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16", "int32", "float32"])
def test_a_tiff_shows_its_numbers_whatever_their_type_order_and_compression(
    kind: str, order: str, deflate: bool
) -> None:
    values = np.random.default_rng(0).integers(-128, 128, (20, 30)).astype(kind)
    values = values * values.dtype.type(200) if values.dtype.itemsize > 1 else values
    assert np.array_equal(loaded(grey_tiff(values, order, deflate=deflate)), loaded(values))


@pytest.mark.parametrize("deflate", [False, True])
def test_a_tiff_of_32_bits_without_sign_does_not_wrap_around(deflate: bool) -> None:
    values = np.linspace(0, 2**32 - 1, 600).astype(np.uint32).reshape(20, 30)
    assert np.array_equal(loaded(grey_tiff(values, "<", deflate=deflate)), loaded(values))
    small = values >> np.uint32(24)
    assert np.array_equal(loaded(grey_tiff(small, "<", deflate=deflate)), small)


@pytest.mark.parametrize("mode", ["LA", "La"])
def test_grey_and_opacity_in_planes_of_their_own_are_refused(mode: str) -> None:
    def tag(number: int, value: int) -> bytes:
        return struct.pack("<HHII", number, 3, 1, value)

    data = encode(np.dstack([ramp(), ramp()]), "TIFF", compression="tiff_adobe_deflate")
    assert tag(284, 1) in data
    assert tag(338, 2) in data
    data = data.replace(tag(284, 1), tag(284, 2))
    if mode == "La":  # TIFF 6.0, tag 338: 1 is opacity that grey has been multiplied by
        data = data.replace(tag(338, 2), tag(338, 1))
    with pytest.raises(ImageError, match=rf"TIFF of 8 bits a channel in a layout \({mode}\)"):
        load_image(data)
    with pytest.raises(ImageError, match=rf"PIL image> is a TIFF .* in a layout \({mode}\)"):
        load_image(Image.open(io.BytesIO(data)))


def test_a_mode_that_pillow_cannot_convert_is_refused() -> None:
    with pytest.raises(ImageError, match="conversion from LAB to RGB not supported"):
        load_image(Image.new("LAB", (8, 8)))
    with pytest.raises(ImageError, match=r"TIFF that can be read: .*conversion from LAB"):
        load_image(encode(Image.new("LAB", (8, 8)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    kind, *rest = kind.split()
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    if rest:
        options = {"compression": "tiff_lzw"}
    data = encode(ramp(), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    result = load_image(data)
    assert np.array_equal(result, upright.convert("L"))
    assert np.array_equal(load_image(Image.open(io.BytesIO(data))), result)
    assert np.array_equal(load_image(result), result)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own, while it opens a JPEG
def test_broken_exif_does_not_cost_the_image(kind: str) -> None:
    data = encode(ramp(), kind, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert loaded(data).shape == ramp().shape


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_used_and_a_warning_says_so(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [Image.fromarray(255 - ramp()), Image.fromarray(ramp() // 2)]
    data = encode(ramp(), kind, save_all=True, append_images=frames, **options)
    with pytest.warns(ImageWarning, match="<bytes> holds more than one frame"):
        assert np.array_equal(loaded(data), ramp())


def test_the_warning_points_at_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "two.tif"
    path.write_bytes(encode(ramp(), "TIFF", save_all=True, append_images=[Image.new("L", (3, 3))]))
    with pytest.warns(ImageWarning) as caught:
        load_image(path)
    assert caught[0].filename == __file__


def test_a_damaged_second_frame_does_not_cost_the_first() -> None:
    data = encode(ramp(), "GIF", save_all=True, append_images=[Image.fromarray(255 - ramp())])
    cut = data[: len(data) * 2 // 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageWarning)
        assert np.array_equal(loaded(cut), ramp())


def test_a_pil_source_is_left_as_it_was() -> None:
    image = Image.fromarray(colours())
    image.info["note"] = "mine"
    load_image(image)
    assert (image.mode, image.info["note"]) == ("RGB", "mine")
    grey = Image.fromarray(ramp())
    load_image(grey).putpixel((0, 0), 99)
    assert grey.getpixel((0, 0)) == 0


def test_a_truncated_pil_source_is_an_image_error() -> None:
    lazy = Image.open(io.BytesIO(encode(ramp(400, 640), "PNG")[:-200]))
    with pytest.raises(ImageError, match="<PIL image> cannot be converted to grey"):
        load_image(lazy)
    with pytest.raises(ImageError, match="<PIL image> is 0x5 pixels"):
        load_image(Image.new("L", (0, 5)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
def test_a_pil_source_that_was_closed_unread_is_said_to_be(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(encode(ramp(), kind))
    with Image.open(path) as closed:
        pass
    with pytest.raises(ImageError, match=r"closed before it was loaded\. Call its load\(\) before"):
        load_image(closed)
    with Image.open(path) as kept:
        kept.load()
    assert load_image(kept).size == ramp().shape[::-1]


# ---------------------------------------------------------------- decoding at a reduced scale


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_keeps_the_wanted_size() -> None:
    data = encode(ramp(960, 1280), "JPEG", quality=95)
    for min_size, expected in [
        (None, (1280, 960)),
        ((1280, 960), (1280, 960)),
        ((641, 100), (1280, 960)),
        ((640, 480), (640, 480)),
        ((224, 224), (320, 240)),
        ((100, 100), (160, 120)),
        ((1, 1), (160, 120)),
        ((5000, 5000), (1280, 960)),
    ]:
        assert load_image(data, min_size=min_size).size == expected
    whole = load_image(data).resize((160, 120), Image.Resampling.BOX)
    assert np.abs(np.asarray(whole).astype(int) - loaded(data, min_size=(100, 100))).max() <= 2


def test_the_wanted_size_counts_after_turning_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(ramp(400, 1600), "JPEG", exif=exif)
    assert load_image(data, min_size=(390, 100)).size == (400, 1600)
    assert load_image(data, min_size=(100, 390)).size == (100, 400)


def lossless_jpeg(pixels: np.ndarray) -> bytes:
    """As ITU-T T.81, annex H, has it: differences from the pixel to the left, in Huffman's code."""
    values = pixels.astype(int)
    predicted = np.full_like(values, 128)
    predicted[:, 1:], predicted[1:, 0] = values[:, :-1], values[:-1, 0]
    bits = ""
    for difference in map(int, (values - predicted).ravel()):
        length = abs(difference).bit_length()
        low = difference if difference > 0 else difference + (1 << length) - 1
        bits += f"{length:04b}" + (f"{low:0{length}b}" if length else "")
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB3B", 8, *pixels.shape, 1, 1, 0x11, 0)
    codes = bytes([0, 0, 0, 0, 9, *[0] * 12, *range(9)])  # nine of four bits
    head = {0xC3: frame, 0xC4: codes, 0xDA: bytes([1, 1, 0, 1, 0, 0])}
    parts = (b"\xff" + struct.pack(">BH", key, len(x) + 2) + x for key, x in head.items())
    return b"\xff\xd8" + b"".join(parts) + scan + b"\xff\xd9"


def test_a_lossless_jpeg_is_decoded_in_full_whatever_size_is_wanted() -> None:
    data = lossless_jpeg(ramp(300, 400))
    assert np.array_equal(loaded(data), ramp(300, 400))
    assert np.array_equal(loaded(data, min_size=(64, 64)), ramp(300, 400))


def test_colour_jpegs_at_a_reduced_scale_are_the_luma_of_the_whole() -> None:
    for mode in ("RGB", "CMYK"):
        image = Image.fromarray(colours(400, 640)).convert(mode)
        data = encode(image, "JPEG", quality=95, subsampling=0)
        small = loaded(data, min_size=(80, 50))
        expected = Image.fromarray(luma(colours(400, 640)).astype(np.uint8)).reduce(8)
        assert np.abs(small - np.asarray(expected)).max() <= 3


# ---------------------------------------------------------------- faults, row 17: damaged files


def damaged(kind: str, data: bytes, rng: np.random.Generator) -> bytes:
    body = bytearray(data)
    if kind == "truncated":
        return bytes(body[: rng.integers(1, len(body))])
    if kind.endswith("bits flipped"):
        for position in rng.integers(0, 8 * len(body), int(kind.split()[0])):
            body[position // 8] ^= 1 << (position % 8)
    elif kind == "zeroed block":
        start = int(rng.integers(0, len(body)))
        body[start : start + 512] = bytes(len(body[start : start + 512]))
    elif kind == "bad checksum":
        body[-16:-4] = rng.bytes(12)
    elif kind == "cut out":
        start = int(rng.integers(8, len(body)))
        del body[start : start + int(rng.integers(1, 200))]
    elif kind == "header noise":
        body[8:64] = rng.bytes(56)
    elif kind == "junk behind":
        body += rng.bytes(999)
    elif kind == "html":
        return b"\n <!DOCTYPE html><html><body>404</body></html>"
    elif kind == "empty":
        return b""
    elif kind == "noise":
        return data[:4] + rng.bytes(2000)
    return bytes(body)


KINDS = (
    *("truncated", "1 bits flipped", "16 bits flipped", "256 bits flipped", "zeroed block"),
    *("bad checksum", "cut out", "header noise", "junk behind", "html", "empty", "noise"),
)


def damage_sources() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = {"exif": exif}
    options = {"JPEG": turned, "PNG": turned, "WEBP": turned, "TIFF": {"compression": "tiff_lzw"}}
    plain = [encode(pixels, kind, **options.get(kind, {})) for kind in FORMATS]
    progressive = encode(colours(), "JPEG", progressive=True, icc_profile=b"x" * 200)
    return [
        *plain,
        progressive,
        encode(pixels, "TIFF"),
        encode(colours(), "TIFF", compression="jpeg"),
    ]


def refusal(data: bytes) -> str | None:
    """Return why an image is refused, None if it is decoded; any other exception is a failure."""
    try:
        load_image(data)
    except ImageError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
def test_three_hundred_damaged_files_are_decoded_or_refused_and_none_hangs() -> None:
    assert len(KINDS) == 12
    sources = damage_sources()
    refused, slowest = 0, 0.0
    for i, kind in enumerate(KINDS):
        for seed in range(25):
            data = damaged(kind, sources[seed % len(sources)], np.random.default_rng([i, seed]))
            start = time.thread_time()
            message = refusal(data)
            assert message is None or message.startswith(("<bytes>", "A tile of <bytes>"))
            refused += message is not None
            slowest = max(slowest, time.thread_time() - start)
    assert 100 < refused < 300
    assert slowest < 2  # seconds, the bar of what counts as a hang


@pytest.mark.parametrize("kind", FORMATS)
def test_warnings_as_errors_make_damaged_files_image_errors_too(kind: str) -> None:
    data = encode(ramp(), kind)
    for cut in range(0, len(data), max(1, len(data) // 40)):
        message = refusal(data[:cut])
        assert message is None or message.startswith("<bytes>")


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "GIF"])
def test_a_truncated_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (200, 300)).astype(np.uint8)
    path = tmp_path / "cut.img"
    path.write_bytes(encode(noise, kind)[:9000])
    with pytest.raises(ImageError, match=f"cut.img is damaged, or not a {kind}.*\\. Fetch or save"):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; fetch it again"),
        (bytes(3000), "is all zeros"),
        (b"<!DOCTYPE HTML><title>", "is an HTML page"),
        (b"\n\n<html>", "is an HTML page"),
        (b'<?xml version="1.0"?>', "is an XML document"),
        (b"<svg>", "is an SVG drawing"),
        (b'{"error": 404}', "looks like JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"%PDF-1.7", "is a PDF"),
        (b"PK\x03\x04", "zip archive"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\0\x05\x16\x07\0\x02", "macOS resource fork"),
        (b"\0\0\0\x0cjP  ", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"\0\0\0\x20ftypheic", "HEIF"),
        (b"plain words", "begins with b'plain wo'"),
    ],
)
def test_what_is_no_image_is_refused_with_what_it_looks_like(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f"x.png .*{message}.* Expected PNG, JPEG"):
        load_image(path)


def test_an_image_of_one_pixel_is_an_image() -> None:
    for kind in FORMATS:
        assert load_image(encode(np.full((1, 1), 7, np.uint8), kind)).size == (1, 1)


# ---------------------------------------------------------------- faults, row 18: header bombs


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def tiff_claiming(size: int, tile: int) -> bytes:
    values = [(256, size), (257, size), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile)]
    values += [(323, tile), (324, 8), (325, 60)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values)
    packed = zlib.compress(bytes(40_000))
    start = struct.pack("<2sHI", b"II", 42, 8 + 60)
    return start + packed[:60].ljust(60) + struct.pack("<H", len(values)) + entries + bytes(4)


@cache
def header_bombs() -> dict[str, bytes]:
    small = ramp()
    jpeg = bytearray(encode(small, "JPEG"))
    sof = jpeg.index(b"\xff\xc0")
    jpeg[sof + 5 : sof + 9] = struct.pack(">HH", 65500, 65500)
    gif = bytearray(encode(small, "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(encode(small, "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    webp = bytearray(encode(small, "WEBP", lossless=True))
    start = webp.index(b"VP8L") + 9
    webp[start : start + 4] = struct.pack("<I", 16382 | 16382 << 14)
    return {
        "png 50000": png_claiming(50_000, 50_000),
        "png 13000": png_claiming(13_000, 13_000),  # where Pillow only warns
        "png just above": png_claiming(8001, 8000),
        "jpeg 65500": bytes(jpeg),
        "gif canvas": bytes(gif),
        "bmp 50000": bytes(bmp),
        "webp 16383": bytes(webp),
        "tiff 50000": tiff_claiming(50_000, 256),
        "tiff tiles": tiff_claiming(100, 30_000),
    }


@pytest.mark.parametrize("name", header_bombs())
def test_an_image_that_claims_too_many_pixels_is_refused_without_a_warning(name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    start = time.thread_time()
    with pytest.raises(ImageError, match=r"larger max_pixels|could be decompression bomb"):
        load_image(header_bombs()[name])
    assert time.thread_time() - start < 0.1
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_advice_for_an_image_of_too_many_pixels_leads_to_a_models_pixels() -> None:
    source = np.zeros((8001, 8000), np.uint8)
    whole = load_image(source, max_pixels=source.size)
    preprocess = Preprocess(size_px=32)
    with pytest.raises(
        ImageError, match=r"pass load_image a larger max_pixels; .* reduce what that"
    ):
        preprocess(whole)
    assert preprocess(whole.reduce(8)).shape == (1, 32, 32)


def test_a_tile_larger_than_its_tiff_is_decoded_within_the_limit() -> None:
    assert np.array_equal(loaded(tiff_claiming(100, 128)), np.zeros((100, 100)))


def test_the_limit_names_the_size_and_can_be_set() -> None:
    assert load_image(ramp(), max_pixels=40 * 64).size == (64, 40)
    for source in (ramp(), Image.fromarray(ramp()), encode(ramp(), "PNG"), encode(ramp(), "JPEG")):
        with pytest.raises(ImageError, match=r"64x40 pixels, more than the limit of 2559"):
            load_image(source, max_pixels=40 * 64 - 1)


def jpeg_of_scans(size: int, repeats: int) -> bytes:
    data = encode(np.zeros((size, size), np.uint8), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * repeats + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    with pytest.raises(ImageError, match=f"JPEG of 10006 scans, more than {MAX_JPEG_SCANS}"):
        load_image(jpeg_of_scans(64, 10_000))
    assert load_image(jpeg_of_scans(64, 20)).size == (64, 64)


def test_scans_are_counted_where_the_first_does_not_hold_all_components() -> None:
    picture = Image.fromarray(ramp()).convert("RGB")
    data = bytearray(encode(picture, "JPEG"))
    last = bytes(data[data.rindex(b"\xff\xda") : -2])
    sof = data.index(b"\xff\xc0")
    data[sof + 9] = 4  # components in the frame, of which the scan has 3
    with pytest.raises(ImageError, match=f"JPEG of 61 scans, more than {MAX_JPEG_SCANS}"):
        check_jpeg(bytes(data[:-2]) + last * 60 + b"\xff\xd9", "it", 10_000)


def test_a_second_frame_header_does_not_smuggle_in_a_larger_size() -> None:
    data = encode(ramp(), "JPEG")
    sof = data.index(b"\xff\xc0")
    header = bytearray(data[sof : sof + 13])
    header[5:9] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(ImageError, match="65000x65000 pixels, more than the limit"):
        check_jpeg(data[: sof + 13] + header + data[sof + 13 :], "it", 10_000)


def test_scans_are_not_counted_in_thumbnails_nor_behind_the_image() -> None:
    fakes = b"\xff\xda\0\x08" * 100
    data = encode(ramp(), "JPEG", exif=b"Exif\0\0" + fakes, icc_profile=fakes) + fakes * 500
    assert load_image(data).size == (64, 40)


def test_bombs_cost_less_than_fifty_megabytes(tmp_path: Path) -> None:
    for i, data in enumerate([*header_bombs().values(), deflated_bomb(), jpeg_2000_bomb()]):
        (tmp_path / f"{i:02}.bomb").write_bytes(data)
    code = f"""
        import resource, sys
        from pathlib import Path
        import pydicom.pixels
        from chestxray_covid.image import ImageError, load_image
        assert "torch" not in sys.modules
        def peak_mb():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before, refused = peak_mb(), 0
        for path in sorted(Path({str(tmp_path)!r}).iterdir()):
            try:
                load_image(path)
            except ImageError:
                refused += 1
        sys.stdout.write(f"{{refused}} {{peak_mb() - before}}")
    """
    source = Path(chestxray_covid.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, growth_mb = done.stdout.split()
    assert int(refused) == len(list(tmp_path.iterdir()))
    assert float(growth_mb) < 50


# ---------------------------------------------------------------- faults, row 22: hostile paths


@pytest.mark.parametrize("address", ["https://host.org/x.png", "s3://bucket/x.dcm"])
def test_an_address_is_said_to_be_none_that_is_fetched(address: str) -> None:
    with pytest.raises(ImageNotFoundError, match=r"looks like an address\. Download it"):
        load_image(address)


def test_a_missing_file_a_broken_link_and_a_loop_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageNotFoundError, match=r"absent\.png does not exist"):
        load_image(tmp_path / "absent.png")
    broken = tmp_path / "broken.png"
    broken.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"broken\.png is a link to nothing"):
        load_image(broken)
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    with pytest.raises(ImageError, match=r"loop\.png cannot be opened: OSError"):
        load_image(loop)
    inside = tmp_path / "x.png"
    inside.write_bytes(encode(ramp(), "PNG"))
    with pytest.raises(ImageError, match="NotADirectoryError"):
        load_image(inside / "y.png")


def test_a_link_to_an_image_is_followed(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(ramp(), "PNG"))
    (tmp_path / "link.png").symlink_to(tmp_path / "x.png")
    assert np.array_equal(loaded(tmp_path / "link.png"), ramp())


def test_pipes_sockets_devices_and_folders_are_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")  # opening it would wait for a writer for ever
    (tmp_path / "b.png").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "c.png"))  # a path of at most 108 bytes
        names = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
        for path in [*names, Path("/dev/zero"), Path("/dev/null"), "."]:
            with pytest.raises(ImageNotFoundError, match=r"is a (folder|pipe, socket or device)"):
                load_image(path)
        with pytest.raises(ImageNotFoundError, match="is empty"):
            load_image("")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encode(ramp(), "PNG"))
    path.chmod(0)
    with pytest.raises(ImageError, match="PermissionError"):
        load_image(path)


def test_a_hundred_hostile_names_are_read_and_shown_without_control_characters(
    tmp_path: Path,
) -> None:
    odd = ["\n", "\r", "\t", ",", ";", "=cmd|'calc'!A0", "@x", "-rf", "'", '"', "\\", "%s{}"]
    odd += [
        "\u202egnp.exe",
        "\u200b",
        "\x1b[31m",
        "\x7f",
        "ä",
        "肺",
        "🫁",
        " ",
        "~",
        "$HOME",
        "*",
        "?",
    ]
    odd += ["\udcff\udcfe", "x" * 240]  # bytes that are not UTF-8; 255 bytes with the rest
    names = [f"{text}{i}" for text in odd for i in range(4)][:100]
    assert len(set(names)) == 100
    data = encode(ramp(), "PNG")
    for name in names:
        path = tmp_path / name
        path.write_bytes(data)
        assert load_image(path).size == (64, 40)
        assert load_image(os.fsencode(path).decode("utf-8", "surrogateescape")).size == (64, 40)
        path.write_bytes(b"no image")
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert str(caught.value).isprintable()
    with pytest.raises(ImageError, match="cannot be opened: ValueError"):
        load_image("a\0b.png")
    with pytest.raises(ImageError, match="File name too long"):
        load_image("x" * 5000)


# ---------------------------------------------------------------- faults, row 20: DICOM


def test_a_table_and_a_pydicom_data_set_are_no_images_and_the_way_is_said() -> None:
    table = SyntheticChestXray(2, image_size_px=32).metadata
    for source in (table, pydicom.dcmread(io.BytesIO(dicom(ramp())))):
        kind = type(source).__name__
        with pytest.raises(TypeError, match=rf"got {kind}\. Of a table, .*; of a pydicom data set"):
            load_image(source)


BIG_ENDIAN = "1.2.840.10008.1.2.2"


def dicom(pixels: np.ndarray | None, *, syntax: str = "1.2.840.10008.1.2.1", **extra: Any) -> bytes:
    """A DICOM file of grey or RGB pixels; ``extra`` sets or, with None, removes elements."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = "1.2.3.4"
    data.PatientName = "Doe^Secret"
    if pixels is not None:
        data.Rows, data.Columns = (
            pixels.shape[-3:-1] if pixels.shape[-1] == 3 else pixels.shape[-2:]
        )
        data.SamplesPerPixel = 3 if pixels.shape[-1] == 3 else 1
        data.PhotometricInterpretation = "RGB" if pixels.shape[-1] == 3 else "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        data.PlanarConfiguration = 0
        order = ">" if syntax.endswith(".1.2.2") else "<"
        data.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        data["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    high_bit = extra.pop("HighBit", None)
    for key, value in extra.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    if pixels is not None:
        data.HighBit = high_bit or data.BitsStored - 1
        if syntax.startswith(("1.2.840.10008.1.2.4", RLE)):
            data["PixelData"].VR = "OB"
            data["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    return buffer.getvalue()


def twelve_bits() -> np.ndarray:
    return ramp().astype(np.uint16) * 16 + 15


def lut(entries: int, first: int, bits: int, values: np.ndarray) -> Any:
    item = pydicom.Dataset()
    item.LUTDescriptor = [entries % 65536, first, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = values.tolist()
    item["LUTData"].VR = "US"
    return pydicom.Sequence([item])


def words(dtype: str, entries: int = 4096) -> Any:
    bits = int(math.log2(entries))
    sequence = lut(entries, 0, bits, np.zeros(1, int))
    sequence[0]["LUTData"].VR = "OW"
    sequence[0].LUTData = np.arange(entries).astype(dtype).tobytes()
    return sequence


def functional_groups(window: tuple[str, str], rescale: tuple[str, str] | None = None) -> Any:
    voi, transformation, groups = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    voi.WindowCenter, voi.WindowWidth = window
    voi.Rows, voi.PhotometricInterpretation = 9, "MONOCHROME1"  # which no group may say
    groups.FrameVOILUTSequence = pydicom.Sequence([voi])
    if rescale:
        transformation.RescaleSlope, transformation.RescaleIntercept = rescale
        groups.PixelValueTransformationSequence = pydicom.Sequence([transformation])
    return groups


def compressed(syntax: str, frame: bytes) -> bytes:
    encapsulated = pydicom.encaps.encapsulate([frame])
    return dicom(ramp(), syntax=syntax, PixelData=encapsulated)


J2K, JPEG = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.50"
RLE, EXTENDED = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.51"
PROGRESSIVE = "1.2.840.10008.1.2.4.55"
MPEG2, BIG = "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.2"


@cache
def dicom_files() -> dict[str, tuple[bytes, np.ndarray]]:
    grey, twelve, rgb = ramp(), twelve_bits(), colours()
    square, stored = np.arange(4096), twelve.astype(float)
    rescaled = dicom(twelve, BitsStored=12, RescaleSlope="2", RescaleIntercept="-1000")
    window = {"BitsStored": 12, "WindowCenter": "2048", "WindowWidth": "1024"}
    inside = np.clip((stored - 2047.5) / 1023 + 0.5, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    exactly = np.clip((stored - 2048) / 1024 + 0.5, 0, 1) * 255
    sigmoid = 255 / (1 + np.exp(-4 * (stored - 2048) / 1024))
    hounsfield = np.clip((stored * 2.0 - 1000 - 2047.5) / 1023 + 0.5, 0, 1) * 255
    ybr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    palette = {
        f"{name}PaletteColorLookupTableData": bytes(range(256)) for name in ("Red", "Green", "Blue")
    } | {
        f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8] for name in ("Red", "Green", "Blue")
    }
    steps = np.arange(1000, 3560).reshape(40, 64).astype(np.uint16)
    narrow = np.clip((steps - 1999.5) / 9 + 0.5, 0, 1) * 255
    return {
        "8 bits": (dicom(grey), grey),
        "8 bits, dim": (dicom(grey // 2), grey // 2),
        "8 in 16 bits": (dicom(grey.astype(np.uint16) // 2, BitsStored=8), grey // 2),
        "12 in 16 bits": (dicom(twelve, BitsStored=12), stretched(twelve)),
        "16 bits": (dicom(grey.astype(np.uint16) * 257), grey),
        "signed": (dicom(twelve.astype(np.int16) - 2000), stretched(twelve)),
        "implicit": (dicom(twelve, syntax="1.2.840.10008.1.2"), stretched(twelve)),
        "big endian": (dicom(twelve, syntax="1.2.840.10008.1.2.2"), stretched(twelve)),
        "rescale": (rescaled, stretched(twelve)),
        "window": (dicom(twelve, **window), inside),
        "windows": (
            dicom(twelve, **{**window, "WindowCenter": [2048, 5], "WindowWidth": [1024, 9]}),
            inside,
        ),
        "narrow window": (
            dicom(steps, BitsStored=12, WindowCenter="2000", WindowWidth="10"),
            narrow,
        ),
        "exact window": (dicom(twelve, **window, VOILUTFunction="LINEAR_EXACT"), exactly),
        "sigmoid": (dicom(twelve, **window, VOILUTFunction="SIGMOID"), sigmoid),
        "window of width 1": (
            dicom(twelve, **{**window, "WindowWidth": "1"}),
            255 * (twelve > 2047),
        ),
        "empty window": (dicom(twelve, **{**window, "WindowCenter": ""}), stretched(twelve)),
        "rescale and window": (
            dicom(twelve, **window, RescaleSlope="2", RescaleIntercept="-1000"),
            hounsfield,
        ),
        "falling rescale and window": (
            dicom(
                twelve,
                **{**window, "WindowCenter": "-2047"},
                RescaleSlope="-1",
                RescaleIntercept="0",
            ),
            255 - inside,
        ),
        "voi lut of 12 bits": (
            dicom(twelve, BitsStored=12, VOILUTSequence=lut(4096, 0, 12, square[::-1])),
            255 - twelve * (255 / 4095),
        ),
        "voi lut of 8 bits": (
            dicom(twelve, BitsStored=12, VOILUTSequence=lut(4096, 0, 8, square // 16)),
            grey,
        ),
        "voi lut of 12 bits in 16": (
            dicom(twelve, BitsStored=12, VOILUTSequence=lut(4096, 0, 16, square[::-1])),
            255 - twelve * (255 / 4095),
        ),
        "voi lut of 16 bits": (
            dicom(twelve, BitsStored=12, VOILUTSequence=lut(4096, 0, 16, square * 7)),
            twelve * (255 * 7 / 65_535),
        ),
        "voi lut of part of the range": (
            dicom(twelve, BitsStored=12, VOILUTSequence=lut(1024, 1024, 10, square[:1024])),
            np.clip(twelve.astype(int) - 1024, 0, 1023) * (255 / 1023),
        ),
        "voi lut as words": (dicom(twelve, BitsStored=12, VOILUTSequence=words("<u2")), grey),
        "voi lut as big-endian words": (
            dicom(twelve, syntax=BIG, BitsStored=12, VOILUTSequence=words(">u2")),
            grey,
        ),
        "voi lut as bytes": (dicom(grey, VOILUTSequence=words("u1", 256)), grey),
        "voi lut beyond its bits": (
            dicom(grey, VOILUTSequence=lut(256, 0, 8, np.arange(256) * 3)),
            np.minimum(grey.astype(int) * 3, 255),
        ),
        "4 bits": (dicom(grey // 16, BitsStored=4), stretched(grey // 16)),
        "modality lut": (
            dicom(twelve, BitsStored=12, ModalityLUTSequence=lut(4096, 0, 16, square * 7)),
            stretched(twelve),
        ),
        "modality lut of 8 bits as words": (
            dicom(grey // 2, ModalityLUTSequence=words("<u2", 256)),
            stretched(grey // 2),
        ),
        "modality lut of 8 bits as bytes": (
            dicom(grey // 2, ModalityLUTSequence=words("u1", 256)),
            stretched(grey // 2),
        ),
        "multi-frame": (dicom(np.stack([grey, 255 - grey]), NumberOfFrames=2), grey),
        "enhanced": (
            dicom(
                np.stack([twelve, 4095 - twelve]),
                syntax="1.2.840.10008.1.2",
                NumberOfFrames=2,
                BitsStored=12,
                PerFrameFunctionalGroupsSequence=pydicom.Sequence(
                    [functional_groups(("2048", "1024")), functional_groups(("5", "9"))]
                ),
            ),
            inside,
        ),
        "enhanced, shared by all frames": (
            dicom(
                twelve,
                BitsStored=12,
                SharedFunctionalGroupsSequence=pydicom.Sequence(
                    [functional_groups(("-2047", "1024"), ("-1", "0"))]
                ),
            ),
            255 - inside,
        ),
        "enhanced, its groups blanked": (
            dicom(
                twelve,
                **window,
                SharedFunctionalGroupsSequence=pydicom.Sequence([functional_groups(("", ""))]),
            ),
            inside,
        ),
        "rgb": (dicom(rgb), luma(rgb)),
        "ybr": (dicom(ybr, PhotometricInterpretation="YBR_FULL"), luma(rgb)),
        "palette": (dicom(grey, PhotometricInterpretation="PALETTE COLOR", **palette), grey),
        "jpeg 2000": (compressed(J2K, encode(grey, "JPEG2000", no_jp2=True)), grey),
        "jpeg": (compressed(JPEG, encode(grey, "JPEG", quality=100)), grey),
        "extended jpeg": (compressed(EXTENDED, encode(grey, "JPEG", quality=100)), grey),
        "rle": (rle(grey), grey),
    }


def rle(pixels: np.ndarray) -> bytes:
    data = pydicom.dcmread(io.BytesIO(dicom(pixels)))
    data.compress(RLE)
    buffer = io.BytesIO()
    data.save_as(buffer)
    return buffer.getvalue()


def test_the_dicom_collection_has_more_than_twenty_kinds() -> None:
    assert len(dicom_files()) >= 20


@pytest.mark.parametrize("name", dicom_files())
@pytest.mark.filterwarnings("ignore::chestxray_covid.image.ImageWarning")
def test_dicom_of_every_kind_is_shown_as_the_standard_says(name: str, tmp_path: Path) -> None:
    data, expected = dicom_files()[name]
    result = loaded(data)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 1
    path = tmp_path / "no_suffix"
    path.write_bytes(data)
    assert np.array_equal(loaded(path), result)
    assert np.array_equal(loaded(io.BytesIO(data)), result)


@pytest.mark.parametrize("name", dicom_files())
@pytest.mark.filterwarnings("ignore::chestxray_covid.image.ImageWarning")
def test_monochrome1_is_the_exact_inverse_of_monochrome2(name: str) -> None:
    data, _ = dicom_files()[name]
    if b"MONOCHROME2" not in data:
        pytest.skip("colour")
    inverse = data.replace(b"MONOCHROME2", b"MONOCHROME1")
    assert np.array_equal(loaded(inverse), 255 - loaded(data))


def test_a_monochrome1_twin_looks_the_same() -> None:
    twin = dicom(4095 - twelve_bits(), BitsStored=12, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(loaded(twin), loaded(dicom(twelve_bits(), BitsStored=12)))


def disc(height: int, width: int) -> np.ndarray:
    """A disc that is round where the image is shown as a square, white on black."""
    y, x = (np.arange(side) + 0.5 for side in (height, width))
    away = (y[:, np.newaxis] / height - 0.5) ** 2 + (x / width - 0.5) ** 2
    return np.where(away < 0.3**2, 255, 0).astype(np.uint8)


def pixel_measures(spacing: list[str]) -> Any:
    measures, groups = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing = spacing
    groups.PixelMeasuresSequence = pydicom.Sequence([measures])
    return pydicom.Sequence([groups])


@pytest.mark.parametrize(
    "said",
    [
        lambda pair: {"PixelAspectRatio": pair},
        lambda pair: {"PixelSpacing": pair, "ImagerPixelSpacing": ["0.2", "0.2"]},
        lambda pair: {"ImagerPixelSpacing": pair, "PixelAspectRatio": [1, 1]},
        lambda pair: {"NominalScannedPixelSpacing": pair},
        lambda pair: {"PixelSpacing": ["0", "0"], "ImagerPixelSpacing": pair},
        lambda pair: {"SharedFunctionalGroupsSequence": pixel_measures(pair)},
    ],
)
def test_dicom_pixels_that_are_not_square_become_so(said: Callable[[list[str]], Any]) -> None:
    for size, pair in (((60, 180), ["3", "1"]), ((180, 60), ["1", "3"])):
        image, facts = read_image(dicom(disc(*size), **said(pair)))
        assert image.size == (180, 180)
        assert np.mean((np.asarray(image) > 127) == (disc(180, 180) > 127)) > 0.99
        assert (facts.height_px, facts.width_px) == size  # as stored


def test_a_model_sees_the_same_of_pixels_that_are_not_square() -> None:
    tall = np.asarray(Image.fromarray(ramp()).resize((400, 300)))
    found = Preprocess()(dicom(tall, PixelAspectRatio=[5, 4]))
    assert np.abs(found.astype(int) - Preprocess()(dicom(tall))).max() <= 2


@pytest.mark.parametrize(
    "said",
    ["0\\1", "1\\0", "-6\\-2", "-6\\2", "1000\\1", "1\\2000000000", "3", "3\\1\\1", "100\\101"],
)
def test_a_pixel_ratio_that_cannot_be_or_be_seen_changes_nothing(said: str) -> None:
    ratio = [int(value) for value in said.split("\\")]
    assert np.array_equal(loaded(dicom(ramp(), PixelAspectRatio=ratio)), ramp())


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        *(("PixelSpacing", said) for said in ("nan\\nan", "inf\\1.0", "1e308\\1e-308", "big\\low")),
        *(("PixelAspectRatio", said) for said in ("1:2", "1\\2.5", "one\\two")),
    ],
)
def test_a_pixel_size_that_is_no_number_changes_nothing(keyword: str, said: str) -> None:
    good = dicom(ramp(), **{keyword: ["1234567", "7654321"]})
    data = good.replace(b"1234567\\7654321", said.encode().ljust(15))
    assert data != good
    assert np.array_equal(loaded(data), ramp())


def test_square_pixels_are_no_more_than_may_be_decoded() -> None:
    data = dicom(ramp(), PixelAspectRatio=[10, 1])
    assert load_image(data, max_pixels=10 * ramp().size).height == 10 * len(ramp())
    with pytest.raises(ImageError, match=r"<bytes> with square pixels has or claims .* the limit"):
        load_image(data, max_pixels=10 * ramp().size - 1)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_presentation_lut_shape_changes_nothing(photometric: str) -> None:
    # PS3.3 C.8.11.3: INVERSE goes with MONOCHROME1, IDENTITY with MONOCHROME2.
    options = {"BitsStored": 12, "PhotometricInterpretation": photometric}
    plain = loaded(dicom(twelve_bits(), **options))
    for shape in ("IDENTITY", "INVERSE"):
        found = loaded(dicom(twelve_bits(), PresentationLUTShape=shape, **options))
        assert np.array_equal(found, plain)


@pytest.mark.parametrize(
    "name", ["window", "windows", "exact window", "sigmoid", "rescale and window"]
)
def test_windows_agree_with_pydicom(name: str) -> None:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    data = dicom_files()[name][0]
    parsed = pydicom.dcmread(io.BytesIO(data))
    shown = apply_voi_lut(apply_modality_lut(parsed.pixel_array, parsed), parsed)
    slope, intercept = (
        float(parsed.get("RescaleSlope", 1)),
        float(parsed.get("RescaleIntercept", 0)),
    )
    low, high = intercept, 4095 * slope + intercept
    assert np.abs(loaded(data) - 255 * (shown - low) / (high - low)).max() <= 1


def test_a_voi_lut_without_a_table_is_passed_over() -> None:
    window = {"BitsStored": 12, "WindowCenter": "2048", "WindowWidth": "1024"}
    blank = lut(4096, 0, 12, np.arange(4096))
    del blank[0].LUTData
    square = np.arange(4096) ** 2 // 4096
    both = pydicom.Sequence([blank[0], lut(4096, 0, 12, square)[0]])
    assert np.array_equal(
        loaded(dicom(twelve_bits(), VOILUTSequence=blank, **window)),
        loaded(dicom(twelve_bits(), **window)),
    )
    assert np.array_equal(
        loaded(dicom(twelve_bits(), VOILUTSequence=both, **window)),
        loaded(dicom(twelve_bits(), VOILUTSequence=lut(4096, 0, 12, square), **window)),
    )


@pytest.mark.parametrize(
    "window",
    [
        {"WindowWidth": "0"},
        {"WindowWidth": "0.5"},
        {"WindowWidth": "-10"},
        {"WindowWidth": "-10", "VOILUTFunction": "SIGMOID"},
        {"WindowWidth": "0", "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowWidth": ["0", "-3"], "WindowCenter": ["9", "9"]},
    ],
)
def test_an_impossible_window_is_passed_over(window: dict[str, Any]) -> None:
    data = dicom(twelve_bits(), **{"BitsStored": 12, "WindowCenter": "2048", **window})
    assert np.abs(loaded(data) - stretched(twelve_bits())).max() <= 1


def test_a_slope_of_zero_is_passed_over() -> None:
    window = {"BitsStored": 12, "WindowCenter": "2048", "WindowWidth": "1024"}
    flat = dicom(twelve_bits(), RescaleSlope="0", RescaleIntercept="0", **window)
    assert np.array_equal(loaded(flat), loaded(dicom(twelve_bits(), **window)))


def test_the_first_possible_window_is_taken() -> None:
    two = {"WindowCenter": ["9", "2048"], "WindowWidth": ["0", "1024"]}
    one = {"WindowCenter": "2048", "WindowWidth": "1024"}
    expected = loaded(dicom(twelve_bits(), BitsStored=12, **one))
    assert np.array_equal(loaded(dicom(twelve_bits(), BitsStored=12, **two)), expected)
    unknown = dicom(twelve_bits(), BitsStored=12, VOILUTFunction="CUBIC", **one)
    assert np.array_equal(loaded(unknown), expected)


@pytest.mark.parametrize("options", [{}, {"PixelPaddingRangeLimit": 60_000}])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_around_the_image_does_not_darken_it(
    options: dict[str, Any], photometric: str
) -> None:
    padded = twelve_bits()
    padded[:5] = 65_535
    padded[5, :10] = 60_001 if options else 65_535
    tags = {"PixelPaddingValue": 65_535, "PhotometricInterpretation": photometric, **options}
    found = loaded(dicom(padded, **tags))
    expected = stretched(twelve_bits()[6:])
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(found[6:] - expected).max() <= 1
    assert set(found[:5].ravel()) == {0 if photometric == "MONOCHROME1" else 255}


@pytest.mark.parametrize("options", [{}, {"PixelPaddingRangeLimit": -1900}])
def test_padding_of_signed_pixels_may_be_written_unsigned(options: dict[str, int]) -> None:
    padded = twelve_bits().astype(np.int16) - 1000
    padded[:5] = -2000
    data = dicom(padded, PixelPaddingValue=-2000, **options)
    expected = stretched(twelve_bits()[5:])
    assert np.abs(loaded(data)[5:] - expected).max() <= 1
    for end in (b"\x28\0\x20\1", b"\x28\0\x21\1"):
        data = data.replace(end + b"SS", end + b"US")
    assert np.abs(loaded(data)[5:] - expected).max() <= 1


@pytest.mark.filterwarnings("ignore:Invalid value")  # of pydicom
@pytest.mark.parametrize("entries", [4096, 32_767, 32_768, 40_000, 65_536])
def test_a_long_lookup_table_of_signed_pixels_is_read_whole(entries: int) -> None:
    sequence = lut(entries, -2048, 16, np.minimum(np.arange(entries), 4095))
    sequence[0]["LUTDescriptor"].VR = "SS"
    values = twelve_bits().astype(np.int16) - 2048
    data = dicom(values, syntax="1.2.840.10008.1.2", ModalityLUTSequence=sequence)
    assert np.abs(loaded(data) - stretched(twelve_bits())).max() <= 1


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN])
@pytest.mark.parametrize(
    ("stored", "intercept", "first"),
    [
        (0, -1024, -1024),  # unsigned, what comes of it signed
        (-2048, None, -2048),
        (-2048, -5000, -7048),
        (-2048, 40_000, 37_952),  # signed, what comes of it unsigned
        (0, 40_000, 40_000),
    ],
)
def test_the_first_value_of_a_voi_lut_is_signed_if_what_it_takes_can_be(
    syntax: str, stored: int, intercept: int | None, first: int
) -> None:
    values = twelve_bits().astype(int) + stored
    square = np.arange(4096) ** 2 // 4096
    sequence = lut(4096, first % 65_536, 12, square)
    rescale = {} if intercept is None else {"RescaleSlope": 1, "RescaleIntercept": intercept}
    pixels = values.astype(np.int16 if stored else np.uint16)
    data = dicom(pixels, syntax=syntax, BitsStored=12, **rescale, VOILUTSequence=sequence)
    assert np.abs(loaded(data) - square[twelve_bits()] * (255 / 4095)).max() <= 1


@pytest.mark.parametrize("first", [-2048, 63_488])
def test_the_first_value_of_a_modality_lut_is_signed_if_the_pixels_are(first: int) -> None:
    square = np.arange(4096) ** 2 // 4096
    sequence = lut(4096, first, 16, square * 16)
    sequence[0]["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    # Whose output is not signed, whatever the pixels are.
    voi = lut(20_000, 40_000, 16, np.arange(20_000) * 3)
    options = {"BitsStored": 12, "ModalityLUTSequence": sequence}
    values = twelve_bits().astype(np.int16) - 2048
    expected = square[twelve_bits()] * 16
    found = loaded(dicom(values, **options))
    assert np.abs(found - stretched(expected)).max() <= 1
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1"):
        found = loaded(dicom(values, syntax=syntax, **options, VOILUTSequence=voi))
        clipped = np.clip(expected - 40_000, 0, 19_999)
        assert np.abs(found - clipped * (3 * 255 / 65_535)).max() <= 1


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize("high_bit", [13, 15])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 500, "WindowWidth": 1200}])
def test_values_in_the_upper_bits_look_like_those_in_the_lower_ones(
    syntax: str, kind: type, high_bit: int, window: dict[str, int]
) -> None:
    values = (twelve_bits().astype(np.int64) - 2048 * (kind is np.int16)).astype(kind)
    options = {"syntax": syntax, "BitsStored": 12, **window}
    plain = loaded(dicom(values, **options))
    overlaid = (values << (high_bit - 11)) | kind(1)  # a bit below is not of the image
    assert np.array_equal(loaded(dicom(overlaid, HighBit=high_bit, **options)), plain)
    assert np.array_equal(loaded(dicom(values, HighBit=high_bit, **options)), plain)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
@pytest.mark.parametrize("high_bit", [13, 15])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 500, "WindowWidth": 1200}])
def test_values_in_the_upper_bits_look_the_same_where_they_are_compressed(
    kind: type, high_bit: int, window: dict[str, int]
) -> None:
    values = (twelve_bits().astype(np.int64) - 2048 * (kind is np.int16)).astype(kind)
    plain = loaded(dicom(values, BitsStored=12, **window))
    for stored in ((values << (high_bit - 11)) | kind(1), values):
        run_lengths = pydicom.dcmread(io.BytesIO(rle(stored))).PixelData
        wavelets = encode(stored.view(np.uint16), "JPEG2000", no_jp2=True)
        for syntax, frame in ((RLE, run_lengths), (J2K, pydicom.encaps.encapsulate([wavelets]))):
            options = {"BitsStored": 12, "HighBit": high_bit, "PixelData": frame, **window}
            assert np.array_equal(loaded(dicom(values, syntax=syntax, **options)), plain)


@pytest.mark.parametrize("options", [{}, {"WindowCenter": 500, "WindowWidth": 1200}])
@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_an_overlay_in_unused_bits_does_not_show_where_it_is_compressed(
    options: dict[str, int], kind: type
) -> None:
    values = (twelve_bits().astype(np.int64) - 2048 * (kind is np.int16)).astype(kind)
    drawn = (values.view(np.uint16) & 0xFFF) | np.where(ramp() % 2, np.uint16(0x4000), np.uint16(0))
    frame = pydicom.encaps.encapsulate([encode(drawn, "JPEG2000", no_jp2=True)])
    found = loaded(dicom(values, syntax=J2K, BitsStored=12, PixelData=frame, **options))
    assert np.array_equal(found, loaded(dicom(values, BitsStored=12, **options)))


def test_a_high_bit_beyond_what_is_allocated_is_passed_over() -> None:
    options = {"BitsStored": 12, "WindowCenter": 500, "WindowWidth": 1200}
    found = loaded(dicom(twelve_bits(), HighBit=16, **options))
    assert np.array_equal(found, loaded(dicom(twelve_bits(), **options)))


def test_several_frames_of_a_dicom_file_give_a_warning() -> None:
    with pytest.warns(ImageWarning, match="more than one frame"):
        load_image(dicom_files()["multi-frame"][0])


@pytest.mark.parametrize("name", ["<u2", ">u2", "u1", "f4", "rgb"])
def test_of_an_uncompressed_dicom_file_only_the_first_frame_is_read(
    name: str, tmp_path: Path
) -> None:
    first = ramp(41, 63)  # of an odd number of bytes, where a pixel has one
    frames = np.stack([first, *[255 - first] * 199])
    syntax = BIG_ENDIAN if name != "<u2" else "1.2.840.10008.1.2.1"
    if name == "f4":
        floats = frames.astype(">f4").tobytes()
        options = {"BitsAllocated": 32, "BitsStored": 32, "PixelData": None}
        data = dicom(frames, syntax=syntax, NumberOfFrames=200, **options, FloatPixelData=floats)
    elif name == "rgb":
        data = dicom(np.stack([frames] * 3, -1), syntax=syntax, NumberOfFrames=200)
    else:
        data = dicom(frames.astype(name.strip("<>")), syntax=syntax, NumberOfFrames=200)
    (tmp_path / "a.dcm").write_bytes(data)
    with pytest.warns(ImageWarning, match="more than one frame"):
        load_image(tmp_path / "a.dcm")  # what is imported now is not counted below
    tracemalloc.start()
    with pytest.warns(ImageWarning, match="more than one frame"):
        image = load_image(tmp_path / "a.dcm")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(np.asarray(image, int) - stretched(first)).max() <= 1
    assert peak < 200_000 < 200 * first.size


def test_padding_behind_the_pixels_does_no_harm() -> None:
    endless = b"\xfc\xff\xfc\xffSQ\0\0\xff\xff\xff\xff junk"  # tag of trailing padding
    for padding in (bytes(64), endless, b"\xff" * 7):
        assert np.array_equal(loaded(dicom(ramp()) + padding), ramp())


def test_a_float_dicom_with_nan_is_refused() -> None:
    pixels = ramp().astype(np.float32)
    options = {"BitsAllocated": 32, "BitsStored": 32, "PixelRepresentation": 0, "PixelData": None}
    good = dicom(ramp(), **options, FloatPixelData=(pixels * 5).tobytes())
    assert np.array_equal(loaded(good), ramp())
    pixels[0, 0] = math.nan
    with pytest.raises(ImageError, match="NaN"):
        load_image(dicom(ramp(), **options, FloatPixelData=pixels.tobytes()))


def without_syntax() -> bytes:
    data = dicom(ramp())
    uid = data.index(b"\x02\x00\x10\x00UI")
    length = 8 + struct.unpack("<H", data[uid + 6 : uid + 8])[0]
    return data[:uid] + data[uid + length :]


@cache
def sixteen_mebibytes_of_zeros() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)


@cache
def deflated_bomb() -> bytes:
    """A deflated DICOM file of 3 MB that expands to 3 GB."""
    head = dicom(None)
    where = head.index(b"\x02\x00\x10\x00UI") + 6
    head = head.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1)
    head = head[:where] + struct.pack("<H", 22) + head[where + 2 :]
    return head + sixteen_mebibytes_of_zeros() * 190


def jpeg_of_12_bits() -> bytes:
    frame = encode(ramp(), "JPEG").replace(b"\xff\xc0\0\x0b\x08", b"\xff\xc1\0\x0b\x0c")
    options = {"BitsStored": 12, "PixelData": pydicom.encaps.encapsulate([frame])}
    return dicom(twelve_bits(), syntax=EXTENDED, **options)


def jpeg_2000_bomb(side: int = 50_000) -> bytes:
    frame = bytearray(encode(ramp(), "JPEG2000", no_jp2=True))
    frame[8:16] = frame[24:32] = struct.pack(">II", side, side)
    return compressed(J2K, bytes(frame))


def test_what_looks_like_a_size_within_the_data_of_jpeg_2000_is_none() -> None:
    frame = encode(ramp(), "JPEG2000", no_jp2=True)
    after_size = 4 + int.from_bytes(frame[4:6], "big")
    # By chance such bytes are in one of some hundred images of 10 MB; here in a comment.
    text = b"\xff\x4f\xff\x51" + bytes(range(40, 80))
    comment = b"\xff\x64" + struct.pack(">HH", len(text) + 4, 0) + text
    data = compressed(J2K, frame[:after_size] + comment + frame[after_size:])
    assert np.array_equal(loaded(data), loaded(compressed(J2K, frame)))


def jpeg_bomb() -> bytes:
    return compressed(JPEG, header_bombs()["jpeg 65500"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dicom(None), "without an image .* DICOMDIR .* Pass one with an image"),
        (lambda: dicom(ramp(), PixelData=None), "without pixel data"),
        (lambda: dicom(ramp(), PixelData=b""), "without pixel data"),
        (lambda: dicom(ramp(), PixelData=ramp().tobytes()[:-200]), "cannot be read: ValueError"),
        (lambda: dicom(ramp())[:-300], "cannot be read: (ValueError|UserWarning)"),
        (lambda: dicom(ramp())[:200], "names no transfer syntax|without an image|cannot be read"),
        (lambda: bytes(128) + b"DICM", "names no transfer syntax"),
        (without_syntax, r"names no transfer syntax \(0002,0010\)"),
        (deflated_bomb, "deflated DICOM .* dcmconv"),
        (jpeg_2000_bomb, "first frame of <bytes> has or claims 50000x50000"),
        (jpeg_bomb, "first frame of <bytes> has or claims 65500x65500"),
        (lambda: compressed(JPEG, jpeg_of_scans(64, 99)), "JPEG of 105 scans"),
        (lambda: compressed(J2K, b"\xff\x4f\xff\x51 noise"), "cannot be read: RuntimeError"),
        (lambda: dicom(ramp(), Rows=50_000, Columns=50_000), "claims 50000x50000"),
        (lambda: dicom(ramp(), Rows=0), "64x0 pixels"),
        # pydicom's text would quote the bytes.
        (
            lambda: dicom(ramp()).replace(b"\x28\0\x10\0US\2", b"\x28\0\x10\0US\3"),
            r"cannot be read: BytesLengthException\. Fetch or export it again\.$",
        ),
        (
            lambda: dicom(ramp()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"),
            "cannot be read: ValueError: UID is not a transfer syntax",
        ),
        (lambda: compressed(MPEG2, b"film"), "encoded as MPEG2 .* Export it otherwise"),
        (lambda: compressed(PROGRESSIVE, b"\xff\xd8"), "JPEG Full Progression.* dcmdjpeg in.dcm"),
        (lambda: dicom(ramp(), BitsAllocated=7), "cannot be read: ValueError"),
        (lambda: dicom(ramp(), PhotometricInterpretation=None), "cannot be read: AttributeError"),
        (
            lambda: dicom(ramp(), RescaleSlope="987", RescaleIntercept="0").replace(b"987", b"nan"),
            "cannot be read: (ValueError: RescaleSlope is nan|UserWarning)",
        ),
        (
            lambda: dicom(ramp(), VOILUTSequence=lut(300, 0, 12, np.arange(100))),
            "a lookup table of 300 entries holds 100",
        ),
        # No decoder for lossless JPEG or JPEG-LS comes with the extra.
        (lambda: compressed("1.2.840.10008.1.2.4.70", b"\xff\xd8"), "pip install .*dicom.*gdcm"),
        (lambda: compressed("1.2.840.10008.1.2.4.80", b"\xff\xd8"), "JPEG-LS"),
        (jpeg_of_12_bits, "JPEG Extended .* JPEG of 12 bits: pip install pylibjpeg-libjpeg"),
    ],
)
def test_dicom_that_cannot_be_shown_is_refused_without_naming_the_patient(
    make: Any, message: str
) -> None:
    data = make()
    start = time.thread_time()
    with pytest.raises(ImageError, match=message) as caught:
        load_image(data)
    assert time.thread_time() - start < 1
    assert "Secret" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:End of file")  # of pydicom
@pytest.mark.parametrize("name", ["jpeg", "jpeg 2000", "rle"])
def test_compressed_pixels_that_are_cut_off_are_said_to_be(name: str) -> None:
    with pytest.raises(ImageError, match="cut off within them"):
        load_image(dicom_files()[name][0][:-300])


def test_the_deflated_bomb_is_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "bomb.dcm"
    path.write_bytes(deflated_bomb())
    assert pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID.is_deflated
    block = zlib.decompressobj(-zlib.MAX_WBITS).decompress(sixteen_mebibytes_of_zeros())
    assert 3e6 < path.stat().st_size < 3.5e6
    assert 190 * len(block) > 3e9


def test_a_second_transfer_syntax_does_not_smuggle_a_deflated_file_in() -> None:
    data = deflated_bomb()
    uid = data.index(b"\x02\x00\x10\x00UI")
    plain = b"\x02\x00\x10\x00UI" + struct.pack("<H", 20) + b"1.2.840.10008.1.2.1\0"
    for forged in (data[:uid] + plain + data[uid:], data[: uid + 30] + plain + data[uid + 30 :]):
        with pytest.raises(ImageError):
            load_image(forged)


def test_a_file_named_dicom_that_is_none_is_never_forced(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(dicom(ramp())[132:])
    with pytest.raises(ImageError, match=r'no "DICM" at byte 128\..* dcmconv in\.dcm out\.dcm'):
        load_image(path)
    path.write_bytes(encode(ramp(), "PNG"))
    assert np.array_equal(loaded(path), ramp())


@pytest.mark.filterwarnings("ignore")
def test_damaged_dicom_files_are_shown_or_refused_and_none_hangs() -> None:
    files = [data for data, _ in dicom_files().values()]
    slowest = 0.0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        data = damaged(KINDS[seed % 7], files[seed % len(files)], rng)
        start = time.thread_time()
        assert "Secret" not in (refusal(data) or "")
        slowest = max(slowest, time.thread_time() - start)
    assert slowest < 2


def test_without_pydicom_the_error_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "pydicom.py").write_text("raise ImportError('not installed')\n")
    (tmp_path / "x.dcm").write_bytes(dicom(ramp()))
    code = "from chestxray_covid import errors, image\ntry:\n  image.load_image('x.dcm')\n"
    code += "except errors.MissingExtraError as error:\n  raise SystemExit(str(error))"
    source = Path(chestxray_covid.__file__).parents[1]
    path = os.pathsep.join([str(tmp_path), str(source)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert 'pip install "chestxray-covid[dicom]"' in done.stderr
    assert issubclass(MissingExtraError, ImportError)


# ---------------------------------------------------------------- what the machine lacks


def test_too_many_open_files_are_not_the_images_fault(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(colours(9, 9), "PNG"))
    with no_more_files(), pytest.raises(ResourceError, match=r"x\.png: the machine, .*open files"):
        load_image(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").size == (9, 9)


LIMITED = """
import sys
import numpy as np, pydicom.pixels, resource
from chestxray_covid.datasets.loading import map_ahead
from chestxray_covid.errors import ResourceError
from chestxray_covid.image import load_image

held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 6_000_000,) * 2)
for path in sys.argv[1:]:
    try:
        load_image(path)
    except ResourceError as error:
        assert "x." in str(error) and "fetch" not in str(error).lower(), error
    else:
        raise SystemExit("there was memory")
try:
    list(map_ahead(abs, [1], workers=1))
except ResourceError as error:
    assert "start new thread" in str(error), error
else:
    raise SystemExit("there was a thread")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs to know how much memory is held")
def test_no_memory_and_no_threads_are_not_the_images_fault(tmp_path: Path) -> None:
    whole = Image.new("L", (6000, 6000))
    names = [str(tmp_path / f"x.{suffix}") for suffix in ("png", "jpg", "tif", "bmp", "gif")]
    for name in names:
        whole.save(name)
    (tmp_path / "x.dcm").write_bytes(dicom(np.zeros((6000, 6000), np.uint16)))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *names, str(tmp_path / "x.dcm")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


DAMAGED = """
import sys
import pydicom.pixels, resource
from chestxray_covid.errors import ImageError
from chestxray_covid.image import load_image

held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30),) * 2)
try:
    load_image(sys.argv[1])
except ImageError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs to know how much memory is held")
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_a_damaged_length_is_the_files_fault_whatever_memory_there_is(
    tmp_path: Path, syntax: str
) -> None:
    """It would end a run over many files, and every one that goes on with it."""
    whole = dicom(ramp(), syntax=syntax)
    at = whole.index(b"\x28\0\x10\0")  # Rows
    damaged = whole[:at] + b"\x28\0\x09\0" + b"OB\0\0" * (syntax[-2:] == ".1") + b"\xfe" * 4
    (tmp_path / "x.dcm").write_bytes(damaged + whole[at:])
    command = [sys.executable, "-c", DAMAGED, str(tmp_path / "x.dcm")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "x.dcm is a DICOM file without an image (no Rows and Columns)" in done.stdout


# ---------------------------------------------------------------- Preprocess


def test_preprocess_gives_one_grey_plane_of_the_models_size() -> None:
    pixels = Preprocess(size_px=48)(encode(colours(300, 500), "PNG"))
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((1, 48, 48), np.uint8, True)
    pixels[:] = 0  # its own memory


def test_the_whole_image_is_squashed_by_area() -> None:
    # Ten equal bands become ten equal bands, in both directions.
    bands = np.repeat(np.arange(10) * 25, 64).astype(np.uint8)
    wide = np.tile(bands, (960, 1))
    result = Preprocess(size_px=40)(wide)[0]
    assert np.array_equal(result[20, 1::4], np.arange(10) * 25) or (
        np.abs(result[20, 1::4].astype(int) - np.arange(10) * 25).max() <= 3
    )
    assert np.array_equal(Preprocess(size_px=40)(wide.T)[0], result.T)


def test_the_resized_image_agrees_with_an_independent_antialiasing_filter() -> None:
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).resize((1000, 800))
    )
    tensor = torch.tensor(smooth)[None, None].float()
    expected = torch.nn.functional.interpolate(
        tensor, (224, 224), mode="bilinear", antialias=True, align_corners=False
    )
    difference = np.abs(Preprocess()(smooth)[0] - expected.numpy()[0, 0])
    assert difference.mean() < 1
    assert difference.max() <= 6  # `reducing_gap` averages blocks first


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_box_gives_the_same_as_cropping_first(kind: str) -> None:
    data = encode(ramp(800, 1200), kind)
    cropped = load_image(data).crop((300, 80, 900, 720))
    result = Preprocess(size_px=64)(data, box=(0.25, 0.1, 0.75, 0.9))
    difference = result.astype(int) - Preprocess(size_px=64)(cropped)
    assert np.abs(difference).max() <= 2


def test_a_small_box_makes_a_jpeg_be_decoded_larger() -> None:
    assert Preprocess(size_px=64).decode_size() == (128, 128)
    assert Preprocess(size_px=64).decode_size((0.0, 0.0, 0.5, 0.25)) == (256, 512)


def test_decoding_ahead_at_the_decode_size_changes_nothing() -> None:
    preprocess = Preprocess(size_px=64)
    data = encode(ramp(2000, 3000), "JPEG")
    ahead = load_image(data, min_size=preprocess.decode_size())
    assert ahead.size == (375, 250)
    assert np.array_equal(preprocess(ahead), preprocess(data))


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0, 0.5, 1),
        (0.6, 0, 0.5, 1),
        (-0.1, 0, 1, 1),
        (0, 0, 1, 1.1),
        (0, 0, 640, 480),
        (0, 0.2, 1, 0.205),
        (math.nan, 0, 1, 1),
        (0, 0, math.inf, 1),
        (0, 0, 1),
        "abcd",
        3,
    ],
)
def test_an_impossible_box_is_a_value_error(box: Any) -> None:
    with pytest.raises(ValueError, match="box must be"):
        Preprocess()(ramp(), box=box)


def test_images_of_extreme_aspect_ratio_are_squashed_too() -> None:
    for shape in [(1, 1), (1, 65_535), (65_535, 1), (2, 3)]:
        assert Preprocess(size_px=32)(np.full(shape, 9, np.uint8)).tolist() == [[[9] * 32] * 32]


def test_a_side_of_millions_of_pixels_is_refused() -> None:
    for source in (np.zeros((65_536, 1), np.uint8), png_claiming(60_000_000, 1)):
        with pytest.raises(ImageError, match="expected sides of at most 65535"):
            load_image(source)


def test_preprocess_defaults_are_the_mean_of_imagenets_channels() -> None:
    assert Preprocess().mean == pytest.approx(np.mean([0.485, 0.456, 0.406]), abs=1e-9)
    assert Preprocess().std == pytest.approx(np.mean([0.229, 0.224, 0.225]), abs=1e-9)


def test_preprocess_survives_json_and_pickling() -> None:
    preprocess = Preprocess(size_px=320, mean=0.5, std=0.25)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert pickle.loads(pickle.dumps(preprocess)) == preprocess  # noqa: S301 - its own bytes
    assert hash(preprocess) == hash(Preprocess(size_px=320, mean=0.5, std=0.25))


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        *(("size_px", v, ValueError, "size_px must be in 32 to 2048") for v in (0, -1, 31, 2049)),
        *(("size_px", v, TypeError, "size_px must be a whole") for v in (True, 224.0, "224", None)),
        *(("mean", v, ValueError, "mean must be a fraction") for v in (-0.1, 114.5, math.nan)),
        *(("mean", v, TypeError, "mean must be a number") for v in (True, "0.5", None, [0.4])),
        *(
            ("std", v, ValueError, "std must be a fraction")
            for v in (0, -1, 57.6, math.nan, math.inf)
        ),
        *(("std", v, TypeError, "std must be a number") for v in (True, "0.2", None)),
        *(("resize", v, ValueError, 'resize must be "squash"') for v in ("crop", None, 3)),
    ],
)
def test_impossible_preprocessing_is_refused_on_construction_and_in_a_config(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Preprocess(**{field: value})
    with pytest.raises(ConfigError, match=f"preprocess is impossible: .*{message}"):
        Preprocess.from_dict({**Preprocess().to_dict(), field: value})


@pytest.mark.parametrize(
    ("data", "got"),
    [
        ({}, r"got \[\]"),
        ({"size_px": 224}, "got .'size_px'.$"),
        ({**Preprocess().to_dict(), "crop": 1}, "crop"),
        ({**Preprocess().to_dict(), 3: 1}, "'3'"),
        ([224], "got list"),
        (None, "got NoneType"),
    ],
)
def test_a_config_with_other_fields_is_refused(data: Any, got: str) -> None:
    with pytest.raises(ConfigError, match=f"exactly the fields .*{got}"):
        Preprocess.from_dict(data)


def test_threads_get_the_same_pixels_as_one() -> None:
    sources = [
        encode(ramp(200, 300 + i), kind) for i, kind in enumerate(("JPEG", "PNG", "TIFF") * 8)
    ]
    preprocess = Preprocess(size_px=64)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(preprocess, sources))
    for source, result in zip(sources, results, strict=True):
        assert np.array_equal(result, preprocess(source))


# ---------------------------------------------------------------- real radiographs


@pytest.mark.real_data
@pytest.mark.slow
def test_every_real_radiograph_decodes(real_data: Path) -> None:
    folders = {
        "chest_xray": 5216,
        "covid-chestxray-dataset/images": 646,
        "covid-19-image-repository": 243,
        "nih-subset": 426,
    }
    kinds = {".png", ".jpg", ".jpeg"}
    preprocess = Preprocess(size_px=64)
    with ThreadPoolExecutor(2) as pool:
        for folder, count in folders.items():
            paths = [p for p in (real_data / folder).rglob("*") if p.suffix.lower() in kinds]
            assert len(paths) == count
            flat = [
                p for p, x in zip(paths, pool.map(preprocess, paths), strict=True) if x.std() < 5
            ]
            assert flat == []  # none comes out black, white or clipped to one level


@pytest.mark.real_data
def test_reduced_decoding_of_real_originals_stays_close_to_full_decoding(real_data: Path) -> None:
    names = (real_data / "originals.txt").read_text().splitlines()[::8]
    preprocess = Preprocess()
    for name in names:
        full = (
            Image.open(real_data / name).convert("L").resize((224, 224), Image.Resampling.BILINEAR)
        )
        difference = np.abs(preprocess(real_data / name)[0].astype(int) - np.asarray(full))
        assert difference.mean() < 1.5, name


# ---------------------------------------------------------------- facts


def arrowed(size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Return a grey picture with a red tenth."""
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(60, 200, (6, 8)).astype(np.uint8)).resize(size)
    image = grey.convert("RGB")
    image.paste((255, 30, 30), (0, 0, size[0] // 5, size[1] // 2))
    return image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "source",
    [
        arrowed(),
        np.asarray(arrowed()),
        np.asarray(arrowed().convert("RGBA")).transpose(2, 0, 1),
        encoded(arrowed(), "PNG"),
        encoded(arrowed().quantize(32), "PNG"),
        encoded(arrowed().convert("RGBA"), "WEBP", lossless=True),
        encoded(arrowed(), "JPEG"),
        encoded(arrowed(), "JPEG", subsampling=0, progressive=True),
        encoded(arrowed().convert("CMYK"), "JPEG"),
    ],
    ids=["pil", "array", "rgba", "png", "palette", "webp", "jpeg", "progressive", "cmyk"],
)
def test_colour_and_size_are_told_whatever_the_form(source: Any) -> None:
    image, facts = read_image(source, min_size=(100, 75))
    assert (facts.width_px, facts.height_px) == (400, 300)
    assert facts.colour == pytest.approx(0.1, abs=0.01)
    assert image.mode == "L"
    assert image.tobytes() == load_image(source, min_size=(100, 75)).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_equal_channels_are_no_colour(kind: str, mode: str) -> None:
    grey = arrowed().convert("L").convert(mode)
    assert read_image(encoded(grey, kind))[1].colour == 0


def ycbcr(planes: np.ndarray) -> Image.Image:
    return Image.merge("YCbCr", [Image.fromarray(planes[..., band]) for band in range(3)])


def test_chroma_near_its_middle_never_makes_a_coloured_pixel() -> None:
    near = np.arange(128 - _GREY_CHROMA, 129 + _GREY_CHROMA)
    every = np.stack(np.meshgrid(np.arange(256), near, near), -1).astype(np.uint8)
    rgb = np.asarray(ycbcr(every.reshape(256, -1, 3)).convert("RGB"), np.int64)
    assert (rgb.max(-1) - rgb.min(-1)).max() <= COLOURED_CHANNELS


@pytest.mark.parametrize("chroma", [128, 140, 141, 150, 200])
def test_the_colour_of_a_jpeg_is_that_of_its_pixels(chroma: int) -> None:
    planes = np.full((64, 64, 3), 128, np.uint8)
    planes[:16, :, 1:] = chroma
    data = encode(ycbcr(planes), "JPEG", quality=95, subsampling=0)
    rgb = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int64)
    share = ((rgb.max(-1) - rgb.min(-1)) > COLOURED_CHANNELS).mean()
    assert read_image(data)[1].colour == share


def test_a_tint_is_no_colour_but_a_tenth_of_red_is() -> None:
    levels = np.full((50, 50, 3), 100, np.uint8)
    levels[..., 0] += 40
    assert read_image(levels)[1].colour == 0
    levels[:5, :, 0] += 1
    assert read_image(levels)[1].colour == pytest.approx(0.1)


def test_colour_that_nobody_sees_is_no_colour() -> None:
    levels = np.full((50, 50, 4), 100, np.uint8)
    levels[..., 3] = 255
    levels[:20, :, 0] = 255
    assert read_image(levels)[1].colour == pytest.approx(0.4)
    levels[:10, :, 3] = 0
    assert read_image(levels)[1].colour == pytest.approx(0.2)


def test_a_jpeg_stored_as_rgb_is_read_as_before_and_its_colour_told() -> None:
    data = encoded(arrowed(), "JPEG", keep_rgb=True, quality=95)
    image, facts = read_image(data)
    assert np.abs(np.asarray(image, int) - np.asarray(arrowed().convert("L"), int)).mean() < 2
    assert facts.colour == pytest.approx(0.1, abs=0.01)
    small, facts = read_image(data, min_size=(100, 75))
    assert small.size == (100, 75)
    assert facts.colour == pytest.approx(0.1, abs=0.01)


def test_a_jpeg_without_any_marker_is_told_by_its_components() -> None:
    data = encoded(arrowed(), "JPEG")
    assert data[2:4] == b"\xff\xe0"  # JFIF's segment, as it comes first
    bare = data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]
    assert read_image(bare)[1].colour == pytest.approx(0.1, abs=0.01)
    assert load_image(bare).tobytes() == load_image(data).tobytes()


def test_luma_of_a_colour_jpeg_is_that_of_decoding_it_to_grey() -> None:
    data = encoded(arrowed(), "JPEG")
    for min_size in (None, (100, 75)):
        plain = Image.open(io.BytesIO(data))
        plain.draft("L", min_size)
        assert load_image(data, min_size=min_size).tobytes() == plain.tobytes()


def test_width_and_height_are_those_of_the_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(arrowed(), "JPEG", exif=exif)
    assert read_image(data, min_size=(75, 100))[0].size == (75, 100)
    facts = read_image(data, min_size=(75, 100))[1]
    assert (facts.width_px, facts.height_px) == (300, 400)


def test_preprocessing_hands_the_facts_on_beside_the_same_pixels() -> None:
    preprocess = Preprocess(size_px=32)
    pixels, facts = preprocess.read(arrowed())
    assert np.array_equal(pixels, preprocess(arrowed()))
    assert (facts.width_px, facts.height_px) == (400, 300)
