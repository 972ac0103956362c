# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""From a video to sampled frames with their true times, and from those to what the vision tower takes.

Sampling rule, the same for every source and decoder: the sampled times are `begin + k / fps`; each gives the frame on
screen at that moment, and the time stored with it is the frame's own presentation time, in seconds from the first frame
of the stream (0.0: what a player's clock shows). A frame is never repeated: a file with fewer frames per second than
`fps` gives each of its frames once and a lower effective rate.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import logging
from transformers.video_processing_utils import VideoProcessorMixin

from .video_decoding_d2vlm import (
    DecoderFailure,
    FramesReader,
    PyAvReader,
    TorchcodecReader,
    VideoReader,
)
from .video_sources_d2vlm import FrameList, flatten_videos, frame_times, is_decoder, resolve_source
from .video_transforms_d2vlm import center_crop_frames, pack_frames, resize_frames, resized_size


try:
    from transformers.utils import is_torchcodec_usable
except ImportError:  # added in 5.21

    def is_torchcodec_usable(decode: str) -> bool:
        """Without transformers' probe PyAV is the sure choice."""
        return False


logger = logging.get_logger(__name__)

DEFAULT_FPS = 1.0  # frames per second, as in the paper
DEFAULT_MAX_FRAMES = 512  # 8.5 minutes at 1 fps
CHUNK_BYTES = 32 * 2**20  # decoded frames in memory at once while they are being resized


@dataclass(frozen=True)
class SampledVideo:
    """Sampled frames of one video.

    Args:
        frames (`torch.Tensor` of shape `(T, 3, H, W)`, uint8): The frames, or what `frame_transform` made of them.
        times (`np.ndarray` of shape `(T,)`, float64): Seconds from the start of the video at which each appears.
        duration (`float`): Seconds from the first frame's start to the last frame's end.
        fps (`float`): Frames per second that were really sampled.
        decoder (`str`): `"torchcodec"`, `"pyav"`, or `"frames"` where nothing had to be decoded.
        skipped (`int`): Packets that had to be decoded and could not be.
    """

    frames: torch.Tensor
    times: np.ndarray
    duration: float
    fps: float
    decoder: str
    skipped: int

    @property
    def period(self) -> float:
        """Seconds that one sampled frame stands for."""
        return frame_period(self.times, self.fps)


def frame_period(times: np.ndarray | Sequence[float], fps: float | None = None) -> float:
    """Seconds that one sampled frame stands for.

    Args:
        times (`np.ndarray` of shape `(T,)`): Seconds at which the frames appear.
        fps (`float`, *optional*): The effective sampling rate; without it the median distance of neighbours counts.

    Returns:
        `float`: The period in seconds.

    Raises:
        ValueError: If there is neither a rate nor a neighbour.
    """
    if fps is not None:
        return 1 / fps
    if len(times) < 2:
        raise ValueError(
            f"{len(times)} frame time(s) without fps define no period: a single frame has no neighbour to measure the "
            "distance to. Pass fps."
        )
    return float(np.median(np.diff(times)))


def sample_video(
    source: Any,
    fps: float | None = DEFAULT_FPS,
    max_frames: int | None = None,
    video_fps: float | None = None,
    timestamps: Sequence[float] | None = None,
    decoder: str | None = None,
    num_threads: int = 1,
    frame_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> SampledVideo:
    """Sample the frames on screen at regular times, with their true times.

    Packets that do not decode are stepped over: where that hits a sampled time, the last frame before it that decodes
    is taken, if it is at most one sampling step (or one frame of the file) away. A file that torchcodec cannot finish
    is read again with PyAV; `decoder` of the result says which one it was.

    Args:
        source (`Any`): Path, http(s) URL, bytes, file object, `{"bytes": ..., "path": ...}`, torchcodec
            `VideoDecoder` (it has its own times), `(T, 3, H, W)` or `(T, H, W, 3)` array (uint8, or float in [0, 1]),
            list of pictures, or a folder with one picture per frame, sorted by name.
        fps (`float`, *optional*, defaults to 1.0): Frames per second to sample; `None` takes every frame.
        max_frames (`int`, *optional*): Longer videos give this many frames, evenly spaced over all of the video.
        video_fps (`float`, *optional*): Frames per second of arrays, pictures and frame folders.
        timestamps (sequence of float, *optional*): Or the time of each of their frames, in seconds.
        decoder (`str`, *optional*): `"torchcodec"` or `"pyav"`; by default torchcodec wherever it works.
        num_threads (`int`, *optional*, defaults to 1): Decoding threads, 0 for as many as FFmpeg likes.
        frame_transform (`Callable`, *optional*): Applied to chunks `(t, 3, H, W)` uint8 while decoding goes on, so
            that frames of full size need not all be in memory.

    Returns:
        `SampledVideo`: Frames, times in seconds, duration, effective rate.

    Raises:
        ValueError: If the source cannot be read, a sampled time cannot be shown, or an option makes no sense.
    """
    _check_rate("fps", fps)
    _check_max_frames(max_frames)
    sample = partial(_sample, fps=fps, max_frames=max_frames, transform=frame_transform)
    with ExitStack() as stack:
        found = resolve_source(source, stack)
        if isinstance(found, FrameList):
            seconds, period = frame_times(found.count, found.name, video_fps, timestamps, 1 / (fps or DEFAULT_FPS))
            return sample(FramesReader(found, seconds, period))
        if video_fps is not None or timestamps is not None:
            raise ValueError(
                f"{getattr(found, 'name', 'A VideoDecoder')} came with video_fps or timestamps, but a video file has "
                "its own times. Leave both out; they are for arrays, lists of pictures and frame folders."
            )
        for reader_class in [TorchcodecReader] if is_decoder(found) else _readers(decoder):
            try:
                with closing(reader_class(found, num_threads)) as reader:
                    return sample(reader)
            except DecoderFailure as error:
                failure = error
                logger.info("torchcodec cannot read %s (%s)", getattr(found, "name", "a VideoDecoder"), failure)
    raise ValueError(
        f"The VideoDecoder cannot give all frames that were asked for: {failure}. Give the path of the file instead, "
        "so that PyAV can step over what is damaged, or encode it again."
    ) from failure


def _readers(decoder: str | None) -> list[type[VideoReader]]:
    """The decoders to try, in order."""
    if decoder not in (None, "torchcodec", "pyav"):
        raise ValueError(
            f"decoder={decoder!r} is unknown: there are 'torchcodec', 'pyav' and None (the best that works)."
        )
    if decoder == "pyav":
        return [PyAvReader]
    if is_torchcodec_usable("video"):
        return [TorchcodecReader, PyAvReader]
    if decoder == "torchcodec":
        raise ValueError(
            "decoder='torchcodec' cannot be had: it is not installed, does not fit this torch, or finds no FFmpeg. "
            "Install them (`d2vlm doctor` tells what is missing) or leave `decoder` out."
        )
    logger.warning_once(
        "torchcodec cannot decode videos here, so PyAV does: the same frames and times. `d2vlm doctor` tells what is "
        "missing."
    )
    return [PyAvReader]


def _check_rate(name: str, fps: float | None) -> None:
    if fps is not None and not (isinstance(fps, int | float | np.number) and math.isfinite(fps) and fps > 0):
        raise ValueError(
            f"{name}={fps!r} is no sampling rate: frames are 1/{name} seconds apart. Give a positive number."
        )


def _check_max_frames(max_frames: int | None) -> None:
    if max_frames is not None and (isinstance(max_frames, bool) or max_frames != int(max_frames) or max_frames < 1):
        raise ValueError(
            f"max_frames={max_frames!r} leaves nothing to look at: it is how many frames are sampled at most. Give a "
            "whole number from 1 on, or None for no limit."
        )


def _plan(reader: VideoReader, fps: float | None, max_frames: int | None) -> tuple[np.ndarray | None, float, bool]:
    """Times to sample on the reader's clock (`None`: every frame), seconds between them, whether they were thinned."""
    count = reader.num_frames if fps is None else max(1, math.ceil((reader.duration - reader.slack) * fps))
    if max_frames is not None and min(count, reader.num_frames) > max_frames:
        return reader.begin + np.arange(max_frames) * reader.duration / max_frames, reader.duration / max_frames, True
    if fps is None:
        return None, reader.period, False
    return reader.begin + np.arange(count) / fps, 1 / fps, False


def _sample(
    reader: VideoReader,
    fps: float | None,
    max_frames: int | None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
) -> SampledVideo:
    times, step, thinned = _plan(reader, fps, max_frames)
    planned = reader.num_frames if times is None else len(times)
    # One chunk saves a copy, unless frames may be repeated in it.
    chunk_bytes = CHUNK_BYTES if transform is not None or planned > reader.num_frames else math.inf
    frames, seconds, previous = [], [], -math.inf
    for chunk, shown in reader.read(times, step, chunk_bytes):
        fresh = np.diff(shown, prepend=previous) > 0
        previous = shown[-1]
        if not fresh.all():
            chunk, shown = chunk[torch.from_numpy(fresh)], shown[fresh]
        if len(shown):
            frames.append(chunk if transform is None else transform(chunk))
            seconds.append(shown)
    seconds = np.concatenate(seconds) - reader.origin
    duration = reader.duration or 1 / (fps or DEFAULT_FPS)
    regular = fps is not None and not thinned and len(seconds) in (1, planned)
    effective = float(fps) if regular else len(seconds) / duration
    if thinned:
        logger.warning(
            "%s: %.1f s hold more than max_frames=%d frames at fps=%s; %d evenly spaced ones (fps=%.4g) are used.",
            reader.name,
            duration,
            max_frames,
            fps,
            len(seconds),
            effective,
        )
    _warn_of_damage(reader)
    return SampledVideo(
        frames=frames[0] if len(frames) == 1 else torch.cat(frames),
        times=seconds,
        duration=duration,
        fps=effective,
        decoder=reader.decoder,
        skipped=reader.skipped,
    )


def _warn_of_damage(reader: VideoReader) -> None:
    """One warning that says all that is wrong with a file which could be used nevertheless."""
    faults = []
    if reader.skipped:
        faults.append(f"{reader.skipped} packet(s) do not decode")
    if reader.replaced:
        faults.append(f"{reader.replaced} sampled time(s) show the nearest frame that does")
    missing = (reader.announced or 0.0) - reader.duration
    if missing > max(0.05 * reader.duration, 3 * reader.period):
        faults.append(f"it ends at {reader.duration:.2f} s, but {reader.announced:.2f} s were announced")
    if faults:
        logger.warning("%s is damaged: %s. What decodes is used.", reader.name, "; ".join(faults))


class D2VLMVideosKwargs(VideosKwargs, total=False):
    """Options of `D2VLMVideoProcessor` beside transformers' own.

    Args:
        max_frames (`int`, *optional*): Longer videos give this many frames, evenly spaced.
        decoder (`str`, *optional*): `"torchcodec"` or `"pyav"`; by default torchcodec wherever it works.
        video_fps (`float` or list, *optional*): Frames per second of videos given as frames; a list has one per video.
        timestamps (list, *optional*): Or the seconds of each of their frames; with several videos a list of such lists.
    """

    max_frames: int | None
    decoder: str | None
    video_fps: Any
    timestamps: Any


class D2VLMVideoProcessor(VideoProcessorMixin, PilBackend):
    """Samples, resizes, crops and normalises videos for D2VLM; needs no torchvision.

    Frames of all videos are packed one after the other, so that no work is spent on padding.

    Args:
        fps (`float`, *optional*, defaults to 1.0): Frames per second to sample.
        max_frames (`int`, *optional*, defaults to 512): Longer videos give this many frames, evenly spaced.
        size (`dict`, *optional*, defaults to `{"shortest_edge": 224}`): The shorter side goes to this many pixels and
            the longer to `int(size * longer / shorter)`; or `{"height": ..., "width": ...}`.
        crop_size (`dict`, *optional*, defaults to 224 x 224): The centre that is kept.
        do_resize, do_center_crop, do_rescale, do_normalize (`bool`, *optional*, default to `True`): The steps to take.
        rescale_factor (`float`, *optional*, defaults to 1/255): What grey levels are multiplied with.
        image_mean, image_std (sequence of 3 floats, *optional*): CLIP's by default.
        do_sample_frames (`bool`, *optional*, defaults to `True`): `False` takes every frame.
        decoder (`str`, *optional*): `"torchcodec"` or `"pyav"`; by default torchcodec wherever it works.
    """

    valid_kwargs = D2VLMVideosKwargs
    model_input_names = ["pixel_values_videos", "num_frames"]

    fps = DEFAULT_FPS
    max_frames = DEFAULT_MAX_FRAMES
    decoder = None
    do_sample_frames = True
    do_resize = True
    size = {"shortest_edge": 224}
    default_to_square = False
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    _unsupported = ("num_frames", "video_metadata", "resample", "do_pad", "data_format", "input_data_format")

    def __init__(self, **kwargs: Unpack[D2VLMVideosKwargs]) -> None:
        self._check(kwargs)
        super().__init__(**kwargs)

    def _check(self, options: dict[str, Any]) -> None:
        """Our own messages, before transformers' validation."""
        _check_rate("fps", options.get("fps"))
        _check_max_frames(options.get("max_frames"))
        for key in self._unsupported:
            if options.get(key) is not None:
                raise ValueError(
                    f"{key}={options[key]!r} is not an option of {type(self).__name__}: it samples by time and resizes "
                    "in one way only. Use fps and max_frames, video_fps or timestamps, size and crop_size."
                )

    def preprocess(self, videos: Any, **kwargs: Unpack[D2VLMVideosKwargs]) -> BatchFeature:
        """Turn videos into what the model takes.

        Args:
            videos (`Any`): One video, or a list of them (nested lists are flattened), each as in `sample_video`.
            kwargs: Any option of this class, for this call only; besides `video_fps` or `timestamps` for videos given
                as frames, `return_tensors` (`"pt"` or `"np"`), `device`, `return_metadata`.

        Returns:
            `BatchFeature`: `pixel_values_videos`, the frames of all videos after each other, `(sum of T, 3, h, w)`
            float32; `num_frames (videos,)` int64; with `return_metadata` also `video_metadata`, per video a dict of
            `timestamps` (`(T,)` float64, seconds), `fps` (effective), `duration` (seconds), `decoder` and
            `skipped_packets`.

        Raises:
            ValueError: If a video cannot be read or an option makes no sense.
        """
        self._check(kwargs)
        unknown = sorted(set(kwargs) - set(self.valid_kwargs.__annotations__))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} is no option of {type(self).__name__} and would do nothing. The options are "
                f"{', '.join(sorted(set(self.valid_kwargs.__annotations__) - set(self._unsupported)))}."
            )
        validate_typed_dict(self.valid_kwargs, kwargs)
        options = {key: getattr(self, key, None) for key in self.valid_kwargs.__annotations__}
        options = self._standardize_kwargs(**options | {k: v for k, v in kwargs.items() if v is not None})
        sources = flatten_videos(videos)
        if not sources:
            raise ValueError("No video was given: the list of videos is empty. Give one or more.")
        sampled = self._sample_all(sources, options)
        data = {
            "pixel_values_videos": pack_frames(
                [video.frames for video in sampled],
                options["rescale_factor"] if options["do_rescale"] else None,
                (options["image_mean"], options["image_std"]) if options["do_normalize"] else None,
                options["device"],
            ),
            "num_frames": torch.tensor([len(video.times) for video in sampled]),
        }
        if options["return_metadata"]:
            data["video_metadata"] = [
                {
                    "timestamps": video.times,
                    "fps": video.fps,
                    "duration": video.duration,
                    "decoder": video.decoder,
                    "skipped_packets": video.skipped,
                }
                for video in sampled
            ]
        return BatchFeature(data, tensor_type=options["return_tensors"], skip_tensor_conversion=["video_metadata"])

    def _sample_all(self, sources: list[Any], options: dict[str, Any]) -> list[SampledVideo]:
        """Decode all videos, several at once, with no more threads than torch itself would use."""
        budget = torch.get_num_threads()
        workers = min(len(sources), budget)
        sample = partial(
            sample_video,
            fps=options["fps"] if options["do_sample_frames"] else None,
            max_frames=options["max_frames"],
            decoder=options["decoder"],
            num_threads=budget // workers,
            frame_transform=partial(self._shrink, options=options),
        )
        video_fps = _per_video("video_fps", options["video_fps"], len(sources))
        timestamps = _per_video("timestamps", options["timestamps"], len(sources))
        jobs = [
            partial(sample, source, video_fps=rate, timestamps=times)
            for source, rate, times in zip(sources, video_fps, timestamps, strict=True)
        ]
        if workers == 1:
            return [job() for job in jobs]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda job: job(), jobs))

    @staticmethod
    def _shrink(frames: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Resize and crop a chunk, `(t, 3, H, W)` uint8 to `(t, 3, h, w)` uint8."""
        if options["do_resize"]:
            frames = resize_frames(frames, *resized_size(*frames.shape[-2:], options["size"]))
        if options["do_center_crop"]:
            frames = center_crop_frames(frames, options["crop_size"].height, options["crop_size"].width)
        return frames.contiguous()  # a view would keep the whole chunk in memory


def _per_video(name: str, value: Any, count: int) -> list[Any]:
    """One value per video: `video_fps` may be a number for all, `timestamps` the list for the only video."""
    flat = value is None or np.ndim(value[0] if name == "timestamps" and len(value) else value) == 0
    if name == "timestamps" and value is not None and flat and count == 1 and value[0] is not None:
        return [value]
    if value is None or (name == "video_fps" and flat):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries for {count} video(s): each video has its own. Give a list with one entry "
            "per video, None for those that are files."
        )
    return list(value)


__all__ = [
    "D2VLMVideoProcessor",
    "D2VLMVideosKwargs",
    "SampledVideo",
    "flatten_videos",
    "frame_period",
    "sample_video",
]
