# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the shapes world: frames of a scene at any size and any times, and real H.264 files of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .shapes_world import (
    BACKGROUND_LEVEL,
    COLOURS,
    DIFFICULTIES,
    FLASH_SECONDS,
    GROW_FACTOR,
    MOVES,
    SHAKE_HERTZ,
    SHRINK_FACTOR,
    Scene,
)


DEFAULT_SIZE = 128
# the two looks of a flashing object: white, and its own colour at this share of its light
WHITE = (255, 255, 255)
DARK_SHARE = 0.55
GRAIN = 64  # the noise has this many grains across the canvas at any size, so that small frames look alike
NOISE_TILE = 96
NOISE_WINDOWS = 997
SHEET_PAPER, SHEET_INK, SHEET_LINE_COLOUR = (250, 250, 250), (20, 20, 20), (190, 190, 190)
SHEET_FONT, SHEET_LINE = 15, 20  # pixels
# one thread and no B-frames: with them x264 does not give the same bytes every time
CODEC_OPTIONS = {"preset": "veryfast", "crf": "23", "threads": "1", "g": "16", "bf": "0"}


def object_states(scene: Scene, times: np.ndarray) -> dict[str, np.ndarray]:
    """Return where and how every object is at given times: the ground truth that the renderer draws.

    Args:
        scene (`Scene`):
            The scene.
        times (`np.ndarray` of shape `(T,)`):
            Seconds.

    Returns:
        `dict`: `centre` (O, T, 2) and `radius` (O, T) in canvases, `visible` (O, T) bool, and `flash` (O, T) int8:
        0 as usual, 1 white and 2 dark: the looks of a flashing object, which alternate every half second.
    """
    times = np.asarray(times, dtype=float)
    shape = (len(scene.objects), len(times))
    centre = np.repeat(np.array([thing.start for thing in scene.objects])[:, None], len(times), 1)
    radius = np.repeat(np.array([thing.radius for thing in scene.objects])[:, None], len(times), 1)
    visible, flash = np.ones(shape, dtype=bool), np.zeros(shape, dtype=np.int8)
    visible[[event.actor for event in scene.events if event.kind == "appear"]] = False
    for event in scene.events:
        actor, inside = event.actor, (times >= event.start) & (times <= event.end)
        if event.kind in MOVES:
            share = ((times - event.start) / (event.end - event.start)).clip(0, 1)
            centre[actor] += share[:, None] * np.array(event.shift)
        elif event.kind == "appear":
            visible[actor] |= inside
        elif event.kind == "flash":
            flash[actor, inside] = 1 + np.floor((times[inside] - event.start) / FLASH_SECONDS) % 2
        else:
            radius[actor, inside] *= GROW_FACTOR if event.kind == "grow" else SHRINK_FACTOR
    return {"centre": centre, "radius": radius, "visible": visible, "flash": flash}


def render_frames(scene: Scene, times: np.ndarray | None = None, size: int | None = None) -> np.ndarray:
    """Draw frames of a scene.

    Args:
        scene (`Scene`):
            The scene.
        times (`np.ndarray` of shape `(T,)`, *optional*):
            Seconds of the frames, by default those of the file.
        size (`int`, *optional*, defaults to 128):
            Height and width in pixels.

    Returns:
        `np.ndarray`: (T, size, size, 3) uint8 RGB, the same for the same arguments.

    Raises:
        ValueError: If the size is below 16 pixels, where shapes cannot be told apart.
    """
    size = DEFAULT_SIZE if size is None else size
    if size < 16:
        raise ValueError(f"size={size} is too small to draw shapes: their outlines vanish. Use 16 pixels or more.")
    times = scene.times if times is None else np.asarray(times, dtype=float)
    level = DIFFICULTIES[scene.difficulty]
    rng = np.random.default_rng(scene.texture_seed)
    frames = np.repeat(_background(rng, level.background, size)[None], len(times), 0)  # (T, size, size, 3)
    shake = _shake(rng, level.shake, times)  # (T, 2)
    for shape, grey, radius, x, y in scene.distractors:
        _draw(frames, shape, (grey,) * 3, shake + np.array([x, y]), np.full(len(times), radius), None)
    states = object_states(scene, times)
    for actor, thing in enumerate(scene.objects):
        (shown,) = np.nonzero(states["visible"][actor])
        look = {name: states[name][actor, shown] for name in ("centre", "radius", "flash")}
        _draw(
            frames,
            thing.shape,
            COLOURS[thing.colour],
            look["centre"] + shake[shown],
            look["radius"],
            look["flash"],
            shown,
        )
    if level.noise:
        _add_noise(frames, rng, level.noise, scene, times)
    return frames


