# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Frames and their true times out of a video: one small reader interface over torchcodec, PyAV and lists of frames.

All times in here are seconds on the stream's own clock; `video_processing_d2vlm.sample_video` plans which ones to read.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

TIME_TOLERANCE = 1e-6  # seconds; a frame that starts this little after a sampled time is already on screen
SEEK_GAIN = 16  # frames; seeking pays off when it saves decoding at least this many
MAX_REORDER = 16  # frames that video codecs store out of order at most
TEXT_CODECS = ("ansi", "bintext", "idf", "xbin")  # FFmpeg renders text files as pictures; nobody means that


class DecoderFailure(Exception):
    """One decoder cannot read a file and another may; never reaches the caller of the package."""


@dataclass(eq=False)
class VideoReader(ABC):
    """A video that can be asked for the frames on screen at given times.

    Args:
        name (`str`): What messages call the video.
        begin (`float`): Presentation time of the first frame, seconds.
        end (`float`): Time at which the last frame disappears, seconds.
        num_frames (`int`): Frames in the video.
        origin (`float`): What counts as second 0 in results: `begin` for files, 0 where the caller gave the times.
        announced (`float`, *optional*): Duration the file's header promises, seconds.
        slack (`float`): Times this close to the end are not sampled: rounded clocks do not know them to be inside.
        replaced (`int`): Sampled times so far whose own frame did not decode.
    """

    name: str
    begin: float
    end: float
    num_frames: int
    origin: float
    announced: float | None = None
    slack: float = TIME_TOLERANCE
    replaced: int = 0

    decoder: ClassVar[str] = "frames"

    @property
    def duration(self) -> float:
        """Seconds from the first frame's start to the last frame's end."""
        return max(self.end - self.begin, 0.0)

    @property
    def period(self) -> float:
        """Mean seconds between two frames."""
        return self.duration / self.num_frames

    @property
    def skipped(self) -> int:
        """Packets which had to be decoded and could not be."""
        return 0

    @abstractmethod
    def read(
        self, times: np.ndarray | None, step: float, chunk_bytes: float
    ) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yield the frames on screen at `times`, in chunks.

        Args:
            times (`(n,)` float64 `np.ndarray`, or `None`): Increasing times in seconds; `None` for every frame.
            step (`float`): Seconds between two of them: how far a replacement for a damaged frame may lie.
            chunk_bytes (`float`): Bytes of decoded frames per chunk (one frame at least).

        Yields:
            `(frames, times)`: `(t, 3, H, W)` uint8 and the `(t,)` float64 true presentation times in seconds.
        """

    def close(self) -> None:  # noqa: B027
        """Give back what is open."""


class TorchcodecReader(VideoReader):
    """Frames by torchcodec in exact seek mode; raises `DecoderFailure` on anything torchcodec cannot do.

    Args:
        source (`EncodedFile` of video_sources_d2vlm.py, or `torchcodec.decoders.VideoDecoder`): What to read.
        num_threads (`int`): FFmpeg threads, 0 for as many as it likes.
    """

    decoder = "torchcodec"

    def __init__(self, source: Any, num_threads: int = 1) -> None:
        self._given = hasattr(source, "get_frames_played_at")
        self._decoder = source if self._given else self._open(source, num_threads)
        meta = self._decoder.metadata
        if not meta.num_frames or meta.codec in TEXT_CODECS:
            raise DecoderFailure(f"it finds no video frames (codec {meta.codec})")
        self._frame_bytes = meta.width * meta.height * 3
        begin, self._decoder_end = float(meta.begin_stream_seconds), float(meta.end_stream_seconds)
        end, slack = self._decoder_end, TIME_TOLERANCE
        steady = meta.average_fps_from_header and meta.num_frames / meta.average_fps_from_header
        if not self._given and not (steady and abs(begin + steady - end) < TIME_TOLERANCE):
            try:
                with closing(PyAvReader(source)) as other:  # without a steady rate the end is PyAvReader's to say
                    end, slack = begin + other.duration, other.slack
            except (ImportError, ValueError) as error:
                logger.info("%s: its end is taken from torchcodec (%s)", source.name, error)
        name = "<VideoDecoder>" if self._given else source.name
        super().__init__(name, begin, end, meta.num_frames, begin, meta.duration_seconds_from_header, slack)

    @staticmethod
    def _open(source: Any, num_threads: int) -> Any:
        try:
            from torchcodec.decoders import VideoDecoder

            return VideoDecoder(source.rewound(), seek_mode="exact", num_ffmpeg_threads=num_threads, device="cpu")
        except (RuntimeError, ValueError) as error:
            raise DecoderFailure(_first_line(error)) from error

    def read(
        self, times: np.ndarray | None, step: float, chunk_bytes: float
    ) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        at, played_at = self._decoder.get_frames_at, self._decoder.get_frames_played_at
        if times is None:
            batches = [(at, part) for part in self._parts(np.arange(self.num_frames), chunk_bytes)]
        else:  # no frame is "played" from the end on, which for a file without durations is where its last frame starts
            inside = times + TIME_TOLERANCE < self._decoder_end
            batches = [(played_at, part) for part in self._parts(times[inside] + TIME_TOLERANCE, chunk_bytes)]
            batches += [] if inside.all() else [(at, np.array([self.num_frames - 1]))]
        for get, part in batches:
            by_time = get == played_at
            try:
                batch = get(torch.from_numpy(part))
            except (RuntimeError, IndexError, ValueError) as error:
                where = f"{part[0] - self.origin:.3f} s" if by_time else f"frame {part[0]}"
                raise DecoderFailure(f"decoding fails at or soon after {where} ({_first_line(error)})") from error
            data, seconds = batch.data.cpu(), batch.pts_seconds.cpu().numpy()
            if by_time and (seconds > part).any():  # it steps over frames that do not decode
                raise DecoderFailure(f"the frame at {part[seconds > part][0] - self.origin:.3f} s does not decode")
            yield data if data.shape[1] == 3 else data.permute(0, 3, 1, 2), seconds

    def _parts(self, wanted: np.ndarray, chunk_bytes: float) -> list[np.ndarray]:
        # A decoder that was given is asked for one frame at a time: no other can find out which one is at fault.
        return _split(wanted, 1 if self._given else chunk_bytes / self._frame_bytes)


class PyAvReader(VideoReader):
    """Frames by PyAV: applies the display rotation, steps over packets that do not decode and counts them.

    Pixels go through FFmpeg's `format=rgb24` filter, as in torchcodec, so that both decoders give equal frames.

    Args:
        source (`EncodedFile` of video_sources_d2vlm.py): What to read.
        num_threads (`int`): FFmpeg threads, 0 for as many as it likes.

    Raises:
        ImportError: If PyAV cannot be loaded.
        ValueError: If there is no video to decode in it; the message says why.
    """

    decoder = "pyav"

    def __init__(self, source: Any, num_threads: int = 1) -> None:
        self._av = _import_pyav()
        self._source, self._threads, self._container = source, num_threads, None
        self._broken: set[int] = set()
        self._can_seek, self._sought, self._cut = True, False, False
        self._graph, self._graph_key = None, None
        self._open()
        stamps, ends, keys = self._scan()
        if not len(stamps):
            raise ValueError(
                f"{source.name} holds no video frames with times: its header describes a video, but nothing that can "
                "be shown follows. Check that the file is complete; put a raw stream into an MP4 (ffmpeg -c copy)."
            )
        self._stamps, self._keys = np.unique(stamps), np.unique(keys)  # (n,) in time-base units, presentation order
        begin, last, tick = (float(self._seconds(stamp)) for stamp in (self._stamps[0], self._stamps[-1], 1))
        announced = self._stream.duration and self._seconds(self._stream.duration)
        gaps = self._seconds(np.diff(self._stamps))
        if len(gaps):
            # FFmpeg's versions differ on how long a packet lasts, and one stored out of order has no true duration:
            # the last frame stays as long as the header says, but not less than the others do nor more than any does.
            mean = (last - begin) / len(gaps)
            end = last + float(np.clip((announced or 0.0) - (last - begin), mean, gaps.max()))
        else:
            end = float(self._seconds(ends.max()))
            mean = end - begin
        slack = max(min(tick, mean / 4), TIME_TOLERANCE)
        super().__init__(source.name, begin, end, len(stamps), begin, announced, slack)

    @property
    def skipped(self) -> int:
        return len(self._broken)

    def _seconds(self, stamps: Any) -> Any:
        # The order of operations is torchcodec's: the last bit of the result is the same.
        return stamps * float(self._stream.time_base.numerator) / self._stream.time_base.denominator

    def _open(self) -> None:
        """Open the file from its start."""
        self.close()
        payload = self._source.rewound()
        try:
            self._container = self._av.open(
                io.BytesIO(payload) if isinstance(payload, bytes) else payload, metadata_errors="replace"
            )
        except (self._av.error.FFmpegError, OSError) as error:
            raise ValueError(self._source.why_unreadable(error.strerror)) from error
        self._stream = self._container.streams.best("video")
        codec = self._stream and self._stream.codec_context
        if codec is None or codec.name in TEXT_CODECS:
            kinds = sorted({stream.type for stream in self._container.streams} - {"video"}) or ["text"]
            raise ValueError(
                f"{self._source.name} holds no video: FFmpeg finds only {' and '.join(kinds)} in it. Give a file that "
                "has a video stream."
            )
        codec.thread_count = self._threads
        codec.thread_type = "SLICE" if self._threads == 1 else "AUTO"
        self._frames, self._last, self._pending = self._decode(), None, None

    def _scan(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Presentation times, ends and key-frame times of all packets, in time-base units, without decoding."""
        stamps, ends, keys = [], [], []
        for packet in self._packets():
            stamp = None if packet is None else self._stamp(packet)
            if stamp is None or packet.is_discard:  # the end, or cut away by an edit list
                continue
            stamps.append(stamp)
            ends.append(stamp + (packet.duration or 0))
            self._cut |= packet.is_corrupt  # the file ends within this packet
            if packet.is_keyframe:
                keys.append(stamp)
        return tuple(np.array(values, dtype=np.int64) for values in (stamps, ends, keys))

    def _packets(self) -> Iterator[Any]:
        """The packets of the stream; `None` in place of those that cannot be found because the file is damaged."""
        packets = self._container.demux(self._stream)
        try:
            yield from packets
        except self._av.error.FFmpegError as error:
            logger.info("%s cannot be read to its end (%s)", self._source.name, error)
            self._cut = True
            yield None

    def _decode(self) -> Iterator[Any]:
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)  # `None` gives back what the decoder still holds
            except self._av.error.FFmpegError:
                if packet is not None and packet.dts is not None:  # the packet that ends the stream has none
                    self._broken.add(packet.dts)
                continue
            yield from (frame for frame in frames if self._stamp(frame) is not None)

    @staticmethod
    def _stamp(item: Any) -> int | None:
        """When a frame or packet is shown, in time-base units."""
        return item.dts if item.pts is None else item.pts

    def _skip_ahead(self, target: int) -> None:
        """Seek to the key frame before `target` if that saves enough decoding."""
        position = np.searchsorted(self._keys, target, side="right") - 1
        if not self._can_seek or position < 0:
            return
        key = self._keys[position]
        here = self._stamps[0] if self._last is None else self._stamp(self._last)
        if np.subtract(*np.searchsorted(self._stamps, [key, here])) < SEEK_GAIN:
            return
        try:
            self._container.seek(int(key), stream=self._stream)
        except self._av.error.FFmpegError as error:
            logger.info("%s cannot be sought in (%s)", self.name, error)
            self._restart()
            return
        self._sought = True
        self._frames, self._last, self._pending = self._decode(), None, None

    def _restart(self) -> None:
        """Start over the slow and sure way: from the first packet, one thread, no seeking."""
        self._threads, self._can_seek, self._sought = 1, False, False
        self._broken.clear()
        self._open()

    def _advance(self, target: int) -> Any:
        """Decode up to `target`; the last frame at or before it, or `None`."""
        while self._last is None or self._stamp(self._last) < target:
            frame = self._pending or next(self._frames, None)
            self._pending = None
            if frame is None:
                break
            if self._stamp(frame) > target:
                self._pending = frame
                break
            self._last = frame
        return self._last

    def _frame_at(self, target: int) -> Any:
        """The frame at `target`, else the last before it that decodes, else (at the very start) the first after it."""
        self._skip_ahead(target)
        frame = self._advance(target)
        if (frame is None or self._stamp(frame) != target) and (self._sought or self._threads != 1):
            self._restart()  # an imprecise seek or a lost thread may be to blame
            frame = self._advance(target)
        return self._pending if frame is None else frame

    def _rgb(self, frame: Any) -> np.ndarray:
        key = (frame.width, frame.height, frame.format.name)
        if key != self._graph_key:
            graph = self._av.filter.Graph()
            chain = [graph.add_buffer(width=key[0], height=key[1], format=key[2], time_base=self._stream.time_base)]
            chain.append(graph.add("format", "rgb24"))
            if key[:2] != (self._width, self._height):  # a stream may change its size half way
                chain.append(graph.add("scale", f"{self._width}:{self._height}"))
            graph.link_nodes(*chain, graph.add("buffersink")).configure()
            self._graph, self._graph_key = graph, key
        self._graph.push(frame)
        return self._graph.pull().to_ndarray(format="rgb24")  # (H, W, 3)

    def read(
        self, times: np.ndarray | None, step: float, chunk_bytes: float
    ) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        self._open()  # the scan has read to the end
        all_seconds = self._seconds(self._stamps)
        times = all_seconds if times is None else times
        index, first = np.unique(_on_screen(all_seconds, times), return_index=True)
        reach = max(step, self.period) + TIME_TOLERANCE
        buffer, seconds = None, []
        for done, (target, time) in enumerate(zip(self._stamps[index], times[first], strict=True)):
            frame = self._frame_at(int(target))
            shown = np.inf if frame is None else self._seconds(self._stamp(frame))
            if abs(shown - self._seconds(target)) > reach:
                if self._cut and done and target > self._stamps[-MAX_REORDER:][0]:
                    continue  # one of the last frames, which are missing where the file was cut off
                raise ValueError(self._undecodable(time - self.origin, shown - self.origin))
            self.replaced += self._stamp(frame) != target
            if not done:
                self._width, self._height = frame.width, frame.height
                self._turns = round(frame.rotation / 90)  # quarter turns, counterclockwise
            if buffer is None:
                size = min(chunk_bytes / (self._width * self._height * 3), len(index) - done)
                buffer = np.empty((max(1, int(size)), self._height, self._width, 3), dtype=np.uint8)
            buffer[len(seconds)] = self._rgb(frame)
            seconds.append(shown)
            if len(seconds) == len(buffer):
                yield self._upright(buffer), np.array(seconds)
                buffer, seconds = None, []
        if seconds:
            yield self._upright(buffer[: len(seconds)]), np.array(seconds)

    def _upright(self, pixels: np.ndarray) -> torch.Tensor:
        """Turn `(t, H, W, 3)` as the display matrix says; `(t, 3, H, W)`."""
        return torch.rot90(torch.from_numpy(pixels), self._turns, (1, 2)).permute(0, 3, 1, 2)

    def _undecodable(self, time: float, shown: float) -> str:
        nearest = f"the nearest that does is at {shown:.3f} s" if np.isfinite(shown) else "no other does either"
        return (
            f"{self.name} has no frame to show at {time:.3f} s: that frame does not decode and {nearest} "
            f"({self.skipped} damaged packets). Fetch or encode the file again, or cut the damaged part away."
        )

    def close(self) -> None:
        if self._container is not None:
            self._container.close()


