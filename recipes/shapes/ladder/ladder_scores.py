# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Answers of an arm to the test rows, brought into one form, and their scores row by row."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder_videos import PatchStore
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from d2vlm_hf.evaluation.prediction_files import PredictionFile
from d2vlm_hf.evaluation.run import evaluate
from d2vlm_hf.evaluation.shapes_benchmark import SET_THRESHOLDS
from d2vlm_hf.model.evidence_d2vlm import ROLE_QUESTION
from d2vlm_hf.model.processing_d2vlm import pad_evidence, pad_ids
from d2vlm_hf.model.spans_d2vlm import set_f1


FIGURES = {
    "grounding_f1": "grounding F1",
    "caption_f1": "caption F1",
    "caption_words": "caption words F1",
    "accuracy": "answer accuracy",
}
"""Of tvg and tal rows the F1 of evidence spans; of dvc rows that of the spans, then of the phrases of events that were
met; of gvq and rar rows the accuracy."""

_CLAUSE_END = re.compile(r"(?<=[.!?])\s+|,?\s+then\s+")


def ask(model, processor, rows: Sequence[Mapping[str, Any]], store: PatchStore, max_new_tokens: int) -> list[dict]:
    """Generate an answer to each row about a stored video, greedily."""
    names = list(dict.fromkeys(row["video"] for row in rows))
    videos = [store[name] for name in names]
    metadata = []
    for video in videos:
        times = video["timestamps"]
        fps = 1 / float(np.median(np.diff(times))) if len(times) > 1 else 1.0
        metadata.append({"timestamps": times, "fps": fps, "duration": float(times[-1]) + 1 / fps})
    about = [metadata[names.index(row["video"])] for row in rows]
    prompts, spans = [], []
    for row, video in zip(rows, about, strict=True):
        given = row["question_spans"]
        prompts.append(processor.encode_prompt(row["question"], len(video["timestamps"]), len(given)))
        spans.append(processor.spans_to_frames(given, video))
    batch = pad_ids(prompts, processor.pad_token_id, side="left")
    batch |= processor.encode_questions([row["question"] for row in rows])
    if any(spans):
        batch |= pad_evidence(spans, [[ROLE_QUESTION] * len(given) for given in spans])
    batch["patch_features"] = torch.cat([video["patch_features"].float() for video in videos])
    batch["num_frames"] = torch.tensor([len(video["timestamps"]) for video in videos])
    batch["video_index"] = torch.tensor([names.index(row["video"]) for row in rows])
    with torch.no_grad():
        outputs = model.generate(
            **batch, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True,
            eos_token_id=processor.stop_token_ids, pad_token_id=processor.pad_token_id,
        )  # fmt: skip
    return processor.post_process_grounding(
        outputs.sequences, outputs.evidence_trace, about, batch["input_ids"].shape[1]
    )


def in_one_form(prediction: Mapping[str, Any], stages: str, task: str) -> dict[str, Any]:
    """What an arm means by its answer: coupled arms ground in the answer, factorized ones before it only.

    Args:
        prediction (`Mapping`): As the processor reads it.
        stages (`str`): Of the arm. `"answer"`: the spans named in the answer are its evidence. `"grounding"`: the k-th
            clause of a dense caption belongs to the k-th span.
        task (`str`): Of the row.
    """
    evidence = list(prediction["evidence"])
    if stages == "answer":
        named = {(item["start"], item["end"]): item["score"] for item in prediction["references"]}
        evidence = [{"start": start, "end": end, "score": score} for (start, end), score in named.items()]
    result = {**prediction, "evidence": evidence}
    if stages == "grounding" and task == "dvc" and evidence:
        clauses = [clause.strip() for clause in _CLAUSE_END.split(prediction["answer"]) if clause.strip()]
        result["captions"] = [*clauses, *[""] * len(evidence)][: len(evidence)]
    return result


def row_scores(rows: Sequence[Mapping[str, Any]], predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of each row that has them, with its id, its video and its task."""
    results = evaluate("shapes", rows, predictions)["rows"]
    scores = []
    for row, result in zip(rows, results, strict=True):
        figures: dict[str, Any] = {"id": row["id"], "video": row["video"], "task": row["task"]}
        if row["task"] in ("tvg", "tal"):
            found = [[item["start"], item["end"]] for item in predictions[row["id"]]["evidence"]]
            figures["grounding_f1"] = float(np.mean([*set_f1([found], [row["spans"]], SET_THRESHOLDS).values()]))
        elif row["task"] == "dvc":
            figures |= {"caption_f1": result["event_F1"], "caption_words": result["caption_F1"]}
        else:
            figures["accuracy"] = result["accuracy"]
        scores.append(figures)
    return scores


def score_arm(folder: Path, stages: str, rows: Sequence[Mapping[str, Any]], store: PatchStore, settings) -> list[dict]:
    """Answer the test rows that are not answered yet, and score all of them."""
    file = PredictionFile(folder / "predictions.jsonl", {"rows": len(rows), "max_new_tokens": settings.max_new_tokens})
    done = file.read()
    missing = [row for row in rows if row["id"] not in done]
    if missing:
        model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
        processor = AutoProcessor.from_pretrained(folder / "model")
        size = settings.rows_per_batch
        for start in tqdm(range(0, len(missing), size), desc=f"answers of {folder.name}"):
            part = missing[start : start + size]
            for row, result in zip(part, ask(model, processor, part, store, settings.max_new_tokens), strict=True):
                file.add(row["id"], result)
        done = file.read()
    return row_scores(rows, {row["id"]: in_one_form(done[row["id"]], stages, row["task"]) for row in rows})
