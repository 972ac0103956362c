# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The timeline picture of one answer: frames, spans, similarity curves, and the answer coloured like its spans."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .figure_text import Piece, font_of, measure, wrap


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision, without black and yellow; then they start over, dashed.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
INK, FAINT, TRUTH = "#1a1a1a", "#6b6b6b", "#9a9a9a"
# What a file of each kind must leave out to be the same for the same input.
METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

DPI = 120
TEXT, SMALL = 10.5, 8.5  # points
LINE = 1.6  # height of a line of text, in its font size
# All lengths below are inches.
LEFT, RIGHT, EDGE, GAP = 0.85, 0.25, 0.2, 0.14
THUMB, THUMB_GAP, LANE, CURVES, PAD = 0.8, 0.06, 0.24, 1.35, 0.02
LANES, NUMBERED = 2.4, 0.15  # height of all lanes at most, and of one that has room for a number
LEGEND = 24  # entries at most: a model that repeats itself finds a hundred moments


@dataclass
class _Panel:
    """One strip of the picture: how high it is and what draws it at a distance from the top."""

    height: float
    draw: Any
    gap: float = GAP


@dataclass
class _Sheet:
    """The figure, placed in inches from its top left corner."""

    figure: "Figure"
    width: float
    height: float
    extent: tuple[float, float]
    axes: list = field(default_factory=list)

    def axes_at(self, top: float, height: float) -> "Axes":
        """Axes across the picture with the time of the video on x, without a frame."""
        box = (LEFT, self.height - top - height, self.width - LEFT - RIGHT, height)
        scale = (self.width, self.height, self.width, self.height)
        axes = self.figure.add_axes([value / unit for value, unit in zip(box, scale, strict=True)])
        axes.set_xlim(*self.extent)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL, labelcolor=FAINT)
        axes.patch.set_visible(False)
        return axes

    def write(self, text: str, x: float, top: float, size: float, **style) -> None:
        """Text with the middle of its line at `top`; a dollar sign is a dollar sign."""
        style = {"va": "center_baseline", "color": INK, "parse_math": False, **style}
        self.figure.text(x / self.width, 1 - top / self.height, text, fontsize=size, **style)


