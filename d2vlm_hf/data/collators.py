# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Collators: rows of the schema -> one batch, prompts left-padded and responses right-padded.

Prompt and response of every row meet in one column (`prompt_length`), so that the model runs the prompts once and the
responses against their cache. A video that several rows of a batch ask about is decoded and encoded once. Where the
vision tower is frozen, a video may also be given as `{"patch_features": (T, P, D), "timestamps": (T,) seconds}`, the
stored output of `model.model.encode_patches`: the batch then has `patch_features` in place of pixels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..model.evidence_d2vlm import ROLE_ANSWER, ROLE_GROUNDING, ROLE_QUESTION
from ..model.processing_d2vlm import D2VLMProcessor, pad_evidence, pad_ids
from ..model.video_processing_d2vlm import frame_period


logger = logging.get_logger(__name__)

IGNORE_INDEX = -100

# What stands in for a batch of which no row can be used.
_BLANK = {
    "video": {"frames": np.zeros((1, 8, 8, 3), np.uint8), "timestamps": [0.0]},
    "question": "?", "answer": "-", "prompt": "?", "chosen": "-", "rejected": "-", "question_spans": [], "spans": [],
    "chosen_spans": [], "rejected_spans": [],
}  # fmt: skip
# An `<evi>` in running text with the words that only lead to it: "at <evi>, <evi> and <evi>".
_EVIDENCE_PHRASE = re.compile(r"(?:,?\s*\b(?:at|during|in|from|and))?,?\s*<evi>", re.I)
STAGES = ("both", "answer", "grounding", "text")


def without_evidence(text: str) -> str:
    """An answer without its `<evi>` and the words that lead to them: "At <evi>: blue." -> "Blue."."""
    text = _EVIDENCE_PHRASE.sub("", text).lstrip(" ,:")
    return text[:1].upper() + text[1:]


@dataclass
class Response:
    """One response to a prompt: its text, and the span in seconds of each `<evi>` in it."""

    text: str
    spans: Sequence[Sequence[float]]


