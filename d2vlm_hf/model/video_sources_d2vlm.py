# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What may be given as a video: a file (path, URL, bytes, file object) to decode, or frames that already are.

A file carries its own times and so does an open torchcodec decoder; arrays, lists of pictures and frame folders need
`video_fps` or `timestamps`.
"""

import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import is_vision_available


if is_vision_available():
    from PIL import Image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
URL_TIMEOUT = 30.0  # seconds without an answer
USER_AGENT = "d2vlm_hf"  # some servers turn Python's own name away


@dataclass
class EncodedFile:
    """A file to decode.

    Args:
        payload (`str`, `bytes` or file-like): A path, the bytes themselves, or an object with `read` and `seek`.
        name (`str`): What messages call it.
    """

    payload: Any
    name: str

    def rewound(self) -> Any:
        """The payload, a file object at its start."""
        if hasattr(self.payload, "seek"):
            self.payload.seek(0)
        return self.payload

    def why_unreadable(self, reason: str) -> str:
        """Say what is wrong with a file that FFmpeg does not open, and what to do; `reason` is FFmpeg's own."""
        head = self._head(12)
        if not head:
            return f"{self.name} is empty (0 bytes): the recording or download did not finish. Make or fetch it again."
        if head[4:8] == b"ftyp":
            return (
                f"{self.name} is a cut-off MP4 or MOV file: its index (moov), without which no frame is found, is "
                "missing or damaged. Fetch the whole file, or record with the index in front (ffmpeg -movflags "
                "+faststart)."
            )
        return (
            f"{self.name} is not a video that FFmpeg can read ({reason}). Check that it is the file you meant, or "
            "convert it (ffmpeg -i IN OUT.mp4)."
        )

    def _head(self, size: int) -> bytes:
        payload = self.rewound()
        if isinstance(payload, bytes):
            return payload[:size]
        if hasattr(payload, "read"):
            return payload.read(size)
        with open(payload, "rb") as file:
            return file.read(size)


@dataclass
class FrameList:
    """Frames that are already decoded.

    Args:
        load (`Callable`): From `(t,)` int64 frame indices to `(t, 3, H, W)` uint8.
        count (`int`): Number of frames.
        frame_bytes (`int`): Size of one of them.
        name (`str`): What messages call them.
    """

    load: Callable[[np.ndarray], torch.Tensor]
    count: int
    frame_bytes: int
    name: str


def is_decoder(source: Any) -> bool:
    """Whether this is an open `torchcodec.decoders.VideoDecoder` (told by what it can do, without the import)."""
    return hasattr(source, "get_frames_played_at") and hasattr(source, "metadata")


def _is_frame(item: Any) -> bool:
    """Whether an element of a list is one frame: a picture, the path of one, or a 3-D array."""
    if isinstance(item, str | Path):
        return Path(item).suffix.lower() in IMAGE_SUFFIXES
    return _is_picture(item) or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 3)


def _is_picture(item: Any) -> bool:
    return is_vision_available() and isinstance(item, Image.Image)


def flatten_videos(videos: Any) -> list[Any]:
    """List the videos of whatever nesting a processor was given.

    Args:
        videos (`Any`): One video, a list of videos, or lists of lists of them (chat templates give those). A list of
            pictures (PIL, 3-D arrays, or paths of image files) is one video; a 5-D array is a batch of them.

    Returns:
        `list`: The videos, each as `sample_video` takes it.
    """
    if isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, list | tuple) or (videos and all(map(_is_frame, videos))):
        return [videos]
    return [video for part in videos for video in flatten_videos(part)]


