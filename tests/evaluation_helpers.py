# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What the evaluation tests share: golden values, one caption scorer for the whole run, and a comparison of results."""

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from d2vlm_hf.evaluation.text_metrics import CaptionScorer, SentenceSimilarity, java_reason


GOLDEN = Path(__file__).parent / "golden" / "eval"
REFERENCE_VARIABLE = "D2VLM_REFERENCE_DATA"

needs_java = pytest.mark.skipif(java_reason() is not None, reason=f"caption metrics: {java_reason()}")


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def reference(name: str) -> dict:
    """Golden values on excerpts of research data, which may not be copied; skips visibly where they are not."""
    folder = os.environ.get(REFERENCE_VARIABLE)
    path = Path(folder or "") / "third_party" / name
    if not folder or not path.is_file():
        pytest.skip(f"{name} holds excerpts of research data; set {REFERENCE_VARIABLE} to the folder that has it")
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def shared_scorer() -> CaptionScorer:
    """METEOR takes seconds to start, so one scorer serves every test of the run."""
    return CaptionScorer()


@functools.cache
def shared_similarity() -> SentenceSimilarity:
    return SentenceSimilarity()


def needs_similarity() -> None:
    if shared_similarity().reason:
        pytest.skip(f"sentence similarity: {shared_similarity().reason}")


def mismatches(wanted, found, path="", tolerance: float = 5e-6, loose: Mapping[str, float] | None = None) -> list[str]:
    """Every value of `wanted` that `found` does not have within the tolerance, with its path; null means NaN."""
    if isinstance(wanted, Mapping):
        return [
            fault
            for key, value in wanted.items()
            for fault in mismatches(
                value,
                found.get(key) if isinstance(found, Mapping) else None,
                f"{path}/{key}",
                (loose or {}).get(key, tolerance),
                loose,
            )
        ]
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        if not isinstance(found, Sequence) or len(found) != len(wanted):
            return [f"{path}: {found!r} instead of {wanted!r}"]
        return [
            fault
            for n, pair in enumerate(zip(wanted, found, strict=True))
            for fault in mismatches(*pair, f"{path}/{n}", tolerance, loose)
        ]
    if wanted is None and isinstance(found, float) and math.isnan(found):
        return []
    if isinstance(wanted, int | float) and isinstance(found, int | float):
        same = math.isclose(wanted, found, rel_tol=0.0, abs_tol=tolerance)
    else:
        same = wanted == found
    return [] if same else [f"{path}: {found!r} instead of {wanted!r}"]


def count_values(wanted) -> int:
    """How many single values a golden entry holds."""
    if isinstance(wanted, Mapping):
        return sum(count_values(value) for value in wanted.values())
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return sum(count_values(value) for value in wanted)
    return 1