def timeline(
    result: Mapping[str, Any],
    frames: Any = None,
    times: Sequence[float] | None = None,
    question: str | None = None,
    truth: Sequence[Sequence[float]] | None = None,
    path: str | os.PathLike | None = None,
    width: float = 10.0,
) -> "Figure":
    """Draw what was found in a video: frame strip, spans, curves and the answer with its moments coloured alike.

    Args:
        result (`dict`):
            One result of the "video-grounding" pipeline: `answer`, `evidence`, `references`, `duration`, and from
            `return_curves=True` also `times (T,)` and `curves (E, T)`, without which no curves are drawn.
        frames (`(N, H, W, 3)` or `(N, 3, H, W)` uint8, *optional*):
            Pictures of the video; as many as fit are shown, evenly spaced in time.
        times (`(N,)` floats, *optional*):
            Their times in seconds, by default `result["times"]`.
        question (`str`, *optional*):
            What was asked, for the title.
        truth (`(K, 2)` floats, *optional*):
            Annotated spans in seconds, drawn in grey.
        path (`str`, *optional*):
            Where to write the picture: `.png`, `.svg` or `.pdf`. A PNG is the same for the same input.
        width (`float`, *optional*, defaults to 10.0):
            Inches; the height follows from what there is to show.

    Returns:
        `matplotlib.figure.Figure`: The picture, free of pyplot's global state.

    Raises:
        ValueError: If parts of the result are missing or do not fit each other, or the path has another ending.
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "matplotlib draws the timeline and is not installed. Run `pip install 'd2vlm-hf[eval]'`, or leave "
            "the figure out."
        ) from error
    _check(result, width, path)
    pictures, seconds = _pictures(result, frames, times)
    truth = [[float(start), float(end)] for start, end in truth] if truth is not None else None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's own style would change the picture
        spans = [(entry["start"], entry["end"]) for entry in result["evidence"]]
        end = max([float(result["duration"]), *(stop for _, stop in spans), *(stop for _, stop in truth or ())])
        panels = _panels(result, pictures, seconds, question, truth, width, (0.0, end))
        height = 2 * EDGE + sum(panel.height + panel.gap for panel in panels) - panels[-1].gap
        sheet = _Sheet(_new_figure(width, height), width, height, (0.0, end))
        top = EDGE
        for panel in panels:
            panel.draw(sheet, top)
            top += panel.height + panel.gap
        if path is not None:
            sheet.figure.savefig(path, metadata=METADATA[Path(path).suffix.lower()])
    return sheet.figure


def _new_figure(width: float, height: float) -> "Figure":
    """A figure that draws its text as wide as it was measured, whoever saves it: hinting would round every letter."""
    import matplotlib
    from matplotlib.figure import Figure

    class Unhinted(Figure):
        def draw(self, renderer):
            with matplotlib.rc_context({"text.hinting": "none"}):
                super().draw(renderer)

    return Unhinted((width, height), dpi=DPI, facecolor="white")


def check_path(path: str | os.PathLike) -> None:
    """Raise if [`timeline`] could not write to a path; to be asked before the work is done.

    Raises:
        ValueError: If the ending is none of those known, or there is no such folder.
    """
    path = Path(path)
    if path.suffix.lower() not in METADATA:
        raise ValueError(f"the figure {path} has no ending that says its format. Use one of {', '.join(METADATA)}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(
            f"the figure cannot be written to {path}: it is a folder, or lies in none. Name a file in one."
        )


def _check(result: Mapping[str, Any], width: float, path: str | os.PathLike | None) -> None:
    missing = [name for name in ("answer", "evidence", "references", "duration") if name not in result]
    if missing:
        raise ValueError(
            f"the result has the keys {sorted(result)} but not {missing}, so it cannot be drawn. Pass one result of "
            "the pipeline as it is."
        )
    curves, frame_times = result.get("curves"), result.get("times")
    if curves is not None:
        shapes = [len(curve) for curve in curves]
        if len(curves) != len(result["evidence"]) or frame_times is None or set(shapes) - {len(frame_times)}:
            raise ValueError(
                f"the result has curves of lengths {shapes} for {len(result['evidence'])} pieces of evidence and "
                f"{0 if frame_times is None else len(frame_times)} times: each piece needs one value per time. Pass "
                "the result as it is."
            )
    if not result["duration"] > 0:
        raise ValueError(f"duration={result['duration']} of the result is no length of a video. Give seconds above 0.")
    if not width >= 4:
        raise ValueError(f"width={width} leaves no room for text: it is in inches. Use 4 or more.")
    if path is not None:
        check_path(path)


def _pictures(result: Mapping[str, Any], frames: Any, times: Any) -> tuple[np.ndarray, np.ndarray]:
    """Frames as `(N, H, W, 3)` uint8 and their times `(N,)`; both empty without frames."""
    if frames is None:
        return np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
    pictures = np.asarray(frames)
    if pictures.ndim == 4 and pictures.shape[1] == 3 and pictures.shape[3] != 3:
        pictures = pictures.transpose(0, 2, 3, 1)
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise ValueError(
            f"frames has shape {np.shape(frames)} and dtype {pictures.dtype}, so it is no list of colour pictures. "
            "Give (N, H, W, 3) or (N, 3, H, W) uint8."
        )
    seconds = np.asarray(result.get("times", ()) if times is None else times, dtype=np.float64)
    if seconds.shape != (len(pictures),):
        raise ValueError(
            f"{len(pictures)} frames came with times of shape {seconds.shape}: each frame needs one, in seconds. Pass "
            "times."
        )
    return pictures, seconds


def _panels(
    result: Mapping[str, Any],
    pictures: np.ndarray,
    seconds: np.ndarray,
    question: str | None,
    truth: list[list[float]] | None,
    width: float,
    extent: tuple[float, float],
) -> list[_Panel]:
    """What the picture is made of, from top to bottom."""
    evidence, room = result["evidence"], width - LEFT - RIGHT
    panels = []
    if question:
        panels.append(_text_panel("Question", [(question, None)], room, weight="bold"))
    if len(pictures):
        panels.append(_strip_panel(pictures, seconds, room, extent))
    if truth is not None:
        panels.append(_lanes_panel("Annotated", truth, None, extent, room, "no event annotated"))
        panels[-1].gap = GAP / 2
    spans = [(entry["start"], entry["end"]) for entry in evidence]
    scores = [entry["score"] for entry in evidence]
    panels.append(_lanes_panel("Found", spans, scores, extent, room, "no moment of the video was found"))
    curves = result.get("curves")
    panels[-1].gap = GAP / 2
    panels.append(_curves_panel(spans, result["times"], curves) if curves else _axis_panel())
    legend: list[Piece] = [(_describe(k, entry), k) for k, entry in enumerate(evidence[:LEGEND])]
    if len(evidence) > LEGEND:
        legend.append((f"and {len(evidence) - LEGEND} more", -1))
    if legend:
        spaced = [piece for entry in legend for piece in (entry, (" ", None))]
        panels.append(_text_panel("Evidence", spaced, room, SMALL, space="    "))
    panels.append(_text_panel("Answer", _answer_pieces(result), room))
    return panels


def _describe(number: int, entry: Mapping[str, Any]) -> str:
    return f"{number + 1}: {entry['start']:.1f}s - {entry['end']:.1f}s, score {entry['score']:.2f}"


def _answer_pieces(result: Mapping[str, Any]) -> list[Piece]:
    """The answer in pieces, each reference with the number of its event; -1 where it refers to none that is shown."""
    answer, pieces, position = result["answer"], [], 0
    for reference in sorted(result["references"], key=lambda reference: reference["char_start"]):
        start, end, event = reference["char_start"], reference["char_end"], reference["evidence"]
        pieces += [(answer[position:start], None), (answer[start:end], -1 if event is None else event)]
        position = end
    pieces.append((answer[position:], None))
    return pieces if answer.strip() else [("(the answer is empty)", None)]


# ---- text ------------------------------------------------------------------------------------------------------------


def _text_panel(
    label: str, pieces: Sequence[Piece], room: float, size: float = TEXT, weight: str = "normal", space: str = " "
) -> _Panel:
    """A label in the margin and wrapped text beside it; coloured pieces lie on a patch of their colour."""
    from matplotlib.patches import FancyBboxPatch

    lines, step = wrap(pieces, room, font_of(size, weight), space), LINE * size / 72

    def draw(sheet: _Sheet, top: float) -> None:
        sheet.write(label, LEFT - 0.1, top + step / 2, SMALL, ha="right", color=FAINT)
        for number, line in enumerate(lines):
            middle = top + (number + 0.5) * step
            for run in line:
                x = LEFT + run.x
                if run.event is not None:
                    patch = FancyBboxPatch(
                        ((x - PAD) / sheet.width, 1 - (middle + 0.4 * step) / sheet.height),
                        (run.width + 2 * PAD) / sheet.width,
                        0.8 * step / sheet.height,
                        boxstyle="square,pad=0",
                        facecolor=_colour(run.event),
                        alpha=0.4,
                        linewidth=0,
                        gid=f"reference-{run.event}",
                    )
                    sheet.figure.add_artist(patch)
                sheet.write(run.text, x, middle, size, weight=weight, ha="left")

    return _Panel(len(lines) * step, draw)


# ---- pictures, bars, curves ------------------------------------------------------------------------------------------


def _colour(event: int) -> str:
    return TRUTH if event < 0 else PALETTE[event % len(PALETTE)]


def _is_dark(colour: str) -> bool:
    """Whether white is easier to read on a colour than ink: by its weighted brightness."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 100


