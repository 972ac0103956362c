# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The model `d2vlm` of lmms-eval: `--model d2vlm --model_args pretrained=DIR_OR_ID,fps=1`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..commands.ground import load_pipeline
from .answers import question_text, write_answer


class D2VLM(lmms):
    """A D2VLM checkpoint behind the interface of the harness, in batches.

    A row of shapes gives its moments to the model as such; any other task is asked in text only.

    Args:
        pretrained (`str`, *optional*): Folder or Hub id, by default the checkpoint that ships with the package.
        batch_size (`int` or `str`, *optional*, defaults to 1): Questions at a time.
        device (`str`, *optional*): As in [`~d2vlm_hf.commands.ground.load_pipeline`].
        dtype (`str`, *optional*): Likewise.
        fps (`float`, *optional*): Frames per second, by default the checkpoint's.
        max_frames (`int`, *optional*): Frames per video at most, by default the checkpoint's.
        evidence (`bool`, *optional*, defaults to `False`): Whether answers begin with the evidence and `</evi>`, which
            the shapes task reads and other tasks do not expect.
        max_batch_size: Of the harness; not used.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        evidence: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        self.pipeline = load_pipeline(pretrained, device, dtype)
        self.batch_size, self.evidence = int(batch_size), evidence
        self.video_options = {"fps": fps, "max_frames": max_frames}

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests in their order.

        Args:
            requests (`Sequence[Instance]`): With `(question, options, doc_to_visual, doc id, task, split)` each.

        Returns:
            `list[str]`: One text each.
        """
        answers: list[str] = []
        arguments = [request.args for request in requests]
        with tqdm(total=len(arguments), disable=self.rank != 0, desc="d2vlm") as bar:
            for batch, options in _batches(arguments, self.batch_size):
                inputs = [self._input(*request) for request in batch]
                results = self.pipeline(inputs, batch_size=self.batch_size, **self.video_options, **_decoding(options))
                for result, (question, settings, *_) in zip(results, batch, strict=True):
                    answers.append(_until(write_answer(result, self.evidence), options))
                    self.cache_hook.add_partial("generate_until", (question, settings), answers[-1])
                bar.update(len(batch))
        return answers

    def _input(self, question: str, settings: Mapping, doc_to_visual: Any, doc_id: Any, task: str, split: str) -> dict:
        """One question about one video."""
        doc = self.task_dict[task][split][doc_id]
        visuals = doc_to_visual(doc)
        if len(visuals) != 1 or not isinstance(visuals[0], str):
            raise ValueError(
                f"task {task!r} shows {len(visuals)} things of the kinds {sorted({type(v).__name__ for v in visuals})} "
                "at a time, but this model answers about one video file. Choose a task on videos."
            )
        if doc.get("question_spans") and question == question_text(doc):
            return {"video": visuals[0], "question": doc["question"], "question_spans": doc["question_spans"]}
        return {"video": visuals[0], "question": question}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError(
            "d2vlm answers in text, and the likelihood of a given answer is not offered. Choose a task of the output "
            "type generate_until."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError(
            "d2vlm answers one question at a time, without a conversation before it. Choose a task of the output type "
            "generate_until."
        )


def _batches(arguments: Sequence[tuple], size: int) -> Iterator[tuple[list[tuple], dict[str, Any]]]:
    """Neighbours with the same options, at most so many at a time."""
    for _, group in groupby(arguments, key=lambda request: json.dumps(request[1], sort_keys=True, default=str)):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size], members[0][1]


def _decoding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the harness in the words of the pipeline; greedy unless a temperature says otherwise."""
    temperature = options.get("temperature") or 0
    sampled = options.get("do_sample", temperature > 0) and temperature > 0
    chosen = {"do_sample": True, "temperature": temperature} if sampled else {}
    if sampled and options.get("top_p") is not None:
        chosen["top_p"] = options["top_p"]
    if (options.get("num_beams") or 1) > 1:
        chosen["num_beams"] = options["num_beams"]  # which the model refuses with its reason
    return {"max_new_tokens": options.get("max_new_tokens") or 256, "generate_kwargs": chosen}


def _until(text: str, options: Mapping[str, Any]) -> str:
    """The text up to the first of the strings that end an answer."""
    stops = options.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0]
    return text


__all__ = ["D2VLM"]