@dataclass
class _VideoCollator:
    """What both collators share.

    Args:
        processor (`D2VLMProcessor`): Tokenizes and samples.
        fps (`float`, *optional*): Frames per second to sample; default: the video processor's.
        max_frames (`int`, *optional*): Frames per video at most; default: the video processor's.
        max_context (`int`, *optional*): Positions of the text model; a longer row is an error.
        on_error (`str`): `"raise"` stops at a broken row, naming it; `"skip"` leaves it out and counts it in `skipped`.
            Where no row of a batch is left, a blank one stands in that has no labels, so that it adds nothing to any
            loss and the other processes of a run need not wait.
        stages (`str`): `"both"`: grounding, then the answer. `"answer"`: no grounding stage (the ladder's coupled arm).
            `"grounding"`: grounding stage, no `<evi>` in the answer (the ladder's factorized arm). `"text"`: neither,
            an answer without evidence (the ladder's stage 0).
    """

    processor: D2VLMProcessor
    fps: float | None = None
    max_frames: int | None = None
    max_context: int | None = None
    on_error: str = "raise"
    stages: str = "both"
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(
                f"on_error={self.on_error!r} is unknown: a broken row is either raised or skipped. Use 'raise' or "
                "'skip'."
            )
        if self.stages not in STAGES:
            raise ValueError(f"stages={self.stages!r} is unknown. Use 'both', 'answer', 'grounding' or 'text'.")

    def responses(self, row: Mapping[str, Any]) -> tuple[str, list[Response]]:
        """The question of a row, and its responses in order."""
        raise TypeError(
            f"{type(self).__name__} does not say where responses stand. Use SFTCollator or PreferenceCollator."
        )

    def extras(self, rows: Sequence[Mapping[str, Any]], videos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What else the batch carries about its rows, whose videos' metadata are given."""
        return {}

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows; an item may also be `{"rows": [...]}`, such as several questions about one video."""
        rows = [row for item in items for row in _rows_of(item)]
        batch = self._batch(rows)
        if batch is None:
            batch = self._batch([_BLANK])
            batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        return batch

    def _batch(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The tensors of the rows that can be used; `None` if there are none."""
        videos, index, rows = self._load_videos(rows)
        prompts, responses, evidence, kept = [], [], [], []
        for row, video in zip(rows, index, strict=True):
            try:
                prompt, row_responses, row_evidence = self._encode(row, videos["video_metadata"][video])
            except ValueError as error:
                self._fail(row, error)
                continue
            prompts.append(prompt)
            responses.append(row_responses)
            evidence.append(row_evidence)
            kept.append((row, video))
        if not kept:
            return None
        batch = self._tensors(prompts, responses, evidence)
        batch |= self.processor.encode_questions([self.responses(row)[0] for row, _ in kept])
        batch |= {name: value for name, value in videos.items() if name != "video_metadata"}
        batch["video_index"] = torch.tensor([video for _, video in kept])
        return batch | self.extras([row for row, _ in kept], [videos["video_metadata"][video] for _, video in kept])

    def _load_videos(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, list[int], list[Mapping[str, Any]]]:
        """Decode each distinct video once: the processor's output, the video of each row, the rows that are left."""
        places: dict[Any, int] = {}
        loaded, index, kept = [], [], []
        for row in rows:
            key = _video_key(row["video"])
            if key not in places:
                try:
                    loaded.append(self._load_video(row["video"]))
                except ValueError as error:
                    self._fail(row, error)
                    continue
                places[key] = len(places)
            index.append(places[key])
            kept.append(row)
        if not loaded:
            return {}, [], []
        kinds = {"patch_features" if "patch_features" in video else "pixel_values_videos" for video in loaded}
        if len(kinds) > 1:
            raise ValueError(
                "some videos of the batch are stored patch features and others are not: the tower would have to run "
                "for a part of it. Store the features of all videos, or of none."
            )
        videos = {
            **{kind: torch.cat([video[kind] for video in loaded]) for kind in kinds},
            "num_frames": torch.cat([video["num_frames"] for video in loaded]),
            "video_metadata": [video["video_metadata"][0] for video in loaded],
        }
        return videos, index, kept

    def _load_video(self, video: Any):
        options = {"fps": self.fps, "max_frames": self.max_frames}
        if isinstance(video, Mapping) and "patch_features" in video:
            return _stored_features(video)
        if isinstance(video, Mapping) and "frames" in video:
            return self.processor.video_processor(
                videos=[video["frames"]], timestamps=[video["timestamps"]], return_metadata=True, **options
            )
        return self.processor.video_processor(videos=[video], return_metadata=True, **options)

    def _encode(self, row: Mapping[str, Any], video: Mapping[str, Any]):
        """Tokens and evidence of one row: prompt, its responses, and per response (frame spans, roles)."""
        question, responses = self.responses(row)
        question_spans = row.get("question_spans") or []
        num_frames = len(video["timestamps"])
        prompt = self.processor.encode_prompt(question, num_frames, len(question_spans))
        asked = self.processor.spans_to_frames(question_spans, video)
        encoded, evidence = [], []
        for response in responses:
            grounds, refers = self.stages in ("both", "grounding"), self.stages in ("both", "answer")
            text = response.text if refers else without_evidence(response.text)
            ids = self.processor.encode_response(text, len(response.spans), "both" if grounds else "answer")
            self.processor.check_context([*prompt, *ids], self.max_context)
            spans = self.processor.spans_to_frames(response.spans, video)
            grounding, answer = spans if grounds else [], spans if refers else []
            encoded.append(ids)
            evidence.append(
                (
                    asked + grounding + answer,
                    [ROLE_QUESTION] * len(asked) + [ROLE_GROUNDING] * len(grounding) + [ROLE_ANSWER] * len(answer),
                )
            )
        return prompt, encoded, evidence

    def _tensors(self, prompts, responses, evidence) -> dict[str, Any]:
        """Rows in TRL's order: the first response of every prompt, then the second one."""
        count = len(responses[0])
        left = pad_ids(prompts, self.processor.pad_token_id, side="left")
        right = pad_ids([r[k] for k in range(count) for r in responses], self.processor.pad_token_id, side="right")
        prompt_ids, prompt_mask = left["input_ids"].repeat(count, 1), left["attention_mask"].repeat(count, 1)
        labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, IGNORE_INDEX)
        ordered = [e[k] for k in range(count) for e in evidence]
        return {
            "input_ids": torch.cat([prompt_ids, right["input_ids"]], dim=1),
            "attention_mask": torch.cat([prompt_mask, right["attention_mask"]], dim=1),
            "labels": torch.cat([torch.full_like(prompt_ids, IGNORE_INDEX), labels], dim=1),
            "prompt_length": prompt_ids.shape[1],
            **pad_evidence([spans for spans, _ in ordered], [roles for _, roles in ordered]),
        }

    def _fail(self, row: Mapping[str, Any], error: ValueError) -> None:
        fault = f"row {row.get('id', '?')!r} (video {_video_name(row.get('video'))}): {error}"
        if self.on_error == "raise":
            raise ValueError(f"{fault} Mend or remove the row, or set on_error='skip'.") from error
        self.skipped.append(fault)
        logger.warning("skipped %s (%d so far)", fault, len(self.skipped))


