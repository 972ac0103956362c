# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""From generated tokens and decoded spans to an answer: text with spans printed, evidence, references, in seconds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .spans_d2vlm import frames_to_spans


def format_span(start: float, end: float) -> str:
    """A span as answers print it, in seconds: `12.0s - 15.0s`."""
    return f"{start:.1f}s - {end:.1f}s"


@dataclass(frozen=True)
class GeneratedEvidence:
    """What one row's `<evi>` tokens decoded to, in order; those of the prompt are not among them.

    Args:
        spans (sequence of `(first, last)`): Frames, inclusive.
        scores (sequence of `float`): Mean probability over each span.
        curves (sequence of `(T,)` tensors): Probability of every frame.
    """

    spans: Sequence[tuple[int, int]]
    scores: Sequence[float]
    curves: Sequence[Any]


class AnswerReader:
    """Reads responses `<evi>`*K `</evi>` answer; made by the processor.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the text model.
        evidence_token_id, evidence_end_token_id (`int`): Ids of `<evi>` and `</evi>`.
        stop_ids (collection of `int`): Tokens that end a response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        evidence_token_id: int,
        evidence_end_token_id: int,
        stop_ids: Collection[int],
    ):
        self.tokenizer = tokenizer
        self.evidence_token_id, self.evidence_end_token_id = evidence_token_id, evidence_end_token_id
        self.stop_ids = set(stop_ids)

    def read(
        self,
        ids: Sequence[int],
        evidence: GeneratedEvidence,
        video: Mapping[str, Any],
        min_score: float | None = None,
        return_curves: bool = False,
    ) -> dict[str, Any]:
        """Read one response.

        Args:
            ids (sequence of `int`): Generated tokens.
            evidence (`GeneratedEvidence`): One span for each `<evi>` among them.
            video (`dict`): `timestamps (T,)` in seconds, `fps`, `duration`.
            min_score (`float`, *optional*): Evidence with a lower score is left out.
            return_curves (`bool`): Adds `times (T,)` and `curves (E, T)`.

        Returns:
            `dict`: See `D2VLMProcessor.post_process_grounding`.

        Raises:
            ValueError: If there is not one span per `<evi>`.
        """
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        num_grounding, answer_ids = self._split(list(ids[:end]))
        written = num_grounding + answer_ids.count(self.evidence_token_id)
        if written != len(evidence.spans):
            raise ValueError(
                f"the response has {written} <evi> tokens, but {len(evidence.spans)} spans were decoded: they must "
                "come from the same call. Pass the evidence_trace that generate returned with these sequences."
            )
        times = np.asarray(video["timestamps"], dtype=np.float64)
        spans = frames_to_spans(evidence.spans, times, 1.0 / video["fps"])
        entries = [
            {"start": span.start, "end": span.end, "score": score}
            for span, score in zip(spans, evidence.scores, strict=True)
        ]
        kept = [k for k in range(num_grounding) if min_score is None or entries[k]["score"] >= min_score]
        place = {k: i for i, k in enumerate(kept)}  # the k-th reference refers to the k-th event
        referred = entries[num_grounding:]
        answer, offsets = self._print(answer_ids, [format_span(entry["start"], entry["end"]) for entry in referred])
        result = {
            "answer": answer,
            "evidence": [entries[k] for k in kept],
            "references": [
                {**entry, "char_start": start, "char_end": stop, "evidence": place.get(k)}
                for k, (entry, (start, stop)) in enumerate(zip(referred, offsets, strict=True))
            ],
            "fps": float(video["fps"]),
            "duration": float(video["duration"]),
        }
        if return_curves:
            result["times"] = times.tolist()
            result["curves"] = [evidence.curves[k].tolist() for k in kept]
        return result

    def _split(self, ids: list[int]) -> tuple[int, list[int]]:
        """Number of `<evi>` tokens in the grounding part, and the tokens of the answer.

        Without `</evi>`, `<evi>` tokens alone are a grounding part that was cut off; anything else is an answer of a
        model that has no grounding part.
        """
        if self.evidence_end_token_id in ids:
            split = ids.index(self.evidence_end_token_id)
            return ids[:split].count(self.evidence_token_id), ids[split + 1 :]
        if all(token == self.evidence_token_id for token in ids):
            return len(ids), []
        return 0, ids

    def _print(self, ids: Sequence[int], stamps: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        """The text with a stamp in the place of each `<evi>`, and the character range of each stamp."""
        runs: list[list[int]] = [[]]
        for token in ids:
            if token == self.evidence_token_id:
                runs.append([])
            else:
                runs[-1].append(token)
        text, places = self._decode(runs[0]).lstrip(), []
        for stamp, run in zip(stamps, runs[1:], strict=True):
            if text and not (text[-1].isspace() or text[-1] in "([\"'"):
                text += " "
            places.append((len(text), len(text) + len(stamp)))
            following = self._decode_after_evidence(run)
            text += stamp + (" " if following[:1].isalnum() else "") + following
        return text.rstrip(), places

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode_after_evidence(self, ids: Sequence[int]) -> str:
        """Text behind an `<evi>`, with the white space it begins with, which many tokenizers drop at a text's start."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {self.evidence_end_token_id, *(token for token, entry in added if entry.special)}
        text = self._decode_behind([token for token in ids if token not in special])
        return text.removeprefix(" ") if self._space_is_put_in else text

    def _decode_behind(self, ids: Sequence[int]) -> str:
        evidence = self.tokenizer.convert_ids_to_tokens(self.evidence_token_id)
        ids = [self.evidence_token_id, *ids]
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.removeprefix(evidence)

    @cached_property
    def _space_is_put_in(self) -> bool:
        """Whether what directly follows an `<evi>` is decoded with a space before it."""
        evidence = self.tokenizer.convert_ids_to_tokens(self.evidence_token_id)
        return self._decode_behind(self.tokenizer(f"{evidence},", add_special_tokens=False)["input_ids"][1:]) == " ,"


__all__ = ["AnswerReader", "GeneratedEvidence", "format_span"]