class FramesReader(VideoReader):
    """Frames that are already decoded (array, tensor, pictures), with the times the caller gave.

    Args:
        frames (`FrameList` of video_sources_d2vlm.py): How to load them.
        seconds (`np.ndarray` of shape `(n,)`): Time of every frame.
        period (`float`): Seconds the last frame stays.
    """

    def __init__(self, frames: Any, seconds: np.ndarray, period: float) -> None:
        super().__init__(frames.name, float(seconds[0]), float(seconds[-1] + period), len(seconds), 0.0)
        self._frames, self._all_seconds = frames, seconds

    def read(
        self, times: np.ndarray | None, step: float, chunk_bytes: float
    ) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        index = np.unique(_on_screen(self._all_seconds, self._all_seconds if times is None else times))
        for part in _split(index, chunk_bytes / self._frames.frame_bytes):
            yield self._frames.load(part), self._all_seconds[part]


def _on_screen(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the frame on screen at each time: the last one that has started."""
    return np.maximum(np.searchsorted(seconds, times + TIME_TOLERANCE, side="right") - 1, 0)


def _split(wanted: np.ndarray, size: float) -> list[np.ndarray]:
    """Parts of at most `size` elements (one at least)."""
    size = max(1, int(min(size, len(wanted))))
    return [wanted[i : i + size] for i in range(0, len(wanted), size)]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _import_pyav() -> Any:
    try:
        import av
        import av.filter
    except ImportError as error:
        raise ImportError(
            f"PyAV cannot be loaded ({error}), and it is what reads a video where torchcodec does not. Run "
            "`pip install av`."
        ) from error
    return av


__all__ = ["DecoderFailure", "FramesReader", "PyAvReader", "TorchcodecReader", "VideoReader"]
