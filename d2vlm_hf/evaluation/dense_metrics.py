# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics of videos with several captioned events: event detection, captions of matched events, and SODA_c."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .metrics import Events, detection_scores, hull_iou, match_events, soda
from .text_metrics import FILLER, CaptionScorer


class DenseScores(NamedTuple):
    """Scores of one video: precision and recall per threshold `(T,)`, and caption metrics averaged over thresholds."""

    precision: np.ndarray
    recall: np.ndarray
    captions: dict[str, float]


def prepare_captions(scorer: CaptionScorer | None, events: Sequence[Events]) -> None:
    """Has all captions tokenized at once.

    Args:
        scorer (`CaptionScorer`, *optional*):
            The scorer that will be used; nothing happens without one.
        events (`Sequence[Events]`):
            Predicted and true events.
    """
    if scorer is not None:
        scorer.prepare([FILLER, *(caption for video in events for caption in video.captions)])


def caption_pairs(predicted: Events, references: Sequence[Events], threshold: float) -> list[tuple[list[str], str]]:
    """Pairs each predicted caption with every true one whose IoU reaches the threshold, or with a filler if none does.

    Args:
        predicted (`Events`):
            Predicted events.
        references (`Sequence[Events]`):
            True events of each annotator.
        threshold (`float`):
            IoU that a pair must reach.

    Returns:
        `list[tuple[list[str], str]]`: (references, caption), the references always one.
    """
    hits = [hull_iou(predicted.spans, truth.spans) >= threshold for truth in references]
    pairs: list[tuple[list[str], str]] = []
    for p, caption in enumerate(predicted.captions):
        matched = [
            truth.captions[k] for hit, truth in zip(hits, references, strict=True) for k in np.flatnonzero(hit[p])
        ]
        pairs += [([text], caption) for text in matched or [FILLER]]
    return pairs


def score_video(
    predicted: Events, references: Sequence[Events], thresholds: Sequence[float], scorer: CaptionScorer | None
) -> DenseScores:
    """Scores one video as the published dense-captioning scorers do.

    A video without predicted events scores 0 throughout.

    Args:
        predicted (`Events`):
            Predicted events.
        references (`Sequence[Events]`):
            True events of each annotator.
        thresholds (`Sequence[float]`):
            T IoU thresholds: exceeded for a detection, reached for a caption.
        scorer (`CaptionScorer`, *optional*):
            Scorer of captions; without one they are not scored.

    Returns:
        `DenseScores`.
    """
    precision, recall = detection_scores(predicted.spans, [truth.spans for truth in references], thresholds)
    captions: dict[str, float] = {}
    if scorer is not None:
        each = [scorer.score(caption_pairs(predicted, references, threshold)) for threshold in thresholds]
        captions = {name: float(np.mean([scores[name] for scores in each])) for name in scorer.metrics}
    return DenseScores(precision, recall, captions)


def soda_c(
    predicted: Events, truth: Events, scorer: CaptionScorer, caption_order: Sequence[int] | None = None
) -> tuple[float, float, float]:
    """SODA_c of one video: the best order-preserving matching of METEOR times IoU.

    As in the published implementation, METEOR takes the predicted caption as the reference and the true one as the
    candidate.

    Args:
        predicted (`Events`):
            Predicted events, in the order in which they are matched.
        truth (`Events`):
            True events of one annotator, in order.
        scorer (`CaptionScorer`):
            A scorer that has METEOR.
        caption_order (`Sequence[int]`, *optional*):
            Index of the caption that counts as that of each predicted event; by default its own.

    Returns:
        `tuple[float, float, float]`: precision, recall and F1.
    """
    if not len(predicted.spans) or not len(truth.spans):
        return 0.0, 0.0, 0.0
    own = [predicted.captions[n] for n in caption_order] if caption_order is not None else predicted.captions
    pairs = [([caption], text) for caption in own for text in truth.captions]
    iou = hull_iou(predicted.spans, truth.spans)
    return soda(scorer.score_each(pairs)["METEOR"].reshape(iou.shape) * iou)


def matched_caption_scores(
    predicted: Sequence[Events], truth: Sequence[Events], thresholds: Sequence[float], scorer: CaptionScorer
) -> dict[str, np.ndarray]:
    """Caption scores per video without fillers and without regard to order: the `clean` protocol's.

    Events are paired one to one by IoU. At each threshold the scores of the pairs that reach it are summed and divided
    by the mean of the numbers of predicted and true events, so that a missed and an invented event both cost; CIDEr
    takes its document frequencies from all true captions. BLEU has no meaning for single captions and is left out.

    Args:
        predicted (`Sequence[Events]`):
            Predicted events of each of N videos.
        truth (`Sequence[Events]`):
            True events of each video.
        thresholds (`Sequence[float]`):
            IoU thresholds that a pair must reach.
        scorer (`CaptionScorer`):
            Scorer of captions.

    Returns:
        `dict[str, np.ndarray]`: metric -> mean over thresholds, `(N,)`.
    """
    pairs: list[tuple[list[str], str]] = []
    owner: list[tuple[int, float]] = []  # video and IoU of each pair; IoU 0 for a true caption without partner
    for n, (guess, target) in enumerate(zip(predicted, truth, strict=True)):
        partner = {k: (p, iou) for p, k, iou in match_events(guess.spans, target.spans)}
        for k, text in enumerate(target.captions):
            p, iou = partner.get(k, (None, 0.0))
            pairs.append(([text], "" if p is None else guess.captions[p]))
            owner.append((n, iou))
    video, iou = np.array([n for n, _ in owner], np.int64), np.array([value for _, value in owner])
    share = np.mean([iou >= threshold for threshold in thresholds], axis=0) if owner else np.zeros(0)
    size = np.array([(len(g.spans) + len(t.spans)) / 2 for g, t in zip(predicted, truth, strict=True)])
    scores = scorer.score_each(pairs)
    result = {}
    for name in scorer.metrics:
        if not name.startswith("Bleu"):
            total = np.bincount(video, weights=scores[name] * share, minlength=len(size))
            result[name] = np.divide(total, size, out=np.zeros(len(size)), where=size > 0)
    return result


__all__ = [
    "DenseScores",
    "caption_pairs",
    "matched_caption_scores",
    "prepare_captions",
    "score_video",
    "soda_c",
]
