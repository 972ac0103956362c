# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The method, rule by rule: every function of `evidence_d2vlm` against plain Python and against closed forms."""

import math

import pytest
import torch
from torch import nn

from d2vlm_hf.model.evidence_d2vlm import (
    EvidenceHead,
    consistency_loss,
    decode_spans,
    evidence_similarity,
    frame_distance,
    grounding_log_likelihood,
    grounding_loss,
    masked_mean,
    pair_by_rank,
    pool_spans,
    soft_targets,
)


# ---- the method in plain Python: floats, lists, loops -----------------------------------------------------------


def slow_sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slow_distance(span: tuple[int, int], frame: int) -> int:
    return max(span[0] - frame, 0, frame - span[1])


def slow_span(logits: list[float], threshold: float) -> tuple[tuple[int, int], float]:
    """The best contiguous group of kept frames; a later group must be better, not equal."""
    p = [slow_sigmoid(x) for x in logits]
    kept = [value >= threshold * max(p) for value in p]
    best, best_mean = None, -1.0
    t = 0
    while t < len(p):
        if not kept[t]:
            t += 1
            continue
        start = t
        while t < len(p) and kept[t]:
            t += 1
        mean = math.fsum(p[start:t]) / (t - start)
        if mean > best_mean + 1e-12:
            best, best_mean = (start, t - 1), mean
    return best, best_mean


def slow_log_likelihood(logits: list[float], span: tuple[int, int], alpha: float) -> float:
    """The naive formula; fine while nothing underflows."""
    total = 0.0
    for t, x in enumerate(logits):
        s, p = alpha ** -slow_distance(span, t), slow_sigmoid(x)
        total += math.log(s * p + (1 - s) * (1 - p))
    return total


def slow_entropy(x: float, target: float) -> float:
    p = slow_sigmoid(x)
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def random_spans(frames: int, count: int) -> torch.Tensor:
    return torch.randint(0, frames, (count, 2)).sort(-1).values


# ---- similarity -------------------------------------------------------------------------------------------------


def test_evidence_head_is_layernorm_linear_to_half_gelu_linear_back():
    head = EvidenceHead(8)
    assert [type(part) for part in head] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert (head[1].in_features, head[1].out_features, head[3].in_features, head[3].out_features) == (8, 4, 4, 8)


def test_similarity_is_the_dot_product_over_sqrt_h():
    queries, keys = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    similarity = evidence_similarity(queries, keys)  # (B, E, T)
    for b, e, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        dot = sum(q * k for q, k in zip(queries[b, e].tolist(), keys[b, t].tolist(), strict=True))
        assert similarity[b, e, t].item() == pytest.approx(dot / math.sqrt(8), abs=1e-5)


def test_similarity_is_float32_for_bfloat16_states_and_under_autocast():
    queries, keys = torch.randn(1, 2, 16), torch.randn(1, 6, 16)
    expected = evidence_similarity(queries, keys)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(evidence_similarity(queries, keys), expected)
        low = evidence_similarity(queries.bfloat16(), keys.bfloat16())
    assert low.dtype == torch.float32
    assert torch.equal(low, evidence_similarity(queries.bfloat16().float(), keys.bfloat16().float()))


# ---- soft labels: s_t = alpha ** -d -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.5, 2.0, 10.0])
def test_soft_target_is_alpha_to_the_minus_distance(alpha):
    spans = random_spans(9, 20)
    distance, targets = frame_distance(spans, 9), soft_targets(spans, 9, alpha)
    assert distance.dtype == torch.int64
    assert targets.dtype == torch.float32
    for row, span in enumerate(spans.tolist()):
        expected = [slow_distance(span, t) for t in range(9)]
        assert distance[row].tolist() == expected
        assert targets[row].tolist() == pytest.approx([alpha**-d for d in expected], rel=1e-6)


