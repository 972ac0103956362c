# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""`d2vlm ground`: one question about one video, told to people, to programs, and as a picture."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..bundled import bundled_checkpoint, bundled_clip
from ..figures import timeline
from ..model.answers_d2vlm import format_span
from ..model.generation_d2vlm import EvidenceStreamer
from ..model.modeling_d2vlm import D2VLMForConditionalGeneration
from ..model.pipeline_d2vlm import VideoGroundingPipeline
from ..model.processing_d2vlm import D2VLMProcessor
from ..model.video_processing_d2vlm import sample_video


logger = logging.getLogger(__name__)

STRIP_FRAMES = 16  # decoded for the picture, which shows as many as fit
STRIP_HEIGHT = 240  # pixels of such a frame, about
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Inquiry:
    """What is asked of which video.

    Args:
        video (`str`): Path or URL of a file, or a folder of frames.
        question (`str`): With one `<evi>` for each given moment.
        question_spans (`Sequence`): The given moments, `[start, end]` in seconds.
        truth (`list`, *optional*): Annotated moments in seconds, for the picture.
        video_fps (`float`, *optional*): Frames per second of a folder of frames.
    """

    video: str
    question: str
    question_spans: Sequence[Sequence[float]] = ()
    truth: list[list[float]] | None = None
    video_fps: float | None = None


def demonstration() -> Inquiry:
    """The clip that ships with the package, its question and its annotated moments.

    Raises:
        ValueError: If the clip is not there.
    """
    clip = bundled_clip()
    notes = Path(clip).with_suffix(".json")
    if not (os.path.isfile(clip) and notes.is_file()):
        raise ValueError(
            f"{clip} or {notes.name} beside it is missing: this installation lacks its clip. Reinstall it."
        )
    known = json.loads(notes.read_text(encoding="utf-8"))
    return Inquiry(clip, known["question"], truth=known["spans"])


def load_pipeline(
    model: str | None = None, device: str | None = None, dtype: str | None = None
) -> VideoGroundingPipeline:
    """The pipeline of a checkpoint.

    Args:
        model (`str`, *optional*): Folder or Hub id, by default the checkpoint that ships with the package.
        device (`str`, *optional*): As `"cpu"`, `"cuda:1"`; by default a GPU if there is one.
        dtype (`str`, *optional*): One of `DTYPES`, by default what the checkpoint says.

    Raises:
        ValueError: If there is no such checkpoint or device, or the checkpoint lacks weights.
    """
    name = bundled_checkpoint() if model is None else model
    where = _device(device)
    if not os.path.isdir(name) and (model is None or os.path.exists(name) or name.count("/") != 1 or name[0] in "./~"):
        raise ValueError(
            f"{name} is no checkpoint: no such folder is there. "
            + (
                "Reinstall the package, or pass --model."
                if model is None
                else "Pass a folder, or a Hub id 'owner/name'."
            )
        )
    try:
        processor = D2VLMProcessor.from_pretrained(name)
        loaded, report = D2VLMForConditionalGeneration.from_pretrained(
            name, dtype=dtype or "auto", output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the model {name} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the checkpoint {name} lacks {len(missing)} tensors ({', '.join(missing[:3])}, ...), which would be "
            "random numbers. Fetch it again, or convert the original once more."
        )
    return VideoGroundingPipeline(model=loaded.eval(), processor=processor, device=where)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is none that torch knows. Use cpu, cuda, cuda:1 or mps.") from error
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= here.get(device.type, 1):
        raise ValueError(f"device {name!r} is not on this machine, or not in this build of torch. Leave --device out.")
    return device


def ask(
    pipeline: VideoGroundingPipeline,
    inquiry: Inquiry,
    max_new_tokens: int | None = None,
    min_score: float | None = None,
    stream: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """Answer, with the curves of every frame.

    Args:
        pipeline (`VideoGroundingPipeline`): The model.
        inquiry (`Inquiry`): The question.
        max_new_tokens (`int`, *optional*): Length of the answer at most.
        min_score (`float`, *optional*): Evidence with a lower score is left out.
        stream (`bool`, *optional*, defaults to `False`): Print the answer to standard output while it is written.
        **sampling: `fps`, `max_frames`.

    Returns:
        `dict`: The pipeline's result, with `times` and `curves`.
    """
    return pipeline(
        inquiry.video,
        question=inquiry.question,
        question_spans=[list(span) for span in inquiry.question_spans] or None,
        max_new_tokens=max_new_tokens,
        min_score=min_score,
        return_curves=True,
        streamer=EvidenceStreamer(pipeline.processor.tokenizer) if stream else None,
        video_fps=inquiry.video_fps,
        **sampling,
    )


def as_json(inquiry: Inquiry, result: Mapping[str, Any]) -> str:
    """One JSON object: the question and the result without its curves."""
    shown = {key: value for key, value in result.items() if key not in ("times", "curves")}
    asked = {"video": inquiry.video, "question": inquiry.question}
    return json.dumps({**asked, **shown}, ensure_ascii=False, allow_nan=False, indent=2)


def as_lines(inquiry: Inquiry, result: Mapping[str, Any], with_answer: bool = True) -> list[str]:
    """The result for people: question, answer, and a table of the evidence."""
    lines = [f"Question  {inquiry.question}", f"Answer    {result['answer'] or '(empty)'}"] if with_answer else []
    evidence = result["evidence"]
    if not evidence:
        return [*lines, "Evidence  none: no moment of the video was found"]
    named = {reference["evidence"] for reference in result["references"]}
    lines += ["Evidence        start       end    length  score  in the answer"]
    for k, entry in enumerate(evidence):
        start, end = entry["start"], entry["end"]
        times = "".join(f"{f'{seconds:.1f}s':>10}" for seconds in (start, end, end - start))
        lines.append(f"{k + 1:>9}  {times}{entry['score']:>7.2f}  {'yes' if k in named else 'no'}")
    if inquiry.truth is not None:
        told = ", ".join(format_span(*span) for span in inquiry.truth)
        lines.append(f"Annotated {told or 'no event'}")
    return lines


def draw(inquiry: Inquiry, result: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write the timeline picture.

    Args:
        inquiry (`Inquiry`): What was asked.
        result (`dict`): Of [`ask`].
        path (`str`): The file.
    """

    def shrink(frames: torch.Tensor) -> torch.Tensor:
        step = max(1, frames.shape[-2] // STRIP_HEIGHT)
        return frames[..., ::step, ::step]

    told = logging.getLogger(sample_video.__module__)  # said what is wrong with the video when the model looked at it
    level, frames, times = told.level, None, None
    told.setLevel(logging.ERROR)
    try:
        rate = STRIP_FRAMES / result["duration"]
        strip = sample_video(inquiry.video, fps=rate, video_fps=inquiry.video_fps, frame_transform=shrink)
        frames, times = strip.frames.numpy(), strip.times
    except ValueError as error:  # the model looked at other times, and its answer stands
        logger.warning("the picture has no frames: %s", error)
    finally:
        told.setLevel(level)
    timeline(result, frames, times, question=inquiry.question, truth=inquiry.truth, path=path)


__all__ = ["DTYPES", "Inquiry", "as_json", "as_lines", "ask", "demonstration", "draw", "load_pipeline"]
