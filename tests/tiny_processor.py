# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny model and the processor that belongs to it, and a model that says what a test wants it to say."""

from dataclasses import dataclass, field

import pytest
import torch
from tiny_models import IMAGE, tiny_config, tiny_model
from tiny_tokenizers import build_bpe_tokenizer, build_wordpiece_qformer_tokenizer
from transformers import LogitsProcessor

from d2vlm_hf.model.modeling_d2vlm import D2VLMForConditionalGeneration
from d2vlm_hf.model.processing_d2vlm import D2VLMProcessor
from d2vlm_hf.model.video_processing_d2vlm import D2VLMVideoProcessor


def tiny_processor(tokenizer=None, qformer: bool = True, template: str = "phi3", **video_options) -> D2VLMProcessor:
    """A processor with the vision tower's tiny frame size, 2 frames a second."""
    size = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
    return D2VLMProcessor(
        D2VLMVideoProcessor(**{"fps": 2.0, **size, **video_options}),
        build_bpe_tokenizer() if tokenizer is None else tokenizer,
        build_wordpiece_qformer_tokenizer() if qformer else None,
        chat_template=template,
    )


def model_for(processor: D2VLMProcessor, seed: int = 0, **changes) -> D2VLMForConditionalGeneration:
    """A tiny model whose vocabularies and token ids are the processor's."""
    connector = "mlp" if processor.qformer_tokenizer is None else "qformer"
    if connector == "qformer":
        qformer_config = tiny_config().qformer_config
        qformer_config.vocab_size = len(processor.qformer_tokenizer)
        changes["qformer_config"] = qformer_config
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 512, "bos_token_id": None}
    text |= {"pad_token_id": processor.pad_token_id, "eos_token_id": processor.end_of_turn_id}
    return tiny_model(
        connector=connector,
        seed=seed,
        text_changes=text | changes.pop("text_changes", {}),
        video_token_id=processor.video_token_id,
        evidence_token_id=processor.evidence_token_id,
        evidence_end_token_id=processor.evidence_end_token_id,
        **changes,
    )


@dataclass
class Scripted(LogitsProcessor):
    """Makes `generate` write given tokens, then end: row i writes `rows[i]` whatever the model thinks.

    Args:
        rows: Token ids of each row.
        end: Token written after them.
    """

    rows: list[list[int]]
    end: int
    _start: int | None = field(default=None, repr=False)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._start is None or input_ids.shape[1] < self._start:
            self._start = input_ids.shape[1]
        step = input_ids.shape[1] - self._start
        forced = torch.full_like(scores, -float("inf"))
        for row in range(len(scores)):
            ids = self.rows[row % len(self.rows)]
            forced[row, ids[step] if step < len(ids) else self.end] = 0.0
        return forced


def assert_same(one, other) -> None:
    """Equal up to what a batch changes in the last digits of a score."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-5)
    else:
        assert one == other