def _strip_panel(pictures: np.ndarray, seconds: np.ndarray, room: float, extent: tuple[float, float]) -> _Panel:
    """As many pictures as fit side by side, each the one on screen in the middle of its share of the time."""
    aspect = float(np.clip(pictures.shape[2] / pictures.shape[1], 0.4, 3.0))
    count = max(1, min(len(pictures), int((room + THUMB_GAP) / (THUMB * aspect + THUMB_GAP))))
    middles = extent[0] + (np.arange(count) + 0.5) * (extent[1] - extent[0]) / count
    order = np.argsort(seconds, kind="stable")
    shown = order[np.clip(np.searchsorted(seconds[order], middles, side="right") - 1, 0, None)]
    shown = list(dict.fromkeys(shown.tolist()))
    height = min(THUMB, (room / count - THUMB_GAP) / aspect)

    def draw(sheet: _Sheet, top: float) -> None:
        axes = sheet.axes_at(top, height)
        axes.set(xlim=(0, room), ylim=(0, height), xticks=[], yticks=[], gid="strip")
        share = room / len(shown)
        for place, number in enumerate(shown):
            middle = (place + 0.5) * share
            half = height * aspect / 2
            axes.imshow(pictures[number], extent=(middle - half, middle + half, 0, height), aspect="auto")
            label = f"{seconds[number]:.1f}s"
            sheet.write(label, LEFT + middle, top + height + 0.09, SMALL, ha="center", color=FAINT)
        axes.set(xlim=(0, room), ylim=(0, height))
        sheet.write("Video", LEFT - 0.1, top + height / 2, SMALL, ha="right", color=FAINT)

    return _Panel(height + 0.18, draw)


def _lanes(spans: Sequence[Sequence[float]], least: float) -> list[int]:
    """The first lane in which each span is free of the others; none is taken for shorter than `least` seconds."""
    lanes, free = [0] * len(spans), []
    for k in sorted(range(len(spans)), key=lambda k: (spans[k][0], spans[k][1])):
        start, end = spans[k][0], max(spans[k][1], spans[k][0] + least)
        lane = next((number for number, until in enumerate(free) if until <= start), len(free))
        free[lane : lane + 1] = [end]
        lanes[k] = lane
    return lanes