def _background(rng: np.random.Generator, amplitude: float, size: int) -> np.ndarray:
    """Return the still background, (size, size, 3) uint8: dark, with a slight tint and gradient."""
    tint = rng.uniform(-0.5, 0.5, 3) * amplitude
    slope = rng.uniform(-1, 1, (2, 3)) * amplitude
    place = (np.arange(size) + 0.5) / size - 0.5
    picture = BACKGROUND_LEVEL + tint + place[:, None, None] * slope[0] + place[None, :, None] * slope[1]
    return np.rint(picture.clip(0, 255)).astype(np.uint8)


def _shake(rng: np.random.Generator, amplitude: float, times: np.ndarray) -> np.ndarray:
    """Return the camera's offset at each time, (T, 2) canvases: two sines per axis."""
    hertz, phase = rng.uniform(*SHAKE_HERTZ, (2, 2)), rng.uniform(0, 2 * np.pi, (2, 2))
    return amplitude / 2 * np.sin(2 * np.pi * hertz * times[:, None, None] + phase).sum(1)


def _add_noise(frames: np.ndarray, rng: np.random.Generator, deviation: float, scene: Scene, times: np.ndarray) -> None:
    """Add grey noise in place: windows of one tile, chosen by time, so that any subset looks the same."""
    tile = np.rint(rng.normal(0, deviation, (NOISE_TILE, NOISE_TILE))).clip(-127, 127).astype(np.int16)
    corner = rng.integers(NOISE_TILE - GRAIN, size=(997, 2))[
        np.rint(times * scene.file_fps).astype(int) % 997
    ]  # (T, 2)
    size = frames.shape[1]
    grain = np.arange(size) * GRAIN // size
    for frame, (top, left) in zip(frames, corner, strict=True):
        noise = tile[top + grain][:, left + grain]
        np.add(frame, noise[:, :, None], out=(total := np.empty(frame.shape, np.int16)), casting="unsafe")
        np.clip(total, 0, 255, out=total)
        frame[:] = total


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape, negative inside; all in pixels, y downwards."""
    if shape == "circle":
        return np.hypot(x, y) - radius * 0.92
    if shape == "ring":
        return np.abs(np.hypot(x, y) - radius * 0.72) - radius * 0.24
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * 0.82
    if shape == "cross":
        wide, narrow = radius, radius * 0.34
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - wide, y - narrow), np.maximum(x - narrow, y - wide))
    if shape == "triangle":
        y = y - radius * 0.2
        return np.maximum(y - radius * 0.6, np.abs(x) * 0.8944 - y * 0.4472 - radius * 0.5367)
    # star: fold the plane into half of one of its five points, then the straight line from tip to notch
    angle = np.arctan2(x, -y)
    angle = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    length = np.hypot(x, y)
    along, across = length * np.cos(angle), length * np.sin(angle)
    tip, notch = radius * 1.12, radius * 0.48
    notch_along, notch_across = notch * np.cos(np.pi / 5), notch * np.sin(np.pi / 5)
    edge = np.hypot(notch_across, tip - notch_along)
    return ((along - tip) * notch_across + across * (tip - notch_along)) / edge


def _draw(
    frames: np.ndarray,
    shape: str,
    colour: tuple[int, int, int],
    centre: np.ndarray,
    radius: np.ndarray,
    flash: np.ndarray | None,
    shown: np.ndarray | None = None,
) -> None:
    """Draw one object into many frames in place, antialiased; only the patch around it is computed.

    Args:
        frames: (T, size, size, 3) uint8.
        shape: Name of the shape.
        colour: Its RGB.
        centre: (S, 2) canvases, where it is in the frames it is drawn into.
        radius: (S,) canvases.
        flash: (S,) looks of a flashing object, or None.
        shown: (S,) indices of the frames it is drawn into, None for all.
    """
    shown = np.arange(len(frames)) if shown is None else shown
    if not len(shown):
        return
    size = frames.shape[1]
    centre, radius = centre * size, radius * size
    half = int(np.ceil(radius.max() * 1.15)) + 1
    # equal looks are computed once: an object mostly stands still
    flash = np.zeros(len(shown)) if flash is None else flash
    looks, which = np.unique(np.column_stack([centre, radius, flash]), axis=0, return_inverse=True)  # (U, 4)
    corner = np.floor(looks[:, :2]).astype(int) - half
    patch = np.arange(2 * half + 1)
    x = (corner[:, 0, None] + patch + 0.5 - looks[:, 0, None])[:, None, :]  # (U, 1, P)
    y = (corner[:, 1, None] + patch + 0.5 - looks[:, 1, None])[:, :, None]  # (U, P, 1)
    distance = np.broadcast_to(_distance(shape, x, y, looks[:, 2, None, None]), (len(looks), len(patch), len(patch)))
    cover = (0.5 - distance).clip(0, 1)[..., None]  # (U, P, P, 1)
    paint = np.array([colour, WHITE, np.multiply(colour, DARK_SHARE)])[looks[which, 3].astype(int)][:, None, None]
    rows, columns = corner[which, 1, None] + patch, corner[which, 0, None] + patch  # (S, P)
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    cover = cover[which] * inside[..., None]
    index = shown[:, None, None], rows.clip(0, size - 1)[:, :, None], columns.clip(0, size - 1)[:, None, :]
    behind = frames[index]
    blended = np.rint(behind + cover * (paint - behind)).astype(np.uint8)
    where = np.broadcast_to(inside, cover.shape[:-1])
    frames[tuple(np.broadcast_to(part, where.shape)[where] for part in index)] = blended[where]


def write_video(scene: Scene, path: str | os.PathLike, size: int | None = None) -> Path:
    """Write a scene as an H.264 file (yuv420p, MP4, index first), the same bytes every time.

    Args:
        scene (`Scene`):
            The scene.
        path (`str` or `os.PathLike`):
            The file. It is written under another name and renamed, so a half-written one never looks complete.
        size (`int`, *optional*, defaults to 128):
            Height and width in pixels, an even number.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the size is odd or too small.
    """
    return write_frames(render_frames(scene, size=size), scene.file_fps, path)


def write_frames(frames: np.ndarray, fps: int, path: str | os.PathLike) -> Path:
    """Write frames as an H.264 file; see [`write_video`].

    Args:
        frames (`np.ndarray` of shape `(T, height, width, 3)`):
            uint8 RGB.
        fps (`int`):
            Frames per second.
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If there is no frame, or height or width is odd.
    """
    import av

    path = Path(path)
    height, width = frames.shape[1:3]
    if not len(frames):
        raise ValueError(f"{path} would be a video of 0 frames, which no player opens. Give at least one frame.")
    if height % 2 or width % 2:
        raise ValueError(f"Frames of {width}x{height} pixels are not yuv420p, which halves both. Use even sizes.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=fps, options=CODEC_OPTIONS)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, fps)
            for number, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def contact_sheet(
    video: Scene | str | os.PathLike, rows: Sequence[Mapping[str, Any]], path: str | os.PathLike, num_frames: int = 12
) -> Path:
    """Draw a picture to look at: frames with their times, what every object does when, and the rows with their spans.

    Args:
        video (`Scene`, `str` or `os.PathLike`):
            A scene, or a video file (then without the lines of the objects).
        rows (`Sequence[Mapping]`):
            Rows of the schema about this video.
        path (`str` or `os.PathLike`):
            The PNG file.
        num_frames (`int`, *optional*, defaults to 12):
            Frames shown.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If the video file holds no picture.
    """
    scene = video if isinstance(video, Scene) else None
    if scene is None:
        frames, times, duration = _read_frames(video)
        shown = np.linspace(0, len(frames) - 1, num_frames).round().astype(int)
        frames, times = frames[shown], times[shown]
    else:
        duration = scene.duration
        times = scene.times[np.linspace(0, scene.num_frames - 1, num_frames).round().astype(int)]
        frames = render_frames(scene, times)
    lanes = []  # (text, colour, spans, weak spans)
    for actor, thing in enumerate(scene.objects if scene else ()):
        for event in scene.events:
            if event.actor == actor:
                lanes.append((f"{thing.colour} {thing.shape} {event.kind}", COLOURS[thing.colour], [event.span], []))
    for row in rows:
        name = "/".join([row["task"], *row["source"].split("/")[2:]])
        for text, spans, given in (
            (f"{name}: {row['question']}", [], row["question_spans"]),
            (f"      {row['answer']}", row["spans"], []),
        ):
            lanes.append((text, SHEET_INK, spans, given))
    return _draw_sheet(frames, times, duration, lanes, Path(path))


def _draw_sheet(frames: np.ndarray, times: np.ndarray, duration: float, lanes: list[tuple], path: Path) -> Path:
    """Draw the frames in one strip and a lane below for every (text, colour, spans, given spans)."""
    from PIL import Image, ImageDraw, ImageFont

    count, height, width = frames.shape[:3]
    total = count * width
    sheet = Image.new("RGB", (total, height + SHEET_LINE + 2 * SHEET_LINE * len(lanes) + 4), SHEET_PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=SHEET_FONT)
    for place, (frame, time) in enumerate(zip(frames, times, strict=True)):
        sheet.paste(Image.fromarray(frame), (place * width, 0))
        draw.text((place * width + 4, height + 2), f"{time:.2f} s", SHEET_INK, font)
    for number, (text, colour, spans, given) in enumerate(lanes):
        top = height + SHEET_LINE + 2 * SHEET_LINE * number
        draw.text((4, top), text, SHEET_INK, font)
        bar = top + SHEET_LINE + 4, top + 2 * SHEET_LINE - 6
        draw.line((0, bar[1] + 2, total, bar[1] + 2), SHEET_LINE_COLOUR)
        half = (bar[1] - bar[0]) // 2
        for place, ((start, end), filled) in enumerate([*((s, True) for s in spans), *((s, False) for s in given)]):
            low = bar[0] + half * (place % 2)  # neighbours lie a step apart, so that overlaps show
            box = start / duration * total, low, end / duration * total, low + half
            draw.rectangle(box, fill=colour if filled else None, outline=SHEET_INK)
            draw.text((box[2] + 4, bar[0] - 3), f"{start:g} - {end:g}", SHEET_INK, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _read_frames(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, float]:
    """Read all frames of a small file: (T, height, width, 3) uint8, (T,) seconds, and its length in seconds."""
    import av

    with av.open(str(path)) as container:
        streams = container.streams.video[:1]
        decoded = (
            [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(streams)] if streams else []
        )
    if not decoded:
        raise ValueError(f"{path} holds no picture that can be decoded, so nothing can be shown. Give a video file.")
    times = np.array([time for _, time in decoded])
    period = times[-1] / max(1, len(times) - 1)
    return np.stack([frame for frame, _ in decoded]), times, float(times[-1] + period)


__all__ = ["contact_sheet", "object_states", "render_frames", "write_frames", "write_video"]
