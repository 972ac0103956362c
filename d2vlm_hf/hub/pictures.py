# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The timeline picture of a card: one row as the model of the card answers it."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..figures import timeline
from ..model.video_processing_d2vlm import sample_video


logger = logging.getLogger(__name__)

STRIP_FRAMES = 16  # decoded for the strip, which shows as many as fit


def draw_example(
    grounder: Callable[..., Any], rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str], **options: Any
) -> Path | None:
    """Draw the first row that has a moment: frames, frame scores, what was found and what is true.

    Args:
        grounder (`VideoGroundingPipeline`): The model.
        rows (`Iterable[Mapping]`): Rows with `video`, `question`, `question_spans` and `spans`.
        path (`str`): The picture.
        **options: Of the pipeline, such as `fps`.

    Returns:
        `Path`: The picture, or None if there is nothing to draw or nothing to draw with.
    """
    row = next((row for row in rows if row["spans"]), None)
    if row is None or importlib.util.find_spec("matplotlib") is None:
        return None
    asked = {name: row[name] for name in ("video", "question", "question_spans")}
    try:
        (result,) = grounder([asked], return_curves=True, **options)
        strip = sample_video(row["video"], fps=STRIP_FRAMES / result["duration"])
    except ValueError as error:  # a card is written all the same
        logger.warning("the card has no timeline picture: %s", error)
        return None
    timeline(result, strip.frames.numpy(), strip.times, question=row["question"], truth=row["spans"], path=path)
    return Path(path)


__all__ = ["draw_example"]
