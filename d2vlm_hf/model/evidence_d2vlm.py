# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The method: what an `<evi>` token means, as pure functions of tensors.

Every function here is differentiable where it can be, vectorized over batch, events and frames, and works in float32:
in bfloat16 a probability above logit 5 takes only two values.

Notation: B batch, E evidence tokens in a row, T frames, H text hidden size. Spans are frame indices
(first, last), both inclusive; a row of -1 is padding. Frames may be padded too: `frame_mask (B, T)` is True on real
ones.

    h, f_t     state that predicts an `<evi>`, state of frame t
    sim_t      evidence_head(h) . frame_head(f_t) / sqrt(H)      -> evidence_similarity
    p_t        sigmoid(sim_t)
    s_t        alpha ** -d(t, span)                              -> soft_targets
    span       from p_t                                          -> decode_spans
    capture    mean of m_t over the span                         -> pool_spans
    losses     grounding, consistency                            -> grounding_loss, consistency_loss
    log pi     sum_t log(s_t p_t + (1 - s_t)(1 - p_t))           -> grounding_log_likelihood
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


ROLE_QUESTION, ROLE_GROUNDING, ROLE_ANSWER = 0, 1, 2
"""Values of `evidence_role`: a given moment in the question, the pure grounding part, a reference in the answer."""


