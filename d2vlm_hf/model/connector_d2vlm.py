# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Connectors: from the patches of a frame to one vector of the text model's width."""

import math

import torch
from torch import nn
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from .configuration_d2vlm import D2VLMConfig


def _normed_linear(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(in_features), nn.Linear(in_features, out_features))


class D2VLMQFormerConnector(nn.Module):
    """Text-conditioned compressor: the question decides which patches of a frame are kept (paper).

    The Q-Former's queries read `LayerNorm(patches)` and the question; then
    `att = softmax(Wq(q) Wk(patches)^T / sqrt(D))` over raw patches, and `Wv(mean over queries of (att @ patches + q))`.
    """

    uses_text = True

    def __init__(self, config: D2VLMConfig):
        super().__init__()
        vision_size = config.vision_config.hidden_size
        query_size = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, query_size))
        self.qformer = InstructBlipQFormerModel._from_config(config.qformer_config)
        self.patch_norm = nn.LayerNorm(vision_size)
        self.query_out = nn.Linear(query_size, vision_size)
        self.attn_query = _normed_linear(vision_size, vision_size)
        self.attn_key = _normed_linear(vision_size, vision_size)
        self.attn_value = _normed_linear(vision_size, config.text_config.hidden_size)

    def forward(
        self, patches: torch.Tensor, text_ids: torch.Tensor | None = None, text_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compress frames.

        Args:
            patches (`torch.Tensor` of shape `(N, P, D)`): Patch features of N frames.
            text_ids, text_mask (`torch.LongTensor` of shape `(N, S)`, *optional*): The question, once per frame.

        Returns:
            `torch.Tensor` of shape `(N, H)`.
        """
        frames, _, width = patches.shape
        queries = self.query_tokens.expand(frames, -1, -1).to(patches.dtype)
        mask = torch.ones(queries.shape[:2], dtype=torch.long, device=patches.device)
        if text_ids is not None:
            mask = torch.cat([mask, text_mask], dim=1)
        queries = self.qformer(
            input_ids=text_ids,
            attention_mask=mask,
            query_embeds=queries,
            encoder_hidden_states=self.patch_norm(patches),
        ).last_hidden_state[:, : queries.shape[1]]  # (N, Q, Hq)
        queries = self.query_out(queries)  # (N, Q, D)
        scores = self.attn_query(queries) @ self.attn_key(patches).transpose(1, 2) / math.sqrt(width)  # (N, Q, P)
        read = scores.softmax(-1) @ patches + queries  # (N, Q, D)
        return self.attn_value(read.mean(dim=1))


class D2VLMMlpConnector(nn.Module):
    """Mean-pooled patches through an MLP; works with any vision tower and does not read the question."""

    uses_text = False

    def __init__(self, config: D2VLMConfig):
        super().__init__()
        vision_size, hidden_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.norm = nn.LayerNorm(vision_size)
        self.up = nn.Linear(vision_size, hidden_size)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, patches: torch.Tensor, text_ids: torch.Tensor | None = None, text_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compress frames: patches `(N, P, D)` -> `(N, H)`; the text is ignored."""
        return self.down(self.act(self.up(self.norm(patches.mean(dim=1)))))


def frame_codes(lengths: list[int], width: int) -> torch.Tensor:
    """Sinusoidal codes of the frame indices of several videos, with periods of 8 to 512 frames.

    Neighbouring frames have nearly the same code, so the mean code of a span is most like those of its frames: a moment
    can be told from another that looks the same.

    Args:
        lengths (`list[int]`): Frames of each video; the index starts again at 0 with each.
        width (`int`): H, even.

    Returns:
        `torch.Tensor` of shape `(sum of lengths, H)`.
    """
    index = torch.cat([torch.arange(length) for length in lengths])
    angles = index[:, None] * (2 * math.pi / torch.logspace(math.log10(8), math.log10(512), width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build_connector(config: D2VLMConfig) -> nn.Module:
    """The connector that `config.connector_type` names."""
    return D2VLMQFormerConnector(config) if config.connector_type == "qformer" else D2VLMMlpConnector(config)


__all__ = ["D2VLMMlpConnector", "D2VLMQFormerConnector", "build_connector", "frame_codes"]
