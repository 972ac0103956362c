# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Frames to pixel values with torch alone: resize, centre crop, rescale, normalise, pack."""

from collections.abc import Sequence

import torch
from transformers.image_utils import SizeDict


RESIZE_BYTES = 2**20  # frames resized in one call; small enough to stay in the processor's cache


def resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Size after resizing; with `shortest_edge` the aspect ratio is kept and the longer side rounded down.

    Args:
        height, width (`int`): The size now, in pixels.
        size (`SizeDict`): `shortest_edge`, or `height` and `width`.

    Returns:
        `(height, width)` in pixels.

    Raises:
        ValueError: If `size` holds neither.
    """
    if size.shortest_edge:
        short, long = sorted((height, width))
        longer = int(size.shortest_edge * long / short)
        return (size.shortest_edge, longer) if height <= width else (longer, size.shortest_edge)
    if size.height and size.width:
        return size.height, size.width
    raise ValueError(
        f"size={dict(size)} cannot be resized to: it says neither how long the shorter side is nor both sides. Give "
        '{"shortest_edge": 224} or {"height": 224, "width": 224}.'
    )


def resize_frames(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize with antialiased bilinear interpolation, in float32, rounded to the nearest grey level (half to even).

    This is torchvision's resize of a uint8 tensor (`antialias=True`); PIL's differs by one grey level at most.

    Args:
        frames (`torch.Tensor` of shape `(T, 3, H, W)`, uint8): The frames.
        height, width (`int`): The new size in pixels.

    Returns:
        `torch.Tensor` of shape `(T, 3, height, width)`, uint8.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    resized = frames.new_empty((len(frames), 3, height, width))
    size = max(1, RESIZE_BYTES // frames[0].numel())
    for source, target in zip(frames.split(size), resized.split(size), strict=True):
        floats = torch.nn.functional.interpolate(
            source.to(torch.float32, memory_format=torch.contiguous_format),  # 1.7 times as fast as channels last
            size=(height, width),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        target.copy_(floats.round_().clamp_(0, 255))
    return resized


def center_crop_frames(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cut out the middle; an odd rest is split as torchvision does it (half to even).

    Args:
        frames (`torch.Tensor` of shape `(T, 3, H, W)`): The frames.
        height, width (`int`): The size of the middle in pixels.

    Returns:
        `torch.Tensor` of shape `(T, 3, height, width)`.

    Raises:
        ValueError: If the frames are smaller than that.
    """
    top, left = round((frames.shape[-2] - height) / 2), round((frames.shape[-1] - width) / 2)
    if top < 0 or left < 0:
        raise ValueError(
            f"crop_size {height} x {width} is larger than the frames, which are {frames.shape[-2]} x "
            f"{frames.shape[-1]} (height x width): nothing fills the rest. Lower crop_size or raise size."
        )
    return frames[..., top : top + height, left : left + width]


def pack_frames(
    videos: Sequence[torch.Tensor],
    rescale_factor: float | None,
    mean_std: tuple[Sequence[float], Sequence[float]] | None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """Rescale, normalise and lay the frames of all videos one after the other.

    Args:
        videos (sequence of `torch.Tensor` of shape `(T_i, 3, h, w)`, uint8): The videos.
        rescale_factor (`float`, *optional*): What grey levels are multiplied with.
        mean_std (pair of sequences of 3 floats, *optional*): Subtracted and divided by, per colour.
        device (`str` or `torch.device`, *optional*): Where to do it.

    Returns:
        `torch.Tensor` of shape `(sum of T_i, 3, h, w)`, float32.

    Raises:
        ValueError: If the frames have different sizes.
    """
    sizes = sorted({tuple(frames.shape[-2:]) for frames in videos})
    if len(sizes) > 1:
        raise ValueError(
            f"The videos have frames of {len(sizes)} sizes, {sizes} (height x width), and cannot be packed into one "
            "tensor. Switch do_resize and do_center_crop on, or process them one by one."
        )
    counts = [len(frames) for frames in videos]
    packed = torch.empty(sum(counts), 3, *sizes[0], device=device)
    for part, frames in zip(packed.split(counts), videos, strict=True):
        part.copy_(frames)
    if rescale_factor is not None:
        packed.mul_(rescale_factor)
    if mean_std is not None:
        mean, std = (packed.new_tensor(values).view(-1, 1, 1) for values in mean_std)
        packed.sub_(mean).div_(std)
    return packed


__all__ = ["center_crop_frames", "pack_frames", "resize_frames", "resized_size"]
