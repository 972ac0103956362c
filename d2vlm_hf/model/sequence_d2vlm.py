# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The embedded sequence of a batch: where its frames and its evidence tokens stand, and how they are filled."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from .evidence_d2vlm import ROLE_ANSWER, ROLE_QUESTION, pool_spans


def token_columns(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the first `count` True entries of each row, in order. `(rows, S)` -> `(rows, count)`."""
    return torch.argsort((~mask).long(), dim=1, stable=True)[:, :count]


def take_columns(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`(rows, S, H)` at `columns (rows, E)` -> `(rows, E, H)`."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1]))


@dataclass
class EmbeddedSequence:
    """Input embeddings of a batch and the places that evidence is read from and written to.

    Attributes:
        embeds (`torch.Tensor` of shape `(rows, S, H)`): Input embeddings, frames already in place.
        attention_mask, position_ids (`torch.LongTensor` of shape `(rows, S)`).
        video_mask, evidence_mask (`torch.BoolTensor` of shape `(rows, S)`): Where frames and `<evi>` tokens stand.
        frames (`list[torch.Tensor]`, *optional*): Frame vectors of each row, `(T, H)`.
    """

    embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    video_mask: torch.Tensor
    evidence_mask: torch.Tensor
    frames: list[torch.Tensor] | None

    def select(self, rows: int | None = None, columns: slice = slice(None)) -> "EmbeddedSequence":
        """The first `rows` rows and some columns, as views."""
        return EmbeddedSequence(
            self.embeds[:rows, columns],
            self.attention_mask[:rows, columns],
            self.position_ids[:rows, columns],
            self.video_mask[:rows, columns],
            self.evidence_mask[:rows, columns],
            self.frames[:rows] if self.frames else None,
        )

    def frame_mask(self) -> torch.Tensor | None:
        """True on real frames, `(rows, T)`."""
        if not self.frames:
            return None
        lengths = torch.tensor([len(f) for f in self.frames], device=self.embeds.device)
        return torch.arange(max(map(len, self.frames)), device=self.embeds.device) < lengths[:, None]

    def frame_states(self, states: torch.Tensor) -> torch.Tensor:
        """States at the frames' columns: `(rows, S, H)` -> `(rows, T, H)`; padded frames hold arbitrary states."""
        return take_columns(states, token_columns(self.video_mask, max(map(len, self.frames))))

    def check_evidence(self, spans: torch.Tensor | None, role: torch.Tensor | None) -> None:
        """One span per `<evi>`, inside the video.

        Raises:
            ValueError: naming the row and the values.
        """
        if spans is None and role is None:
            spans, role = self.position_ids.new_zeros(len(self.embeds), 0, 2), self.position_ids[:, :0]
        if spans is None or role is None or spans.shape[:2] != role.shape or spans.shape[-1] != 2:
            shapes = [None if x is None else tuple(x.shape) for x in (spans, role)]
            raise ValueError(
                f"evidence_spans has shape {shapes[0]} and evidence_role {shapes[1]}: they must be (rows, E, 2) and "
                "(rows, E), padded with -1. Pass both, or neither."
            )
        known = role >= ROLE_QUESTION
        if (role > ROLE_ANSWER).any() or (known[:, 1:] & ~known[:, :-1]).any():
            raise ValueError(
                f"evidence_role={role.tolist()} is not a role for each <evi>, then padding: it holds 0 (question), 1 "
                "(grounding) or 2 (answer) in sequence order, then -1."
            )
        tokens, given = self.evidence_mask.sum(1).tolist(), known.sum(1).tolist()
        if tokens != given:
            raise ValueError(
                f"the rows have {tokens} <evi> tokens but {given} evidence spans: every <evi> needs its span, in "
                "order. Make both with the processor."
            )
        for row, frames in enumerate(self.frames or []):
            used = spans[row, known[row]]
            if ((used < 0) | (used >= len(frames))).any() or (used[:, 0] > used[:, 1]).any():
                raise ValueError(
                    f"evidence_spans[{row}]={used.tolist()} does not fit a video of {len(frames)} frames: spans are "
                    f"(first, last) frame indices, 0 <= first <= last <= {len(frames) - 1}."
                )

    def fill_question(self, spans: torch.Tensor, role: torch.Tensor, scale: float | torch.Tensor) -> None:
        """Moments given in the question: mean of the frame vectors *before* the text model."""
        if self.frames:
            self._add(pad_sequence(self.frames, batch_first=True), spans, role == ROLE_QUESTION, scale)

    def fill_response(self, frame_states: torch.Tensor, spans: torch.Tensor, role: torch.Tensor, scale) -> None:
        """Visual semantic capture: mean of the frame states `m_t (rows, T, H)` over the response's own spans."""
        self._add(frame_states, spans, role > ROLE_QUESTION, scale)

    def _add(self, states: torch.Tensor, spans: torch.Tensor, wanted: torch.Tensor, scale) -> None:
        pooled = pool_spans(states, torch.where(wanted[..., None], spans, -1)) * scale  # (rows, E, H); 0 if unwanted
        columns = token_columns(self.evidence_mask, spans.shape[1])[..., None].expand_as(pooled)
        self.embeds = self.embeds.scatter_add(1, columns, pooled.to(self.embeds.dtype))


__all__ = ["EmbeddedSequence", "take_columns", "token_columns"]
