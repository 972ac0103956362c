# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""D2VLM for conditional generation: the backbone, a language-modelling head and two evidence heads."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .backbone_d2vlm import D2VLMModel, D2VLMPreTrainedModel
from .configuration_d2vlm import D2VLMConfig
from .evidence_d2vlm import (
    ROLE_QUESTION,
    EvidenceHead,
    consistency_loss,
    evidence_similarity,
    grounding_loss,
    soft_targets,
)
from .generation_d2vlm import D2VLMGenerationMixin
from .sequence_d2vlm import take_columns, token_columns


MASKED_LOGIT = -1e4
"""Value of `evidence_logits` where there is no frame or no token: its sigmoid is exactly 0, its gradient finite."""


@dataclass
class D2VLMOutput(ModelOutput):
    """Result of a forward pass, the same in train and in eval mode.

    Attributes:
        loss (`torch.Tensor` of shape `()`): `lm_loss + grounding_weight * grounding_loss + consistency_weight *
            consistency_loss`.
        lm_loss, grounding_loss, consistency_loss (`torch.Tensor` of shape `()`): Its parts; present with `labels`.
        logits (`torch.Tensor` of shape `(rows, kept, vocabulary)`): See `logits_to_keep`.
        token_logps (`torch.Tensor` of shape `(rows, S)`): With `labels`: log-probability of each labelled token,
            else 0.
        evidence_logits (`torch.Tensor` of shape `(rows, E, T)`): Similarity of every `<evi>` of the response, float32.
        evidence_queries (`torch.Tensor` of shape `(rows, E, H)`): `evidence_head(h)` of the same tokens.
        next_query (`torch.Tensor` of shape `(rows, H)`): `evidence_head(h)` of the last position, for generation.
        frame_states, frame_keys (`torch.Tensor` of shape `(rows, T, H)`): `m_t` and `frame_head(f_t)`.
        frame_mask (`torch.BoolTensor` of shape `(rows, T)`): True on real frames.
        past_key_values, hidden_states, attentions: As in transformers.
    """

    loss: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    grounding_loss: torch.Tensor | None = None
    consistency_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    token_logps: torch.Tensor | None = None
    evidence_logits: torch.Tensor | None = None
    evidence_queries: torch.Tensor | None = None
    next_query: torch.Tensor | None = None
    frame_states: torch.Tensor | None = None
    frame_keys: torch.Tensor | None = None
    frame_mask: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class D2VLMForConditionalGeneration(D2VLMPreTrainedModel, D2VLMGenerationMixin):
    """D2VLM with its language-modelling head and the two evidence heads: the whole model, what users load."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: D2VLMConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.model = D2VLMModel(config)
        self.lm_head = nn.Linear(hidden_size, config.text_config.vocab_size, bias=False)
        self.evidence_head = EvidenceHead(hidden_size)
        self.frame_head = EvidenceHead(hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_video_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`D2VLMModel.get_video_features`]."""
        return self.model.get_video_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        evidence_spans: torch.Tensor | None = None,
        evidence_role: torch.Tensor | None = None,
        evidence_embeds: torch.Tensor | None = None,
        evidence_trace: Any = None,
        labels: torch.Tensor | None = None,
        prompt_length: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_evidence_samples: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        **kwargs,
    ) -> D2VLMOutput:
        r"""One pass over V videos, B prompts and `rows` = B or 2B responses (all first ones, then all second ones).

        Args:
            input_ids, attention_mask, position_ids (`torch.LongTensor` of shape `(rows, S)`): As in transformers.
            pixel_values_videos (`torch.Tensor` of shape `(sum of T, 3, height, width)`): Frames of all videos, packed.
            num_frames (`torch.LongTensor` of shape `(V,)`): T of each video.
            qformer_input_ids, qformer_attention_mask (`torch.LongTensor` of shape `(B, S')`): Questions for the
                Q-Former.
            video_index (`torch.LongTensor` of shape `(B,)`, *optional*): Which video each prompt asks about.
            patch_features (`torch.Tensor` of shape `(sum of T, P, D)`, *optional*): Instead of pixels.
            mm_encoder_outputs (`dict`, *optional*): `{"video": get_video_features(...)}`, instead of pixels.
            evidence_spans (`torch.LongTensor` of shape `(rows, E, 2)`):
                First and last frame of every `<evi>`, in sequence order, padded with -1.
            evidence_role (`torch.LongTensor` of shape `(rows, E)`): 0 question, 1 grounding, 2 answer, -1 padding.
            evidence_embeds (`torch.Tensor` of shape `(rows, 1, H)`): Set by `generate` for a token that was just
                chosen.
            evidence_trace (`EvidenceTrace`): Named here so that `generate` lets it pass; not read.
            labels (`torch.LongTensor` of shape `(rows, S)`): Target ids, -100 where there is none.
            prompt_length (`int`, *optional*):
                Columns of the left-padded prompts. If given, prompts run once and responses run against their cache.
            num_items_in_batch, num_evidence_samples (*optional*):
                Labelled tokens and samples with events in the global accumulated batch, to normalise the losses by.
            logits_to_keep (`int`, *optional*):
                Positions at the end to return logits for, 0 for all that were computed. Default: all without `labels`,
                none with `labels` (the head then runs at labelled positions only).

        Raises:
            ValueError: counts of frames, placeholders, `<evi>` tokens and spans that do not agree, naming the values.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values_videos=pixel_values_videos,
            num_frames=num_frames,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            video_index=video_index,
            patch_features=patch_features,
            mm_encoder_outputs=mm_encoder_outputs,
            evidence_spans=evidence_spans,
            evidence_role=evidence_role,
            evidence_embeds=evidence_embeds,
            prompt_length=prompt_length,
            use_cache=use_cache,
            **kwargs,
        )
        result = D2VLMOutput(
            next_query=self.evidence_head(outputs.evidence_states[:, -1]),
            frame_states=outputs.frame_states,
            frame_mask=outputs.frame_mask,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if outputs.frame_evidence_states is not None:
            result.frame_keys = self.frame_head(outputs.frame_evidence_states)
        if evidence_role is not None and result.frame_keys is not None:
            self._score_evidence(result, outputs, input_ids, inputs_embeds, evidence_role)
        if labels is None or logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
            result.logits = self._logits(outputs.last_hidden_state[:, kept])
        if labels is not None:
            if prompt_length is not None and bool((labels[:, :prompt_length] != -100).any()):
                raise ValueError(
                    f"labels has targets inside the prompt, before column {prompt_length}: with prompt_length the "
                    "prompts are not scored. Label the response only, or leave prompt_length out."
                )
            self._add_losses(
                result, outputs, labels, evidence_spans, evidence_role, num_items_in_batch, num_evidence_samples
            )
        return D2VLMOutput(**result)  # in the order of the fields: the loss comes first

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(states)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)  # Gemma
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _score_evidence(self, result, outputs, input_ids, inputs_embeds, role) -> None:
        """Queries and similarity curves of the response's `<evi>` tokens, each read one column earlier."""
        mask = self.model.token_mask(input_ids, inputs_embeds, self.config.evidence_token_id)
        columns = token_columns(mask, role.shape[1]) - 1 - outputs.first_column
        result.evidence_queries = self.evidence_head(take_columns(outputs.evidence_states, columns.clamp(min=0)))
        similarity = evidence_similarity(result.evidence_queries, result.frame_keys)  # (rows, E, T)
        real = (role > ROLE_QUESTION)[:, :, None] & outputs.frame_mask[:, None, :]
        result.evidence_logits = similarity.masked_fill(~real, MASKED_LOGIT)

    def _add_losses(self, result, outputs, labels, spans, role, num_items, num_evidence_samples) -> None:
        """The SFT loss and its parts, normalised over this batch or over the global one."""
        first = outputs.first_column + 1
        targets = labels[:, first:]
        scored = targets != -100
        logits = self._logits(outputs.last_hidden_state[:, :-1][scored]).float()  # (labelled, vocabulary)
        logps = -F.cross_entropy(logits, targets[scored], reduction="none")
        result.token_logps = F.pad(
            torch.zeros_like(targets, dtype=logps.dtype).masked_scatter(scored, logps), (first, 0)
        )
        count = scored.sum().clamp(min=1) if num_items is None else num_items
        result.lm_loss = result.loss = -logps.sum() / count
        if result.evidence_logits is None:
            return
        similarity = result.evidence_logits
        response = role > ROLE_QUESTION
        targets = soft_targets(spans, similarity.shape[-1], self.config.evidence_decay)
        samples = response.any(1).sum().clamp(min=1) if num_evidence_samples is None else num_evidence_samples
        result.grounding_loss = grounding_loss(similarity, targets, response, outputs.frame_mask).sum() / samples
        result.consistency_loss = consistency_loss(result.evidence_queries, role).sum() / samples
        result.loss = (
            result.lm_loss
            + self.config.grounding_weight * result.grounding_loss
            + self.config.consistency_weight * result.consistency_loss
        )


D2VLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["D2VLMForConditionalGeneration", "D2VLMModel", "D2VLMOutput", "D2VLMPreTrainedModel"]
