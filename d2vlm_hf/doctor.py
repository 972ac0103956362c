# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What works on this machine and what would add the rest: the checks behind `d2vlm doctor`.

The versions wanted are read from the installed package's own requirements, so they stand in setup.cfg alone.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement

from .bundled import bundled_clip


_DISTRIBUTION = "d2vlm-hf"
_DECODERS = ("torchcodec", "av")  # either one is enough, and whether they work is shown by decoding
_EXTRAS = {"train": "training", "eval": "text metrics and figures", "demo": "the web demo"}
# What an extension module raises that was built for another torch, CUDA or FFmpeg, or cannot read the file.
_LOAD_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, ValueError)


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name (`str`):
            What was looked at.
        status (`Literal["ok", "missing", "broken"]`):
            `"broken"` is installed but of the wrong version or not working.
        detail (`str`):
            What was found: version, device, or the error in one line.
        remedy (`str`, *optional*, defaults to `""`):
            What to do about it; empty where nothing needs doing.
        required (`bool`, *optional*, defaults to `True`):
            Whether the package cannot do its work without it.
    """

    name: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    remedy: str = ""
    required: bool = True


def _one_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _check_requirement(requirement: Requirement, extra: str | None = None) -> Check:
    """Whether a distribution is installed in a version that the package accepts."""
    name, wanted = requirement.name, str(requirement.specifier) or "any version"
    install = f"pip install '{_DISTRIBUTION}[{extra}]'" if extra else f"pip install '{name}{requirement.specifier}'"
    use = f" (for {_EXTRAS[extra]})" if extra else ""
    required = extra is None and name not in _DECODERS
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "missing", f"not installed, wanted {wanted}{use}", install, required)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, "broken", f"{found}, wanted {wanted}{use}", install, required)
    return Check(name, "ok", f"{found}{use}", required=required)


def _check_requirements() -> Iterator[Check]:
    """One check per direct dependency, then per dependency of an optional extra."""
    try:
        requirements = [Requirement(line) for line in metadata.requires(_DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        remedy = "install the package, in a checkout with: pip install -e ."
        yield Check(_DISTRIBUTION, "broken", "imported from a folder without being installed", remedy)
        return
    seen = set()
    for extra in (None, *_EXTRAS):
        for requirement in requirements:
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra or ""})
            if applies and requirement.name not in seen:
                seen.add(requirement.name)
                yield _check_requirement(requirement, extra)


def _check_device() -> Check:
    """The device that a model would run on."""
    try:
        import torch

        if torch.cuda.is_available():
            index = torch.cuda.current_device()
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            return Check("device", "ok", f"cuda:{index}, {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
        if torch.backends.mps.is_available():
            return Check("device", "ok", "mps")
        return Check("device", "ok", f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    except _LOAD_ERRORS as error:
        return Check("device", "broken", _one_line(error), "reinstall torch for this machine")


def _decode_with_torchcodec(clip: str) -> int:
    """Decodes the whole clip in the mode the package uses and returns the number of frames."""
    from torchcodec.decoders import VideoDecoder

    return len(VideoDecoder(clip, seek_mode="exact").get_all_frames().data)


def _decode_with_pyav(clip: str) -> int:
    """Decodes the whole clip to RGB and returns the number of frames."""
    import av

    try:
        with av.open(clip) as container:
            return sum(frame.to_ndarray(format="rgb24").size > 0 for frame in container.decode(video=0))
    except av.error.FFmpegError as error:
        raise RuntimeError(f"PyAV cannot decode {clip}: {error}; see whether another player can.") from error


def _check_decoder(name: str, decode: Callable[[str], int], clip: str, remedy: str) -> Check:
    """Whether a decoder loads and turns a real file into frames; whatever it raises becomes the report."""
    label = f"{name} decodes"
    if not os.path.isfile(clip):
        remedy = f"reinstall {_DISTRIBUTION}, or name a video file that exists"
        return Check(label, "broken", f"{clip} is not there to be decoded", remedy, required=False)
    try:
        frames = decode(clip)
    except ModuleNotFoundError as error:
        return Check(label, "missing", _one_line(error), remedy, required=False)
    except _LOAD_ERRORS as error:
        return Check(label, "broken", _one_line(error), remedy, required=False)
    if frames == 0:
        return Check(label, "broken", f"no frame came out of {clip}", remedy, required=False)
    return Check(label, "ok", f"{frames} frames of {os.path.basename(clip)}", required=False)


def _check_ffmpeg() -> Check:
    """The system's FFmpeg, whose libraries torchcodec loads; PyAV brings its own."""
    remedy = "install FFmpeg 4 to 8 with the system's package manager to use torchcodec; PyAV works without"
    executable = shutil.which("ffmpeg")
    if executable is None:
        return Check("ffmpeg", "missing", "not on the path", remedy, required=False)
    try:
        run = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("ffmpeg", "broken", _one_line(error), remedy, required=False)
    return Check("ffmpeg", "ok", run.stdout.partition(" Copyright")[0].strip(), required=False)


def _check_any_decoder(decoders: list[Check]) -> Check:
    """Which decoder a video will be read with: torchcodec where it works, else PyAV."""
    working = [check.name.split()[0] for check in decoders if check.status == "ok"]
    if working:
        return Check("video", "ok", f"read with {working[0]}")
    return Check(
        "video", "broken", "no decoder works, so no video file can be read", "pip install --force-reinstall av"
    )


def diagnose(clip: str | None = None) -> list[Check]:
    """Looks at everything the package stands on; reports whatever is missing or broken and raises for none of it.

    Args:
        clip (`str`, *optional*):
            Video file that both decoders are made to decode, by default the clip that ships with the package.

    Returns:
        `list[Check]`: Python, device, dependencies, extras, FFmpeg and the two decoders, in reading order.
    """
    clip = bundled_clip() if clip is None else clip
    codec_remedy = (
        "torchcodec needs FFmpeg's libraries and a build that fits torch: with a CPU build of torch use torchcodec "
        "0.13, with a CUDA build a later one; PyAV is used meanwhile"
    )
    decoders = [
        _check_decoder("torchcodec", _decode_with_torchcodec, clip, codec_remedy),
        _check_decoder("PyAV", _decode_with_pyav, clip, "pip install --force-reinstall av"),
    ]
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        _check_device(),
        *_check_requirements(),
        _check_ffmpeg(),
        *decoders,
        _check_any_decoder(decoders),
    ]


__all__ = ["Check", "diagnose"]
