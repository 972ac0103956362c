# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Generation with evidence: each chosen `<evi>` decodes a span, whose frames are then read by the next step.

The order inside `generate` is: forward -> `_update_model_kwargs_for_generation` (the query that the forward produced is
noted in the trace) -> a token is chosen -> `prepare_inputs_for_generation` (if it is `<evi>`, its span is decoded with
that query and pooled) -> forward. All of it lives in a per-call `EvidenceTrace`; nothing is kept on the module.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationMixin, TextStreamer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .evidence_d2vlm import decode_spans, evidence_similarity, pool_spans


@dataclass
class EvidenceTrace:
    """What one `generate` call saw and decoded; `rows` = batch size x `num_return_sequences`.

    Attributes:
        frame_states (`torch.Tensor` of shape `(rows, T, H)`): `m_t`, what a decoded span is filled with.
        frame_keys (`torch.Tensor` of shape `(rows, T, H)`): `frame_head(f_t)`.
        frame_mask (`torch.BoolTensor` of shape `(rows, T)`): True on real frames.
        query (`torch.Tensor` of shape `(rows, H)`): `evidence_head(h)` of the state that predicts the next token.
        spans (`list[list[tuple[int, int]]]`): Per row, first and last frame of each generated `<evi>`, in order.
        scores (`list[list[float]]`): Per row, mean probability over each span.
        curves (`list[list[torch.Tensor]]`): Per row, frame probabilities `(T,)` of each `<evi>`, padding cut off.
    """

    frame_states: torch.Tensor | None = None
    frame_keys: torch.Tensor | None = None
    frame_mask: torch.Tensor | None = None
    query: torch.Tensor | None = None
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    curves: list[list[torch.Tensor]] = field(default_factory=list)
    streamer: Any = None
    _columns: int = 0

    def update(self, outputs) -> None:
        """Note what a forward produced; the prefill also brings the frames."""
        self.query = outputs.next_query
        if outputs.frame_states is not None:
            self.frame_states, self.frame_keys = outputs.frame_states, outputs.frame_keys
            self.frame_mask = outputs.frame_mask
        if not self.spans:
            self.spans, self.scores, self.curves = ([[] for _ in self.query] for _ in range(3))

    def capture(self, input_ids: torch.Tensor, config) -> torch.Tensor:
        """Decode and pool for the rows whose newest token is `<evi>`.

        Args:
            input_ids (`torch.LongTensor` of shape `(rows, N)`): Everything up to and including the new token.
            config (`D2VLMConfig`): Token ids and thresholds.

        Returns:
            `torch.Tensor` of shape `(rows, 1, H)` to add to the embedding of the new token; zeros in the other rows.
        """
        self._columns = input_ids.shape[1]
        is_evidence = input_ids[:, -1] == config.evidence_token_id
        embeds = torch.zeros_like(self.query)[:, None]
        if self.frame_states is None or not is_evidence.any():
            return embeds
        similarity = evidence_similarity(self.query[:, None], self.frame_keys)[:, 0]  # (rows, T)
        spans, scores = decode_spans(similarity, self.frame_mask, config.evidence_threshold)
        self._record(is_evidence, similarity, spans, scores)
        if not config.visual_capture:
            return embeds
        pooled = pool_spans(self.frame_states, spans[:, None])
        return torch.where(is_evidence[:, None, None], pooled, embeds)

    def finish(self, sequences: torch.Tensor, config) -> None:
        """Decode the span of a last token that no further forward has read."""
        if sequences.shape[1] > self._columns and self.query is not None:
            self.capture(sequences, config)

    def _record(self, is_evidence, similarity, spans, scores) -> None:
        probability = similarity.sigmoid()
        for row in is_evidence.nonzero().flatten().tolist():
            self.spans[row].append(tuple(spans[row].tolist()))
            self.scores[row].append(scores[row].item())
            self.curves[row].append(probability[row][self.frame_mask[row]].cpu())
            if self.streamer is not None:
                self.streamer.put_evidence(self.spans[row][-1], self.scores[row][-1])


