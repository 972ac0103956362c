# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The golden numbers of the original (`tests/golden/phi3_tiny`) and the batches that they were computed from.

There, one token stands for a whole video; here it is one placeholder a frame.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_tokenizers import build_wordpiece_qformer_tokenizer


GOLDEN = Path(__file__).parent / "golden" / "phi3_tiny"
VIDEO_PLACEHOLDER, EVIDENCE = -200, 110
VIDEO = 119
"""What `convert_checkpoint` makes of the placeholder: the last row of the vocabulary."""


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """`meta.json` and the tensors of one set of golden numbers."""
    return json.loads((GOLDEN / name / "meta.json").read_text()), load_file(GOLDEN / name / "tensors.safetensors")


@dataclass
class Row:
    """One prompt and a response; spans are (first, last) frames, one frame a second."""

    video: torch.Tensor
    query: str
    prompt: list[int]
    response: list[int]
    given: list[list[int]]
    events: list[list[int]]


def pairs(flat: list[int] | None) -> list[list[int]]:
    """[2, 4, 6, 8] -> [[2, 4], [6, 8]]."""
    flat = flat or []
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def expand(ids: torch.Tensor, frames: int) -> list[int]:
    """One placeholder for the video there, one for each frame here."""
    return [token for i in ids.tolist() for token in ([VIDEO] * frames if i == VIDEO_PLACEHOLDER else [i])]


def sft_rows() -> list[Row]:
    meta, tensors = golden("sft")
    rows = []
    for i in range(2):
        ids, labels, video = tensors[f"input_ids.{i}"], tensors[f"labels.{i}"], tensors[f"video.{i}"]
        start = int((labels != -100).nonzero()[0])
        assert labels[start:].equal(ids[start:])
        rows.append(
            Row(
                video=video,
                query=meta["queries"][i],
                prompt=expand(ids[:start], len(video)),
                response=ids[start:].tolist(),
                given=pairs(meta["src"][i]),
                events=pairs(meta["tgt"][i]),
            )
        )
    return rows


def fpo_rows() -> list[Row]:
    """All chosen, then all rejected."""
    meta, tensors = golden("fpo")
    return [
        Row(
            video=tensors[f"video.{i}"],
            query=meta["queries"][i],
            prompt=expand(tensors[f"prompt.{i}"], len(tensors[f"video.{i}"])),
            response=tensors[f"{side}.{i}"].tolist(),
            given=[],
            events=pairs(meta[spans][i]),
        )
        for side, spans in (("chosen", "tgt"), ("rejected", "tgt_rejected"))
        for i in range(2)
    ]


def pad(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    blanks = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([b + r if left else r + b for r, b in zip(rows, blanks, strict=True)])


def video_inputs(rows: list[Row]) -> dict[str, torch.Tensor]:
    questions = build_wordpiece_qformer_tokenizer(GOLDEN / "checkpoint" / "qformer_vocab.txt")
    text = questions([row.query for row in rows], padding=True, truncation=True, max_length=256, return_tensors="pt")
    return {
        "pixel_values_videos": torch.cat([row.video for row in rows]),
        "num_frames": torch.tensor([len(row.video) for row in rows]),
        "qformer_input_ids": text["input_ids"],
        "qformer_attention_mask": text["attention_mask"],
    }


def evidence_inputs(rows: list[Row], answered: bool = True) -> dict[str, torch.Tensor]:
    spans = [row.given + 2 * row.events if answered else row.given for row in rows]
    role = [[0] * len(row.given) + ([1] * len(row.events) + [2] * len(row.events) if answered else []) for row in rows]
    width = max(map(len, role))
    if not width:
        return {}
    padded = [s + [[-1, -1]] * (width - len(s)) for s in spans]
    return {"evidence_spans": torch.tensor(padded), "evidence_role": pad(role, -1)}


def training_inputs(rows: list[Row], layout: str, videos: int) -> dict:
    """A batch in one of the layouts; `videos` rows come first that bring a video of their own."""
    prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
    if layout.startswith("prefix"):
        parts = [(prompts, True, False), (responses, False, True)]
    else:
        parts = [([p + r for p, r in zip(prompts, responses, strict=True)], False, True)]
    ids = torch.cat([pad(part, 0, left) for part, left, _ in parts], 1)
    mask = torch.cat([pad([[1] * len(row) for row in part], 0, left) for part, left, _ in parts], 1)
    labels = ids.masked_fill(mask == 0, -100)
    if layout.startswith("prefix"):
        labels[:, : max(map(len, prompts))] = -100
    else:
        for row, prompt in enumerate(prompts):
            labels[row, : len(prompt)] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if layout.startswith("prefix"):
        inputs["prompt_length"] = max(map(len, prompts))
    return inputs | video_inputs(rows[:videos]) | evidence_inputs(rows)


def prompt_inputs(rows: list[Row]) -> dict[str, torch.Tensor]:
    prompts = [row.prompt for row in rows]
    return {
        "input_ids": pad(prompts, 0, left=True),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, left=True),
        **video_inputs(rows),
        **evidence_inputs(rows, answered=False),
    }


def inference_rows() -> list[Row]:
    meta, tensors = golden("infer")
    return [
        Row(
            video=tensors[f"{i}.video"],
            query=case["query"],
            prompt=expand(tensors[f"{i}.input_ids"], len(tensors[f"{i}.video"])),
            response=tensors[f"{i}.tokens"].tolist(),
            given=pairs(case["src"]),
            events=[],
        )
        for i, case in enumerate(meta["cases"])
    ]


def forced_row() -> Row:
    meta, tensors = golden("forced")
    video = tensors["video"]
    prompt = expand(tensors["input_ids"], len(video))
    return Row(video, meta["query"], prompt, tensors["forced"].tolist(), given=[], events=[])