class EvidenceHead(nn.Sequential):
    """LayerNorm, Linear(H, H/2), GELU, Linear(H/2, H): evidence head and frame head (paper: temporal grounding)."""

    def __init__(self, hidden_size: int):
        super().__init__(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size // 2),
            nn.GELU(),
            nn.Linear(hidden_size // 2, hidden_size),
        )


def evidence_similarity(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Similarity logits between evidence tokens and frames (paper: temporal evidence grounding).

    Args:
        queries (`torch.Tensor` of shape `(B, E, H)`): `evidence_head(h)`.
        keys (`torch.Tensor` of shape `(B, T, H)`): `frame_head(f_t)`.

    Returns:
        `torch.Tensor` of shape `(B, E, T)`, float32, before the sigmoid.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ keys.float().transpose(-1, -2) / math.sqrt(queries.shape[-1])


def _inside(spans: torch.Tensor, num_frames: int) -> torch.Tensor:
    """True on the frames of each span; padding (-1) has none. `(..., 2)` -> `(..., T)`."""
    frames = torch.arange(num_frames, device=spans.device)
    start, end = spans[..., :1], spans[..., 1:]
    return (frames >= start) & (frames <= end) & (start >= 0)


def frame_distance(spans: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Distance of every frame from a span, in frames; 0 inside.

    Args:
        spans (`torch.LongTensor` of shape `(..., 2)`): First and last frame, inclusive.
        num_frames (`int`): T.

    Returns:
        `torch.LongTensor` of shape `(..., T)`.
    """
    frames = torch.arange(num_frames, device=spans.device)
    return (spans[..., :1] - frames).clamp(min=0) + (frames - spans[..., 1:]).clamp(min=0)


def soft_targets(spans: torch.Tensor, num_frames: int, decay: float = 2.0) -> torch.Tensor:
    """Soft frame labels `s_t = decay ** -d` (paper: soft frame labels).

    Args:
        spans (`torch.LongTensor` of shape `(..., 2)`): First and last frame, inclusive.
        num_frames (`int`): T.
        decay (`float`): alpha, above 1.

    Returns:
        `torch.Tensor` of shape `(..., T)`, float32 in (0, 1].
    """
    return torch.exp(-math.log(decay) * frame_distance(spans, num_frames).float())


def decode_spans(
    similarity: torch.Tensor, frame_mask: torch.Tensor | None = None, threshold: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """One span from each similarity curve: threshold, contiguous groups, the group with the highest mean.

    Frames with `p_t >= threshold * max p` are kept; among the contiguous groups of kept frames the one with the highest
    mean probability wins, the earliest of them on a tie (paper).

    Args:
        similarity (`torch.Tensor` of shape `(..., T)`): Logits.
        frame_mask (`torch.BoolTensor` broadcastable to `(..., T)`, *optional*): True on real frames.
        threshold (`float`): Share of the maximum that a frame must reach.

    Returns:
        spans (`torch.LongTensor` of shape `(..., 2)`): First and last frame, inclusive.
        scores (`torch.Tensor` of shape `(...)`): Mean probability over the span, float32.
    """
    probability = similarity.detach().float().sigmoid()
    if frame_mask is not None:
        probability = probability.masked_fill(~frame_mask, 0.0)
    keep = probability >= threshold * probability.amax(-1, keepdim=True)
    if frame_mask is not None:
        keep = keep & frame_mask
    starts = keep & ~F.pad(keep, (1, 0))[..., :-1]
    group = starts.long().cumsum(-1)  # (..., T): 1-based number of the group a kept frame is in
    group = torch.where(keep, group, 0)  # 0 collects the frames that were not kept
    num_frames = probability.shape[-1]
    # In float64 the mean of n equal float32 numbers is that number, so equal groups tie whatever their lengths.
    exact = probability.double() if probability.device.type != "mps" else probability
    sizes = exact.new_zeros(*exact.shape[:-1], num_frames + 1)
    totals = sizes.scatter_add(-1, group, exact)
    sizes = sizes.scatter_add(-1, group, torch.ones_like(exact))
    means = (totals / sizes.clamp(min=1))[..., 1:].masked_fill(sizes[..., 1:] == 0, -1.0)
    scores = means.amax(-1)
    groups = torch.arange(1, num_frames + 1, device=similarity.device)
    best = torch.where(means == scores[..., None], groups, num_frames + 1).amin(-1)
    chosen = group == best[..., None]
    frames = torch.arange(num_frames, device=similarity.device)
    first = torch.where(chosen, frames, num_frames).amin(-1)
    last = torch.where(chosen, frames, -1).amax(-1)
    return torch.stack([first, last], dim=-1), scores.float()


def pool_spans(states: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
    """Mean frame state over each span: visual semantic capture (paper).

    Args:
        states (`torch.Tensor` of shape `(B, T, H)`): Frame states.
        spans (`torch.LongTensor` of shape `(B, E, 2)`): First and last frame, inclusive; -1 is padding.

    Returns:
        `torch.Tensor` of shape `(B, E, H)` in the dtype of `states`; zeros for padding.
    """
    inside = _inside(spans, states.shape[1]).to(states.dtype)  # (B, E, T)
    weights = inside / inside.sum(-1, keepdim=True).clamp(min=1)
    return weights @ states


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Mean over the True entries of `mask`, 0 where there is none."""
    if dim is None:
        dim = tuple(range(values.dim()))
    mask = mask.expand_as(values)
    return torch.where(mask, values, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)


def grounding_loss(
    similarity: torch.Tensor, targets: torch.Tensor, evidence_mask: torch.Tensor, frame_mask: torch.Tensor
) -> torch.Tensor:
    """Binary cross-entropy against the soft labels, mean over a sample's evidence tokens and frames (paper:
    grounding loss).

    Args:
        similarity, targets (`torch.Tensor` of shape `(B, E, T)`): Logits and `soft_targets`.
        evidence_mask (`torch.BoolTensor` of shape `(B, E)`): True on the `<evi>` tokens of the response.
        frame_mask (`torch.BoolTensor` of shape `(B, T)`): True on real frames.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32; 0 for samples without events.
    """
    entropy = F.binary_cross_entropy_with_logits(similarity.float(), targets, reduction="none")
    return masked_mean(entropy, evidence_mask[:, :, None] & frame_mask[:, None, :], dim=(1, 2))


def pair_by_rank(role: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Match the k-th `<evi>` of the grounding part with the k-th of the answer.

    Args:
        role (`torch.LongTensor` of shape `(B, E)`): Roles in sequence order; -1 is padding.

    Returns:
        grounding, answer (`torch.LongTensor` of shape `(B, E)`): Index along E of each partner of pair k.
        valid (`torch.BoolTensor` of shape `(B, E)`): True where pair k exists on both sides.
    """
    # A stable sort brings the tokens of one role to the front, in order.
    is_grounding, is_answer = role == ROLE_GROUNDING, role == ROLE_ANSWER
    grounding = torch.argsort((~is_grounding).long(), dim=1, stable=True)
    answer = torch.argsort((~is_answer).long(), dim=1, stable=True)
    pairs = torch.minimum(is_grounding.sum(1), is_answer.sum(1))
    valid = torch.arange(role.shape[1], device=role.device) < pairs[:, None]
    return grounding, answer, valid


def consistency_loss(queries: torch.Tensor, role: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference between `evidence_head(h)` of an event in the grounding part and in the answer
    (paper: consistency).

    Args:
        queries (`torch.Tensor` of shape `(B, E, H)`): `evidence_head(h)` of every `<evi>`.
        role (`torch.LongTensor` of shape `(B, E)`): 0 question, 1 grounding, 2 answer, -1 padding.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32; 0 for samples without a pair.
    """
    grounding, answer, valid = pair_by_rank(role)
    rows = torch.arange(role.shape[0], device=role.device)[:, None]
    difference = (queries[rows, grounding].float() - queries[rows, answer].float()).abs().mean(-1)  # (B, E)
    return masked_mean(difference, valid, dim=1)


def grounding_log_likelihood(
    similarity: torch.Tensor,
    spans: torch.Tensor,
    evidence_mask: torch.Tensor,
    frame_mask: torch.Tensor,
    decay: float = 2.0,
) -> torch.Tensor:
    """Log-likelihood of a response's spans under the frame probabilities (paper: FPO).

    `sum over <evi> and frames of log(s_t p_t + (1 - s_t)(1 - p_t))`; not the negative BCE of `grounding_loss`.

    Args:
        similarity (`torch.Tensor` of shape `(B, E, T)`): Logits.
        spans (`torch.LongTensor` of shape `(B, E, 2)`): The response's own spans, frames, inclusive.
        evidence_mask (`torch.BoolTensor` of shape `(B, E)`): True on the `<evi>` tokens of the response.
        frame_mask (`torch.BoolTensor` of shape `(B, T)`): True on real frames.
        decay (`float`): alpha of the soft labels.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, at most 0.
    """
    similarity = similarity.float()
    log_s = -math.log(decay) * frame_distance(spans, similarity.shape[-1]).float()
    log_not_s = torch.log(-torch.expm1(log_s))  # log(1 - s); -inf inside the span, where the second term vanishes
    inside = torch.logaddexp(log_s + F.logsigmoid(similarity), log_not_s + F.logsigmoid(-similarity))
    mask = evidence_mask[:, :, None] & frame_mask[:, None, :]
    return torch.where(mask, inside, 0.0).sum(dim=(1, 2))


__all__ = [
    "ROLE_ANSWER",
    "ROLE_GROUNDING",
    "ROLE_QUESTION",
    "EvidenceHead",
    "consistency_loss",
    "decode_spans",
    "evidence_similarity",
    "frame_distance",
    "grounding_log_likelihood",
    "grounding_loss",
    "masked_mean",
    "pair_by_rank",
    "pool_spans",
    "soft_targets",
]
