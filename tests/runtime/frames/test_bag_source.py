"""Bags and the image encodings in them, written with rosbags."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.errors import SourceError
from runtime.frames import SourceOptions, open_source
from runtime.frames.ros_image import image_from_compressed_message, image_from_message

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def jpeg_of(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_ros2_bag_and_its_bare_file(
    storage: str, write_bag: Callable[..., Path], make_message: Callable[..., object]
) -> None:
    path = write_bag(
        [("/camera", 5 + n, make_message(RGB + n, stamp_ns=10**18 + n)) for n in range(3)], storage
    )
    (bare,) = [file for file in path.iterdir() if file.suffix in (".mcap", ".db3")]
    for spec in (path, bare):
        with open_source(str(spec)) as source:
            frames = list(source)
        assert [frame.timestamp_ns for frame in frames] == [10**18 + n for n in range(3)]
        np.testing.assert_array_equal(frames[2].image, RGB + 2)
        assert frames[0].source == f"{spec}:/camera"


def test_ros1_bag(tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    from rosbags.rosbag1 import Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC)
    types = store.types
    header = types["std_msgs/msg/Header"](
        seq=0, stamp=types["builtin_interfaces/msg/Time"](sec=9, nanosec=1), frame_id="c"
    )
    message = types["sensor_msgs/msg/Image"](header, 4, 6, "bgr8", 0, 18, RGB[..., ::-1].ravel())
    path = tmp_path / "log.bag"
    with Writer(path) as writer:
        connection = writer.add_connection("/camera", "sensor_msgs/msg/Image", typestore=store)
        writer.write(connection, 123, store.serialize_ros1(message, "sensor_msgs/msg/Image"))
    (frame,) = open_source(str(path))
    np.testing.assert_array_equal(frame.image, RGB)
    assert frame.timestamp_ns == 9_000_000_001


def test_topics_are_chosen_by_name_or_type(
    write_bag: Callable[..., Path], make_message: Callable[..., object]
) -> None:
    path = write_bag(
        [
            ("/left", 1, make_message(RGB)),
            ("/right", 2, make_message(RGB)),
            ("/front", 3, make_message(jpeg_of(80), "jpeg")),
        ]
    )
    with pytest.raises(SourceError, match=r"has 3 image topics, expected one.*/left.*/right"):
        open_source(str(path))
    with pytest.raises(SourceError, match=r"has no image topic '/rear'"):
        open_source(str(path), SourceOptions(topic="/rear"))
    with pytest.raises(SourceError, match=r"has 2 image topics of type sensor_msgs/Image"):
        open_source(str(path), SourceOptions(topic="sensor_msgs/Image"))
    assert len(list(open_source(str(path), SourceOptions(topic="/right")))) == 1
    (frame,) = open_source(str(path), SourceOptions(topic="sensor_msgs/msg/CompressedImage"))
    assert frame.timestamp_ns == 3  # no header stamp: the time it was recorded
    assert float(frame.image.mean()) == pytest.approx(80, abs=2)


def test_a_bad_message_is_counted(
    write_bag: Callable[..., Path], make_message: Callable[..., object]
) -> None:
    path = write_bag(
        [
            ("/c", 1, make_message(RGB, "16SC7")),
            ("/c", 2, make_message(RGB)),
            ("/c", 3, make_message(RGB, step=900)),
        ]
    )
    with open_source(str(path)) as source:
        assert len(list(source)) == 1
        assert source.errors.counts == {"undecodable": 2}


def test_a_damaged_bag_is_refused_with_the_way_to_mend_it(tmp_path: Path) -> None:
    pytest.importorskip("rosbags")
    path = tmp_path / "log.mcap"
    path.write_bytes(b"\x89MCAP0\r\n" + b"\x00" * 50)
    with pytest.raises(SourceError, match=r"log\.mcap cannot be opened as a bag.*mcap recover"):
        open_source(str(path))


def test_a_bag_damaged_in_its_middle_gives_what_is_whole(
    write_bag: Callable[..., Path], make_message: Callable[..., object]
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    path = write_bag([("/c", n, make_message(noise)) for n in range(8)])
    (bare,) = path.glob("*.mcap")
    data = bytearray(bare.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2_000_000] = b"\xff" * 2_000_000
    bare.write_bytes(data)
    with open_source(str(path)) as source:
        assert len(list(source)) < 8
        assert source.errors.counts


@pytest.mark.parametrize(
    ("encoding", "data", "expected"),
    [
        ("rgb8", RGB, RGB),
        ("bgr8", RGB[..., ::-1], RGB),
        ("8UC3", RGB[..., ::-1], RGB),
        ("rgba8", np.dstack([RGB, RGB[..., 0]]), RGB),
        ("bgra8", np.dstack([RGB[..., ::-1], RGB[..., 0]]), RGB),
        ("mono8", RGB[..., 0], np.repeat(RGB[..., :1], 3, axis=2)),
        ("mono16", RGB[..., 0].astype("<u2") * 256 + 9, np.repeat(RGB[..., :1], 3, axis=2)),
    ],
)
def test_encodings_without_colour_conversion(
    encoding: str, data: np.ndarray, expected: np.ndarray, make_message: Callable[..., object]
) -> None:
    np.testing.assert_array_equal(image_from_message(make_message(data, encoding)), expected)


def test_rows_may_be_padded_and_16_bit_greys_big_endian(
    make_message: Callable[..., object],
) -> None:
    padded = np.zeros((4, 24), np.uint8)
    padded[:, :18] = RGB.reshape(4, 18)
    image = image_from_message(make_message(padded, "rgb8", width=6))
    np.testing.assert_array_equal(image, RGB)
    big = RGB[..., 0].astype(">u2") * 256
    image = image_from_message(make_message(big.astype(">u2"), "mono16", is_bigendian=1))
    np.testing.assert_array_equal(image[..., 1], RGB[..., 0])


@pytest.mark.parametrize(
    ("encoding", "order"), [("yuv422", (1, 0)), ("uyvy", (1, 0)), ("yuv422_yuy2", (0, 1))]
)
def test_yuv_422(
    encoding: str, order: tuple[int, int], make_message: Callable[..., object]
) -> None:
    pytest.importorskip("av")
    # BT.601, limited range, of red (200, 40, 40): Y 88, Cb 103, Cr 188 by the standard's equations.
    pixels = np.zeros((8, 8, 2), np.uint8)
    pixels[..., order[0]] = 88
    pixels[:, 0::2, order[1]] = 103
    pixels[:, 1::2, order[1]] = 188
    image = image_from_message(make_message(pixels, encoding))
    expected = _rgb_from_bt601(88, 103, 188)
    assert image.reshape(-1, 3).mean(axis=0) == pytest.approx(expected, abs=3)


def _rgb_from_bt601(y: float, cb: float, cr: float) -> list[float]:
    luma = 1.164383 * (y - 16)
    return [
        luma + 1.596027 * (cr - 128),
        luma - 0.391762 * (cb - 128) - 0.812968 * (cr - 128),
        luma + 2.017232 * (cb - 128),
    ]


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns(pattern: str, make_message: Callable[..., object]) -> None:
    pytest.importorskip("av")
    levels = {"r": 200, "g": 100, "b": 30}
    mosaic = np.zeros((16, 16), np.uint8)
    for place, letter in enumerate(pattern):
        mosaic[place // 2 :: 2, place % 2 :: 2] = levels[letter]
    image = image_from_message(make_message(mosaic, f"bayer_{pattern}8"))
    assert image[4:12, 4:12].reshape(-1, 3).mean(axis=0) == pytest.approx([200, 100, 30], abs=4)


def test_messages_that_lie_are_refused(make_message: Callable[..., object]) -> None:
    with pytest.raises(SourceError, match=r"encoding 'jpeg2000', which is not one of 8uc1"):
        image_from_message(make_message(RGB, "jpeg2000"))
    with pytest.raises(SourceError, match=r"says 600x4 rgb8 with 18 bytes a row"):
        image_from_message(make_message(RGB, width=600))
    with pytest.raises(SourceError, match="depth, not a picture"):
        image_from_compressed_message(make_message(b"xx", "16UC1; compressedDepth png"))
