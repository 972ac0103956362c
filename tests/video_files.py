# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Real H.264 files for tests, good and broken, made with PyAV in a temporary folder.

Every frame shows its own number as eight black and white blocks, so a test can tell which frame it was given.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image


WIDTH, HEIGHT = 64, 48
BLOCK = WIDTH // 8  # one bit of the frame number, lowest first
TICKS = 1000  # of the clock in which times are written, per second


def numbered_frames(count: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """`(count, height, width, 3)` uint8: the frame's number in the top third, a colour gradient below it."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)
    frames = np.repeat(picture[None], count, axis=0)
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1  # (count, 8)
    frames[:, : height // 3] = np.repeat(bits * 255, width // 8, axis=1)[:, None, :, None]
    return frames


def frame_numbers(frames: torch.Tensor) -> list[int]:
    """Which frames these are; `frames` is `(T, 3, H, W)` uint8 as decoded."""
    height, width = frames.shape[-2:]
    columns = (np.arange(8) * 2 + 1) * width // 16
    bits = frames[:, 0, height // 6, columns] > 127  # (T, 8)
    return (bits.long() << torch.arange(8)).sum(1).tolist()


def write_video(
    path: str | Path,
    count: int = 40,
    rate: int | Fraction = 10,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    gop: int = 12,
    b_frames: int = 2,
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    codec: str = "libx264",
    container_options: dict[str, str] | None = None,
    container_format: str | None = None,
) -> str:
    """Write numbered frames as H.264.

    Args:
        path: Where to, or an object to write to.
        count: Number of frames (as many as `times`, if those are given).
        rate: Frames per second.
        times: Seconds at which the frames appear, where that is not regular (or does not begin at 0).
        size: Width and height.
        gop: Frames from one key frame to the next.
        b_frames: Frames that are stored after later ones they are predicted from.
        pix_fmt: FFmpeg's pixel format.
        rotation: Degrees counterclockwise by which a player turns the picture.
        codec: FFmpeg's encoder.
        container_options, container_format: For the muxer.

    Returns:
        The path as a string.
    """
    clock = Fraction(1, TICKS) if times is not None else 1 / Fraction(rate)
    count = count if times is None else len(times)
    target = str(path) if isinstance(path, str | Path) else path
    with av.open(target, "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.options = {"g": str(gop), "bf": str(b_frames)}
        if codec == "libx264":
            stream.options |= {"preset": "ultrafast", "sc_threshold": "0", "crf": "18"}
        stream.codec_context.time_base = clock
        if rotation:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(numbered_frames(count, *size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i if times is None else round(times[i] * TICKS)
            frame.time_base = clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return target


class Pipe:
    """Something to write to that cannot go back, so that no header can be completed afterwards."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, piece: bytes) -> int:
        self.content += piece
        return len(piece)


def write_live(path: Path, count: int = 40) -> str:
    """Matroska as a live stream has it: no duration, no number of frames, no index."""
    pipe = Pipe()
    write_video(pipe, count, container_format="matroska")
    path.write_bytes(pipe.content)
    return str(path)


def write_two_streams(path: Path) -> str:
    """A small and poor stream of 20 frames, then a large and good one of 30, which a player takes by default."""
    with av.open(str(path), "w") as container:
        streams = []
        for size, quality in (((WIDTH, HEIGHT), "51"), ((2 * WIDTH, 2 * HEIGHT), "10")):
            stream = container.add_stream("libx264", rate=10, options={"crf": quality})
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            streams.append(stream)
        streams[1].disposition = Disposition.default
        for stream, count in zip(streams, (20, 30), strict=True):
            for i, pixels in enumerate(numbered_frames(count, stream.width, stream.height)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return str(path)


def write_audio(path: Path) -> str:
    """Sound without a picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        samples = np.sin(np.arange(16000) / 10, dtype=np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def write_header_only(path: Path) -> str:
    """A valid MP4 header which announces a video stream, and nothing after it."""
    write_video(path, container_options={"movflags": "empty_moov+frag_keyframe"})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moof") - 4])
    return str(path)


def write_cut_off(path: Path, share: float, index_in_front: bool, **options) -> str:
    """The first `share` of a file's bytes; with the index (moov) in front of the pictures, or lost with the end."""
    write_video(path, container_options={"movflags": "faststart"} if index_in_front else None, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return str(path)


def write_damaged(path: Path, bad_frames: Sequence[int], **options) -> str:
    """Overwrite the packets of some frames (by number; no B-frames, so that order of storing is order of showing)."""
    write_video(path, b_frames=0, **options)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for number in bad_frames:
        position, size = packets[number]
        content[position : position + size] = b"\xff" * size
    path.write_bytes(content)
    return str(path)


def write_trimmed(path: Path, source: str, start: float) -> str:
    """Cut the beginning off without encoding again: an edit list hides the frames before `start` seconds."""
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        shift = round(start / old.streams.video[0].time_base)
        for packet in old.demux(video=0):
            if packet.dts is None:
                continue
            packet.pts -= shift
            packet.dts -= shift
            packet.stream = stream
            new.mux(packet)
    return str(path)


def write_pictures(path: Path, count: int = 200) -> str:
    """PNG pictures one after the other, which FFmpeg plays at 25 frames per second and cannot seek in."""
    with open(path, "wb") as file:
        for pixels in numbered_frames(count):
            Image.fromarray(pixels).save(file, "PNG")
    return str(path)


def write_size_change(path: Path) -> str:
    """An MPEG transport stream of 20 small and then 20 large frames, as a broadcast may send it."""
    parts = []
    for i, size in enumerate(((WIDTH, HEIGHT), (2 * WIDTH, 2 * HEIGHT))):
        write_video(path, times=[2 * i + k / 10 for k in range(20)], size=size, b_frames=0, container_format="mpegts")
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return str(path)


def write_bad_index(path: Path, good_frames: int) -> str:
    """An MP4 whose table of packet sizes is senseless from one frame on."""
    write_video(path, b_frames=0)
    content = bytearray(path.read_bytes())
    entry = content.index(b"stsz") + 16 + 4 * good_frames
    content[entry : entry + 4] = b"\x7f\xff\xff\xff"
    path.write_bytes(content)
    return str(path)