def resolve_source(source: Any, stack: ExitStack) -> Any:
    """Find out what a video is given as.

    Args:
        source (`Any`): Path, http(s) URL, bytes, file object, `{"bytes": ..., "path": ...}`, torchcodec decoder,
            `(T, C, H, W)` or `(T, H, W, C)` array (uint8, or float in [0, 1]), list of pictures, or frame folder.
        stack (`ExitStack`): Closed by the caller when the video has been read; holds what a URL was fetched to.

    Returns:
        `EncodedFile`, `FrameList` or the decoder object itself.

    Raises:
        ValueError: If it is none of these, or is not there.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, stack)
    if is_decoder(source):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return EncodedFile(bytes(source), f"<{len(source)} bytes>")
    if isinstance(source, str | Path):
        return _from_path(str(source), stack)
    if hasattr(source, "read"):
        seekable = hasattr(source, "seekable") and source.seekable()
        return EncodedFile(source if seekable else source.read(), f"<file {getattr(source, 'name', 'object')}>")
    if isinstance(source, np.ndarray | torch.Tensor):
        return _from_array(source)
    if isinstance(source, list | tuple) and source and all(map(_is_frame, source)):
        return _from_pictures(source, f"<list of {len(source)} pictures>")
    raise ValueError(
        f"A video cannot be given as {type(source).__name__}: nothing says how to read frames from it. Give a path, "
        "an http(s) URL, bytes, a file object, a torchcodec VideoDecoder, a 4-D array, or a list of pictures."
    )


def _from_mapping(source: Mapping, stack: ExitStack) -> Any:
    if source.get("bytes") is not None:
        return EncodedFile(bytes(source["bytes"]), source.get("path") or f"<{len(source['bytes'])} bytes>")
    if source.get("path") is None:
        raise ValueError(
            f'A video given as a dict has neither "bytes" nor "path", but the keys {sorted(source)}: there is nothing '
            'to read. Give {"path": ...} or {"bytes": ...}, as `datasets.Video(decode=False)` does.'
        )
    return resolve_source(source["path"], stack)


def _from_path(path: str, stack: ExitStack) -> EncodedFile | FrameList:
    if path.startswith(("http://", "https://")):
        return EncodedFile(_fetch(path, stack), path)
    if Path(path).is_dir():
        pictures = [file for file in Path(path).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        if not pictures:
            raise ValueError(
                f"{path} is a folder without pictures ({', '.join(IMAGE_SUFFIXES)}), so it is no frame folder. "
                "Give the video file itself, or a folder with one picture per frame."
            )
        return _from_pictures(sorted(pictures, key=_natural), path)
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: no video file is there. Check the path (now in {Path.cwd()}).")
    return EncodedFile(path, path)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key with which frame_2 comes before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _fetch(url: str, stack: ExitStack) -> str:
    """Download to a temporary file, which both decoders read faster and more surely than a stream; its path."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="d2vlm_hf-"))
    target = Path(folder) / "video"
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer, open(target, "wb") as file:
            shutil.copyfileobj(answer, file)
            expected = answer.headers.get("Content-Length")
    except (urllib.error.URLError, HTTPException, OSError) as error:
        raise ValueError(f"{url} could not be fetched: {error}. Check the address, or download it yourself.") from error
    if expected is not None and target.stat().st_size != int(expected):
        raise ValueError(
            f"{url} could not be fetched whole: {target.stat().st_size} of {expected} bytes arrived. Try it again."
        )
    return str(target)


def _from_array(video: np.ndarray | torch.Tensor) -> FrameList:
    shape, name = tuple(video.shape), f"<array of shape {tuple(video.shape)}>"
    if len(shape) != 4 or 3 not in (shape[1], shape[3]):
        raise ValueError(
            f"{name} is no video: expected are 4 dimensions, (T, 3, H, W) or (T, H, W, 3). Stack the frames along a "
            "first dimension and convert them to RGB."
        )
    if 0 in shape:
        raise ValueError(f"{name} holds no frames: there is nothing to sample. Give at least one frame.")
    if isinstance(video, np.ndarray):
        video = torch.from_numpy(np.ascontiguousarray(video))
    if video.dtype != torch.uint8 and not video.is_floating_point():
        raise ValueError(
            f"{name} has dtype {video.dtype}, which does not say what white is. Give uint8, or float in [0, 1]."
        )
    if video.is_floating_point() and not (video.min() >= 0 and video.max() <= 1):  # NaN fails too
        raise ValueError(
            f"{name} has values from {video.min():.4g} to {video.max():.4g}; float frames must lie in [0, 1]. Undo "
            "the normalisation, or give uint8."
        )
    video = video.detach().cpu()
    if shape[1] != 3:
        video = video.permute(0, 3, 1, 2)

    def load(index: np.ndarray) -> torch.Tensor:
        frames = video[torch.from_numpy(index)]
        return frames if frames.dtype == torch.uint8 else (frames.float() * 255).round().to(torch.uint8)

    return FrameList(load, shape[0], video[0].numel(), name)