def test_soft_target_of_the_paper_halves_with_every_frame():
    targets = soft_targets(torch.tensor([[2, 3]]), 7)
    assert torch.allclose(targets, torch.tensor([[0.25, 0.5, 1.0, 1.0, 0.5, 0.25, 0.125]]), rtol=1e-6, atol=0)
    assert (soft_targets(torch.tensor([0, 6]), 7) == 1).all()  # the span is the whole video


def test_soft_targets_keep_every_leading_dimension():
    spans = random_spans(5, 6)
    assert torch.equal(soft_targets(spans.view(2, 3, 2), 5), soft_targets(spans, 5).view(2, 3, 5))


# ---- decoding: threshold 0.6, contiguous groups, highest mean, ties to the earliest ------------------------------


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).logit().float()


def test_decoding_keeps_frames_at_six_tenths_of_the_maximum():
    # 0.6 * 0.5 = 0.3: frame 1 (0.31) is kept, frame 4 (0.29) is not
    spans, scores = decode_spans(logits_of(0.1, 0.31, 0.5, 0.4, 0.29))
    assert spans.tolist() == [1, 3]
    assert scores.item() == pytest.approx((0.31 + 0.5 + 0.4) / 3, rel=1e-5)
    assert decode_spans(logits_of(0.1, 0.31, 0.5, 0.4, 0.29), threshold=0.7)[0].tolist() == [2, 3]
    assert decode_spans(logits_of(0.1, 0.31, 0.5, 0.4, 0.29), threshold=1.0)[0].tolist() == [2, 2]


def test_decoding_prefers_the_highest_mean_to_the_longest_group_and_to_the_highest_frame():
    spans, scores = decode_spans(logits_of(0.9, 0.6, 0.6, 0.1, 0.85, 0.1, 0.7, 0.7, 0.7))
    assert spans.tolist() == [4, 4]
    assert scores.item() == pytest.approx(0.85, rel=1e-5)


@pytest.mark.parametrize("first", [1, 2, 3, 5])
@pytest.mark.parametrize("second", [1, 3, 7, 40])
def test_decoding_breaks_ties_to_the_earliest_group_whatever_their_lengths(first, second):
    for value in torch.linspace(-3, 9, 25).tolist():  # a rounded sum of equal numbers is no multiple of them
        curve = torch.tensor([-15.0] + [value] * first + [-15.0] + [value] * second)
        assert decode_spans(curve)[0].tolist() == [1, first], value


def test_decoding_never_merges_tied_groups_across_the_gap():
    # what the authors' released code does, and what is not copied
    assert decode_spans(logits_of(0.8, 0.1, 0.8))[0].tolist() == [0, 0]


def test_decoding_one_frame_and_equal_frames():
    assert decode_spans(torch.tensor([[-30.0]]))[0].tolist() == [[0, 0]]
    for value in (-200.0, -3.0, 0.0, 50.0):  # at -200 every probability underflows to 0
        spans, scores = decode_spans(torch.full((4,), value))
        assert spans.tolist() == [0, 3]
        assert scores.item() == pytest.approx(slow_sigmoid(value))


def test_decoding_never_chooses_a_padding_frame():
    mask = torch.tensor([True, True, True, False, False])
    curve = torch.tensor([-1.0, -9.0, -2.0, 8.0, 9.0])  # the padding looks best
    assert decode_spans(curve, mask)[0].tolist() == [0, 0]
    assert decode_spans(torch.full((5,), -300.0), mask)[0].tolist() == [0, 2]
    assert decode_spans(torch.full((5,), 2.0), mask)[0].tolist() == [0, 2]
    spans, scores = decode_spans(torch.stack([curve, -curve]), torch.stack([mask, ~mask]))
    assert spans.tolist() == [[0, 0], [3, 3]]
    assert scores[0].item() == pytest.approx(slow_sigmoid(-1.0))


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.95])
def test_decoding_equals_the_loop(threshold):
    curves = torch.randn(300, 12) * torch.tensor([0.3, 2.0, 6.0]).repeat(100)[:, None]
    lengths = torch.randint(1, 13, (300,))
    mask = torch.arange(12) < lengths[:, None]
    spans, scores = decode_spans(curves, mask, threshold)
    assert spans.dtype == torch.int64
    assert scores.dtype == torch.float32
    for row, length in enumerate(lengths.tolist()):
        span, score = slow_span(curves[row, :length].tolist(), threshold)
        assert tuple(spans[row].tolist()) == span
        assert scores[row].item() == pytest.approx(score, rel=1e-5)