@dataclass
class D2VLMGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` and the `EvidenceTrace` of the call."""

    evidence_trace: EvidenceTrace | None = None


class EvidenceStreamer(TextStreamer):
    """Prints the answer as it is generated, with each span at the place of its `<evi>`.

    Args:
        tokenizer: The tokenizer that decodes the tokens.
        times (sequence of `float`, *optional*): Seconds of each frame. Without it frame indices are printed.
        skip_prompt, decode_kwargs: As in `TextStreamer`.
    """

    def __init__(self, tokenizer, times=None, skip_prompt: bool = True, **decode_kwargs):
        decode_kwargs.setdefault("skip_special_tokens", True)
        super().__init__(tokenizer, skip_prompt=skip_prompt, **decode_kwargs)
        self.times = times

    def put_evidence(self, span: tuple[int, int], score: float) -> None:
        """Print one decoded span; called by the `EvidenceTrace` right after the token."""
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs) if self.token_cache else ""
        pending, self.print_len = text[self.print_len :], len(text)
        if self.times is None:
            place = f"[frames {span[0]}-{span[1]}, {score:.2f}]"
        else:
            place = f"[{self.times[span[0]]:.1f}s - {self.times[span[1]]:.1f}s, {score:.2f}]"
        # the tokens stay in the cache: many tokenizers drop the space before the first word that they decode
        gap = "" if text.endswith(" ") else " "
        self.on_finalized_text(f"{pending}{gap}{place}" if text else f"{place} ")


class D2VLMGenerationMixin(GenerationMixin):
    """`generate` for models whose forward returns `next_query`, `frame_states`, `frame_keys` and `frame_mask`."""

    def generate(self, *args, streamer=None, evidence_trace: EvidenceTrace | None = None, **kwargs):
        """As `GenerationMixin.generate`; with `return_dict_in_generate=True` the result has an `evidence_trace`.

        Args:
            evidence_trace (`EvidenceTrace`, *optional*): A trace to empty and fill; handy when plain ids are returned.
            streamer (*optional*): One with `put_evidence`, as `EvidenceStreamer`, also hears of every span.

        Raises:
            ValueError: beam search, assisted decoding, `use_cache=False`, chunked prefill, a cache from another call.
        """
        trace = EvidenceTrace() if evidence_trace is None else evidence_trace
        vars(trace).update(vars(EvidenceTrace()))  # nothing is left of an earlier call
        if kwargs.get("mm_encoder_outputs"):  # rewritten in place for `num_return_sequences`: not the caller's
            kwargs["mm_encoder_outputs"] = {name: copy.copy(x) for name, x in kwargs["mm_encoder_outputs"].items()}
        if kwargs.get("patch_features") is not None:
            kwargs.setdefault("pixel_values_videos", None)  # transformers encodes ahead only where this name is given
        trace.streamer = streamer if hasattr(streamer, "put_evidence") else None
        result = super().generate(*args, streamer=streamer, evidence_trace=trace, **kwargs)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        trace.finish(sequences, self.config)
        if isinstance(result, GenerateDecoderOnlyOutput):
            return D2VLMGenerateOutput(**result, evidence_trace=trace)
        return result

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"generation mode '{generation_mode.value}' (num_beams={generation_config.num_beams}) cannot carry "
                "evidence: beams and drafts are reordered without their spans. Use greedy decoding or sampling "
                "(num_beams=1)."
            )
        if generation_config.use_cache is False:
            raise ValueError(
                "use_cache=False cannot carry evidence: the spans of earlier <evi> tokens would be lost at every step. "
                "Leave use_cache on."
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} would split the frames, which attend to "
                "each other in both directions. Leave prefill_chunk_size unset."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        evidence_trace=None,
        evidence_spans=None,
        evidence_role=None,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,  # named, so that `generate` takes embeddings in place of ids
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration:
            model_inputs["evidence_embeds"] = evidence_trace.capture(input_ids, self.config)
            return model_inputs
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values already holds {past_key_values.get_seq_length()} tokens: a cache from another call "
                "lacks the states of its frames. Start from the whole prompt."
            )
        # The model itself lays the bidirectional frame block over the mask, so it gets the plain one.
        model_inputs["attention_mask"] = attention_mask
        model_inputs["evidence_spans"], model_inputs["evidence_role"] = evidence_spans, evidence_role
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        model_kwargs["evidence_trace"].update(outputs)
        return model_kwargs


__all__ = ["D2VLMGenerateOutput", "D2VLMGenerationMixin", "EvidenceStreamer", "EvidenceTrace"]