def _from_pictures(pictures: Sequence[Any], name: str) -> FrameList:
    first = _pixels(pictures[0])

    def load(index: np.ndarray) -> torch.Tensor:
        frames = [_pixels(pictures[i]) for i in index]
        for i, frame in zip(index, frames, strict=True):
            if frame.shape != first.shape:
                raise ValueError(
                    f"{name} mixes frame sizes: frame {i} has height x width {tuple(frame.shape[1:])} and frame 0 has "
                    f"{tuple(first.shape[1:])}. Resize the frames to one size."
                )
        return torch.stack(frames)  # (t, 3, H, W)

    return FrameList(load, len(pictures), first.numel(), name)


def _pixels(picture: Any) -> torch.Tensor:
    """One frame as `(3, H, W)` uint8."""
    if isinstance(picture, np.ndarray | torch.Tensor):
        one = _from_array(picture[None])
        return one.load(np.zeros(1, dtype=np.int64))[0]
    if not _is_picture(picture):
        try:
            with Image.open(picture) as opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"{picture} is no picture that can be read: {error}. Replace or remove it.") from error
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def frame_times(
    count: int, name: str, video_fps: float | None, timestamps: Sequence[float] | None, default_period: float
) -> tuple[np.ndarray, float]:
    """The times of frames which carry none.

    Args:
        count (`int`): Number of frames.
        name (`str`): What messages call the video.
        video_fps (`float`, *optional*): Frames per second; the first frame is at 0 s.
        timestamps (sequence of `count` floats, *optional*): Their times in seconds, kept as they are.
        default_period (`float`): Seconds one frame stands for if there is only one.

    Returns:
        `(seconds, period)`: `(count,)` float64 and the seconds the last frame stays.

    Raises:
        ValueError: If neither or both are given, or the times are no times.
    """
    if (video_fps is None) == (timestamps is None):
        raise ValueError(
            f"{name} came with {'neither' if timestamps is None else 'both'} video_fps and timestamps: frames alone do "
            "not say when they were shown. Give video_fps=<frames per second> or timestamps=<seconds of each frame>."
        )
    if timestamps is None:
        if not (np.isfinite(video_fps) and video_fps > 0):
            raise ValueError(
                f"video_fps={video_fps} is no frame rate: times are frame number / video_fps. Give a positive number."
            )
        return np.arange(count) / float(video_fps), 1 / float(video_fps)
    seconds = np.asarray(timestamps, dtype=np.float64)
    if seconds.shape != (count,):
        raise ValueError(
            f"timestamps has shape {seconds.shape}, but {name} has {count} frames: each frame needs one time. Give "
            f"{count} numbers, in seconds."
        )
    rising = np.isfinite(seconds) & (seconds > np.concatenate([[-np.inf], seconds[:-1]]))
    if not rising.all():
        worst = int(np.argmin(rising))
        raise ValueError(
            f"timestamps[{worst}] = {seconds[worst]} does not come after the time before it: frames are shown one "
            "after the other. Give strictly increasing seconds."
        )
    return seconds, float(np.median(np.diff(seconds))) if count > 1 else default_period


__all__ = ["EncodedFile", "FrameList", "flatten_videos", "frame_times", "is_decoder", "resolve_source"]