def test_decoding_is_not_coarsened_by_bfloat16_or_autocast():
    # logits 6 and 7 have one bfloat16 sigmoid; 5.0 and 5.05 are one bfloat16 logit
    curve = torch.tensor([5.0, -9.0, 6.0, -9.0, 7.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decode_spans(curve.bfloat16())[0].tolist() == [4, 4]
        assert decode_spans(torch.tensor([5.0, -9.0, 5.05]))[0].tolist() == [2, 2]
    assert not decode_spans(torch.randn(3, 4, requires_grad=True))[1].requires_grad


# ---- visual capture ---------------------------------------------------------------------------------------------


def test_pooling_is_the_mean_of_the_states_in_the_span_and_zero_for_padding():
    states = torch.randn(2, 6, 4)
    spans = torch.tensor([[[0, 0], [1, 4], [0, 5]], [[3, 5], [5, 5], [-1, -1]]])
    pooled = pool_spans(states, spans)  # (2, 3, 4)
    for row in range(2):
        for event, (first, last) in enumerate(spans[row].tolist()):
            members = [states[row, t] for t in range(6) if 0 <= first <= t <= last]
            expected = sum(members) / len(members) if members else torch.zeros(4)
            assert torch.allclose(pooled[row, event], expected, atol=1e-6)
    assert pool_spans(states, spans[:, :0]).shape == (2, 0, 4)
    assert pool_spans(states.bfloat16(), spans).dtype == torch.bfloat16


def test_pooling_has_the_right_gradient():
    states = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: pool_spans(s, torch.tensor([[[1, 2], [0, 3], [-1, -1]]])), states)


# ---- grounding loss ---------------------------------------------------------------------------------------------


def evidence_case():
    """Three rows: two events and padded frames, one event, no event."""
    similarity = torch.randn(3, 2, 6) * 3
    spans = torch.tensor([[[1, 2], [3, 3]], [[0, 4], [-1, -1]], [[-1, -1], [-1, -1]]])
    evidence_mask = torch.tensor([[True, True], [True, False], [False, False]])
    lengths = [4, 6, 5]
    frame_mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    return similarity, spans, evidence_mask, frame_mask, lengths


def test_grounding_loss_is_the_mean_binary_cross_entropy_over_events_and_frames():
    similarity, spans, evidence_mask, frame_mask, lengths = evidence_case()
    loss = grounding_loss(similarity, soft_targets(spans, 6), evidence_mask, frame_mask)
    for row, length in enumerate(lengths):
        entropies = [
            slow_entropy(similarity[row, e, t].item(), 2.0 ** -slow_distance(spans[row, e].tolist(), t))
            for e in range(2)
            for t in range(length)
            if evidence_mask[row, e]
        ]
        assert loss[row].item() == pytest.approx(sum(entropies) / max(len(entropies), 1), rel=1e-5)


def test_grounding_loss_is_log_two_at_zero_logits_and_zero_without_events():
    _, spans, evidence_mask, frame_mask, _ = evidence_case()
    zeros = torch.zeros(3, 2, 6, requires_grad=True)
    loss = grounding_loss(zeros, soft_targets(spans, 6), evidence_mask, frame_mask)
    assert loss.tolist() == pytest.approx([math.log(2), math.log(2), 0.0])
    loss.sum().backward()
    assert (zeros.grad[2] == 0).all()  # no event
    assert (zeros.grad[0, :, 4:] == 0).all()  # padded frames
    assert (zeros.grad[1, 1] == 0).all()  # padded event


def test_grounding_loss_of_no_evidence_column_at_all_is_zero_with_a_gradient():
    queries = torch.randn(2, 0, 8, requires_grad=True)
    keys = torch.randn(2, 5, 8, requires_grad=True)
    similarity = evidence_similarity(queries, keys)
    mask, frames = torch.zeros(2, 0, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    spans = torch.zeros(2, 0, 2, dtype=torch.long)
    total = grounding_loss(similarity, soft_targets(spans, 5), mask, frames).sum()
    total = total + consistency_loss(queries, torch.zeros(2, 0, dtype=torch.long)).sum()
    total = total + grounding_log_likelihood(similarity, spans, mask, frames).sum()
    assert total.item() == 0
    total.backward()
    assert (keys.grad == 0).all()
    assert decode_spans(similarity.detach())[0].shape == (2, 0, 2)


def test_grounding_loss_is_float32_for_bfloat16_and_under_autocast():
    similarity, spans, evidence_mask, frame_mask, _ = evidence_case()
    similarity, targets = similarity.bfloat16(), soft_targets(spans, 6)
    expected = grounding_loss(similarity.float(), targets, evidence_mask, frame_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = grounding_loss(similarity, targets, evidence_mask, frame_mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


# ---- consistency: the k-th event of the grounding part with the k-th of the answer -------------------------------


def test_pairs_are_made_by_rank():
    role = torch.tensor([[0, 1, 1, 2, 2], [1, 2, 2, -1, -1], [1, 1, 1, 2, -1], [0, -1, -1, -1, -1]])
    grounding, answer, valid = pair_by_rank(role)
    pairs = [
        [(g, a) for g, a, v in zip(*rows, strict=True) if v]
        for rows in zip(grounding.tolist(), answer.tolist(), valid.tolist(), strict=True)
    ]
    assert pairs == [[(1, 3), (2, 4)], [(0, 1)], [(0, 3)], []]  # K differs: only common ranks


def test_consistency_is_the_mean_absolute_difference_of_pairs():
    queries = torch.randn(3, 5, 4)
    role = torch.tensor([[0, 1, 1, 2, 2], [1, 1, 2, -1, -1], [2, 2, -1, -1, -1]])
    loss = consistency_loss(queries, role)
    for row, pairs in enumerate([[(1, 3), (2, 4)], [(0, 2)], []]):
        parts = [(queries[row, g] - queries[row, a]).abs().mean().item() for g, a in pairs]
        assert loss[row].item() == pytest.approx(sum(parts) / max(len(parts), 1), rel=1e-5)


def test_consistency_is_zero_for_equal_queries_and_float32_for_bfloat16():
    role = torch.tensor([[1, 1, 2, 2]])
    half = torch.randn(1, 2, 4)
    assert consistency_loss(torch.cat([half, half], 1), role).item() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert consistency_loss(torch.randn(1, 4, 4).bfloat16(), role).dtype == torch.float32


def test_consistency_has_the_right_gradient_and_none_for_unpaired_tokens():
    queries = torch.randn(1, 4, 3, requires_grad=True)
    consistency_loss(queries, torch.tensor([[0, 1, 1, 2]])).sum().backward()
    sign = (queries.detach()[0, 1] - queries.detach()[0, 3]).sign() / 3
    expected = torch.stack([torch.zeros(3), sign, torch.zeros(3), -sign])[None]
    assert torch.allclose(queries.grad, expected)


# ---- factorized preference: log pi(y) of the grounding -----------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_log_likelihood_is_the_bernoulli_mixture_of_the_paper(alpha):
    similarity, spans, evidence_mask, frame_mask, lengths = evidence_case()
    value = grounding_log_likelihood(similarity, spans, evidence_mask, frame_mask, alpha)
    for row, length in enumerate(lengths):
        expected = sum(
            slow_log_likelihood(similarity[row, e, :length].tolist(), spans[row, e].tolist(), alpha)
            for e in range(2)
            if evidence_mask[row, e]
        )
        assert value[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def one_event(logits: list[float], span: tuple[int, int], dtype=torch.float32, **kwargs) -> torch.Tensor:
    similarity = torch.tensor([[logits]], dtype=dtype)
    ones = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, len(logits), dtype=torch.bool)
    return grounding_log_likelihood(similarity, torch.tensor([[span]]), *ones, **kwargs)[0]


def test_log_likelihood_inside_the_span_is_log_p_and_at_distance_one_log_half():
    # alpha = 2: at d = 1 both outcomes weigh one half, whatever p is
    for x in (-8.0, 0.0, 3.0):
        assert one_event([x], (0, 0)).item() == pytest.approx(math.log(slow_sigmoid(x)), rel=1e-6)
        inside_and_next = one_event([x, x], (0, 0)).item()
        assert inside_and_next == pytest.approx(math.log(slow_sigmoid(x)) + math.log(0.5), rel=1e-6)


def test_log_likelihood_is_not_the_negative_cross_entropy():
    logits, span = [0.5, -1.0, 2.0, -0.3], (1, 1)
    entropy = sum(slow_entropy(x, 2.0 ** -slow_distance(span, t)) for t, x in enumerate(logits))
    assert abs(one_event(logits, span).item() + entropy) > 0.1


@pytest.mark.parametrize("x", [1e4, -1e4, 88.0, -104.0])
def test_log_likelihood_and_its_gradient_are_finite_at_extreme_logits(x):
    similarity = torch.full((1, 1, 40), x, requires_grad=True)
    ones = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 40, dtype=torch.bool)
    value = grounding_log_likelihood(similarity, torch.tensor([[[0, 1]]]), *ones)
    value.sum().backward()
    # p is 0 or 1: log s where p = 1, log(1 - s) where p = 0; log p inside
    if x > 0:
        expected = sum(-math.log(2) * max(t - 1, 0) for t in range(40))
    else:
        expected = 2 * x + sum(math.log1p(-(2.0 ** -(t - 1))) for t in range(2, 40))
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert similarity.grad.isfinite().all()


def test_log_likelihood_has_the_closed_form_gradient():
    # d/dx log(s p + (1 - s)(1 - p)) = (2 s - 1) p (1 - p) / (s p + (1 - s)(1 - p))
    similarity = (torch.randn(1, 1, 7) * 2).requires_grad_()
    ones = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool)
    grounding_log_likelihood(similarity, torch.tensor([[[2, 3]]]), *ones).sum().backward()
    for t, x in enumerate(similarity[0, 0].tolist()):
        s, p = 2.0 ** -slow_distance((2, 3), t), slow_sigmoid(x)
        expected = (2 * s - 1) * p * (1 - p) / (s * p + (1 - s) * (1 - p))
        assert similarity.grad[0, 0, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_log_likelihood_of_a_thousand_frames_at_zero_logits_is_minus_t_log_two():
    assert one_event([0.0] * 1000, (400, 410)).item() == pytest.approx(-1000 * math.log(2), rel=1e-5)


def test_log_likelihood_is_float32_for_bfloat16_and_under_autocast():
    expected = one_event([5.5, -3.25, 0.5], (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = one_event([5.5, -3.25, 0.5], (0, 1), dtype=torch.bfloat16)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


def test_log_likelihood_ignores_padding_frames_padding_events_and_question_events():
    similarity, spans, evidence_mask, frame_mask, _ = evidence_case()
    value = grounding_log_likelihood(similarity, spans, evidence_mask, frame_mask)
    noisy = similarity.masked_fill(~(evidence_mask[:, :, None] & frame_mask[:, None]), 77.0)
    assert torch.equal(grounding_log_likelihood(noisy, spans, evidence_mask, frame_mask), value)
    assert value[2].item() == 0


def test_masked_mean_is_zero_where_nothing_is_true_and_over_everything_by_default():
    values, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]])
    assert masked_mean(values, mask, dim=1).tolist() == [2.0, 0.0]
    assert masked_mean(values, mask).item() == 2.0
