# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What a model answers when the true tokens are given so far: texts and spans for metrics, without generation.

The tensors come from the forward that the loss is computed from; they are gathered over processes and read afterwards.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..data.collators import IGNORE_INDEX
from ..model.evidence_d2vlm import ROLE_ANSWER, ROLE_GROUNDING, decode_spans
from ..model.processing_d2vlm import D2VLMProcessor


Tensors = tuple[torch.Tensor, ...]


def teacher_forced_answers(outputs, inputs: Mapping[str, Any], rows: int, threshold: float) -> tuple[Tensors, Tensors]:
    """Likeliest tokens and decoded spans of the first rows of a batch, and what is true.

    Args:
        outputs (`D2VLMOutput`): Of a forward with labels and `logits_to_keep=0`.
        inputs (`Mapping`): Batch of a `PreferenceCollator`.
        rows (`int`): B, the rows to read.
        threshold (`float`): `config.evidence_threshold`.

    Returns:
        predictions: tokens `(B, S)`, seconds `(B, E, 2)` of every `<evi>`.
        labels: tokens `(B, S)`, roles `(B, E)`, true seconds `(B, K, 2)`.

    Raises:
        ValueError: If the batch does not say when its frames were shown.
    """
    if "frame_times" not in inputs:
        raise ValueError(
            "the batch has no frame_times, so spans cannot be told to compute_metrics in seconds. Use a "
            "PreferenceCollator, or leave compute_metrics out."
        )
    tokens = outputs.logits[:rows, :-1].argmax(-1)
    spans, _ = decode_spans(outputs.evidence_logits[:rows], outputs.frame_mask[:rows, None], threshold)
    times, period = inputs["frame_times"], inputs["frame_period"]
    seconds = times[:, None].expand(-1, spans.shape[1], -1).gather(2, spans)  # (B, E, 2)
    single = spans[..., 0] == spans[..., 1]
    seconds[..., 1] += torch.where(single, period[:, None], 0.0)
    labels = inputs["labels"][:rows, -tokens.shape[1] :]
    return (tokens, seconds), (labels, inputs["evidence_role"][:rows], inputs["chosen_seconds"])


def read_answers(predictions: tuple, labels: tuple, processor: D2VLMProcessor) -> EvalPrediction:
    """Gathered arrays of [`teacher_forced_answers`] as texts and spans, for `compute_metrics`.

    Args:
        predictions, labels (`tuple` of `np.ndarray`): Over the whole evaluation set, padded.
        processor (`D2VLMProcessor`): Knows the tokens.

    Returns:
        `EvalPrediction`: `predictions`, one dict a row: `answer` (text with `<evi>` in it), `evidence` and `spans`
        (`[[start, end], ...]` in seconds of the grounding part and of the answer); `label_ids`: `answer`, `spans`.
    """
    predicted, true = [], []
    for tokens, seconds, wanted, role, spans in zip(*predictions, *labels, strict=True):
        predicted.append(
            {
                "answer": _answer(tokens, wanted, processor),
                "evidence": seconds[role == ROLE_GROUNDING].tolist(),
                "spans": seconds[role == ROLE_ANSWER].tolist(),
            }
        )
        true.append({"answer": _answer(wanted, wanted, processor), "spans": spans[spans[:, 0] >= 0].tolist()})
    return EvalPrediction(predictions=predicted, label_ids=true)


def _answer(tokens: np.ndarray, labels: np.ndarray, processor: D2VLMProcessor) -> str:
    """The text at the places of the true answer, which begins behind `</evi>`, up to the end of the turn."""
    (ends,) = np.nonzero(labels == processor.evidence_end_token_id)
    first = int(ends[0]) + 1 if len(ends) else 0
    told = tokens[first:][labels[first:] != IGNORE_INDEX].tolist()
    stops = {*processor.stop_token_ids, processor.pad_token_id}
    kept = next((place for place, token in enumerate(told) if token in stops), len(told))
    return processor.tokenizer.decode(told[:kept], clean_up_tokenization_spaces=False).strip()


__all__ = ["read_answers", "teacher_forced_answers"]