def _lanes_panel(
    label: str,
    spans: Sequence[Sequence[float]],
    scores: Sequence[float] | None,
    extent: tuple[float, float],
    room: float,
    nothing: str,
) -> _Panel:
    """Spans as bars, overlapping ones below each other; coloured and numbered where there are scores, else grey."""
    from matplotlib.patches import Rectangle

    second = room / (extent[1] - extent[0])  # inches
    font = font_of(SMALL, "bold")
    names = [str(k + 1) if scores is not None else "" for k in range(len(spans))]
    lanes = _lanes(spans, (measure("00", font) + 0.1) / second if scores is not None else 0.0)
    count = max(lanes, default=0) + 1
    lane = min(LANE, LANES / count)
    height = lane * count

    def draw(sheet: _Sheet, top: float) -> None:
        axes = sheet.axes_at(top, height)
        axes.set(ylim=(height, 0), xticks=[], yticks=[], gid=label.lower())
        axes.axhspan(0, height, color="#f2f2f2", linewidth=0)
        sheet.write(label, LEFT - 0.1, top + lane / 2, SMALL, ha="right", color=FAINT)
        if not spans:
            middle = LEFT + room / 2
            sheet.write(nothing, middle, top + height / 2, SMALL, ha="center", color=FAINT, style="italic")
        for k, (start, end) in enumerate(spans):
            colour = _colour(k) if scores is not None else TRUTH
            long = max(end - start, 0.02 / second)
            bar = Rectangle((start, (lanes[k] + 0.125) * lane), long, 0.75 * lane, facecolor=colour, gid=f"bar-{k}")
            axes.add_patch(bar)
            if lane < NUMBERED:
                continue
            needed = measure(names[k], font) + 0.06
            inside = long * second >= needed
            # beside the bar where it is too short, on its left at the right end of the video
            right = (extent[1] - start - long) * second >= needed
            at = start + long / 2 if inside else start + long + 0.03 / second if right else start - 0.03 / second
            axes.text(
                at,
                (lanes[k] + 0.5) * lane,
                names[k],
                fontproperties=font,
                color="white" if inside and scores is not None and _is_dark(colour) else INK,
                ha="center" if inside else "left" if right else "right",
                va="center_baseline",
            )

    return _Panel(height, draw)


def _curves_panel(
    spans: Sequence[Sequence[float]], times: Sequence[float], curves: Sequence[Sequence[float]]
) -> _Panel:
    """The probability of every frame, one curve per piece of evidence, over the shade of its span."""
    peak = max(max(curve) for curve in curves)
    dots = len(times) <= 60
    shade = 0.15 / (1 + max(_lanes(spans, 0.0)))  # of spans over each other none is covered

    def draw(sheet: _Sheet, top: float) -> None:
        axes = sheet.axes_at(top, CURVES)
        axes.set_gid("curves")
        for k, ((start, end), curve) in enumerate(zip(spans, curves, strict=True)):
            axes.axvspan(start, end, color=_colour(k), alpha=shade, linewidth=0)
            dashes = ("-", "--", ":")[k // len(PALETTE) % 3]
            axes.plot(
                times, curve, dashes, color=_colour(k), linewidth=1.6, marker="." if dots else "", gid=f"curve-{k}"
            )
        # up to 1, but a model that is unsure everywhere still shows where it looks
        limit = 1.0 if peak > 0.4 or not peak > 0 else 1.15 * peak
        axes.set_ylim(-0.03 * limit, 1.05 * limit)
        axes.set_yticks([0, limit / 2, limit] if limit == 1.0 else [0, peak])
        axes.set_yticklabels([f"{tick:.1f}" if limit == 1.0 else f"{tick:.2g}" for tick in axes.get_yticks()])
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        _time_axis(axes)
        sheet.write(
            "Similarity", LEFT - 0.4, top + CURVES / 2, SMALL, ha="center", va="center", color=FAINT, rotation=90
        )

    return _Panel(CURVES + 0.22, draw)


def _axis_panel() -> _Panel:
    """The times alone, where there are no curves to draw above them."""

    def draw(sheet: _Sheet, top: float) -> None:
        axes = sheet.axes_at(top, 0.02)
        axes.set(yticks=[], gid="times")
        _time_axis(axes)

    return _Panel(0.24, draw)


def _time_axis(axes: "Axes") -> None:
    """Seconds, as the answer has them, however long the video is."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}s"))
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.tick_params(axis="x", length=3, color="#bbbbbb")


__all__ = ["PALETTE", "check_path", "timeline"]