@dataclass
class SFTCollator(_VideoCollator):
    """Rows with `question`, `question_spans`, `answer`, `spans`: B prompts, B responses."""

    def responses(self, row: Mapping[str, Any]) -> tuple[str, list[Response]]:
        """The question, and the answer."""
        return row["question"], [Response(row["answer"], row["spans"] or [])]


@dataclass
class PreferenceCollator(_VideoCollator):
    """Rows with `prompt`, `chosen`, `rejected` and their spans: B prompts, 2B responses, all chosen ones first.

    The batch also has `factor` and `perturbation`, the names of what is broken in each rejected response, and for
    metrics `frame_times (B, T)`, `frame_period (B,)` and `chosen_seconds (B, K, 2)`, padded with -1.
    """

    def responses(self, row: Mapping[str, Any]) -> tuple[str, list[Response]]:
        """The prompt, the chosen and the rejected response."""
        return last_text(row["prompt"]), [
            Response(last_text(row["chosen"]), row["chosen_spans"] or []),
            Response(last_text(row["rejected"]), row["rejected_spans"] or []),
        ]

    def extras(self, rows: Sequence[Mapping[str, Any]], videos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is broken in each rejected response, times in seconds, and the reference's log-likelihoods if known."""
        extras: dict[str, Any] = {name: [row.get(name) or "" for row in rows] for name in ("factor", "perturbation")}
        extras["frame_times"] = _padded([torch.as_tensor(video["timestamps"]) for video in videos])  # (B, T)
        extras["frame_period"] = torch.tensor([1.0 / video["fps"] for video in videos])  # (B,)
        extras["chosen_seconds"] = _padded(  # (B, K, 2)
            [torch.tensor(row["chosen_spans"] or [], dtype=torch.float32).reshape(-1, 2) for row in rows]
        )
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if rows[0].get(name) is not None:
                extras[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return extras


def _rows_of(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(item["rows"]) if "rows" in item else [item]


def last_text(messages: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a conversation's last message, or a plain string."""
    return messages if isinstance(messages, str) else messages[-1]["content"]


def _padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True, padding_value=-1.0)


def _stored_features(video: Mapping[str, Any]) -> dict[str, Any]:
    """Patch features in place of a video, in the form of the video processor's output."""
    features, times = torch.as_tensor(video["patch_features"]).float(), video["timestamps"]
    if features.dim() != 3 or not len(times) or len(features) != len(times):
        raise ValueError(
            f"patch_features of shape {tuple(features.shape)} come with {len(times)} timestamps: every frame needs its "
            "(P, D) features and one time. Store what encode_patches gives, and the times of its frames."
        )
    fps = 1.0 / frame_period(times) if len(times) > 1 else float(video.get("fps") or 1.0)
    metadata = {"timestamps": times, "fps": fps, "duration": float(times[-1]) + 1.0 / fps}
    return {"patch_features": features, "num_frames": torch.tensor([len(times)]), "video_metadata": [metadata]}


def _video_key(video: Any) -> Any:
    """Equal for rows that share a video: its path where there is one, else the object itself."""
    if isinstance(video, Mapping) and video.get("path") and not {"frames", "patch_features"} & set(video):
        return video["path"] if video.get("bytes") is None else (video["path"], len(video["bytes"]))
    return video if isinstance(video, str) else id(video)


def _video_name(video: Any) -> str:
    if isinstance(video, Mapping):
        return str(video.get("path") or "given as frames or bytes")
    return str(video) if isinstance(video, str) else type(video).__name__


__all__ = ["IGNORE_INDEX", "PreferenceCollator", "Response", "SFTCollator", "last_text", "without_evidence"]
