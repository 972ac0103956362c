# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Where the files that ship inside the package are: the small trained checkpoint and the demonstration clip."""

from pathlib import Path


_PACKAGE = Path(__file__).resolve().parent


def bundled_checkpoint() -> str:
    """Folder of the small trained checkpoint, which is also the default of `pipeline("video-grounding")`.

    Returns:
        `str`: Absolute path of the folder, fit for `from_pretrained` and `pipeline(model=...)`.
    """
    return str(_PACKAGE / "checkpoints" / "d2vlm-shapes")


def bundled_clip() -> str:
    """The demonstration clip, a short H.264 video of coloured shapes like those the checkpoint was trained on.

    Returns:
        `str`: Absolute path of the file.
    """
    return str(_PACKAGE / "clips" / "demo.mp4")


__all__ = ["bundled_checkpoint", "bundled_clip"]
