# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Tampering with the words of an answer by a local text-generation model, and what such a rewriting must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .clauses import EVIDENCE, content_words, words


_PROMPT = (
    "Below is a correct answer about a video. Rewrite it so that it contradicts the video: change one or two pieces of "
    "key information (who, what, which colour, which direction, how many) and leave everything else as it is. Keep "
    f"every {EVIDENCE} exactly where it is. Write only the rewritten answer.\n\n"
    "Question: {question}\nAnswer: {answer}\nRewritten answer:"
)


class Rewriter(Protocol):
    """Anything that writes a wrong answer from a right one; `perturb` checks what it wrote."""

    def __call__(self, answer: str, question: str, seed: int) -> str:
        """Returns the rewritten answer, its `<evi>` tokens kept."""


class TransformersRewriter:
    """A [`Rewriter`] on a `transformers` text-generation pipeline.

    Args:
        model (`str` or a text-generation pipeline):
            Folder or name of a causal language model, or the pipeline itself.
        max_new_tokens (`int`, *optional*, defaults to 256):
            Longest rewriting.
        prompt (`str`, *optional*):
            What to ask for; `{question}` and `{answer}` are filled in.
        **generate_kwargs:
            Further arguments of `generate`. Decoding is greedy by default, so that the seed plays no part; with
            `do_sample=True` torch is seeded before each call.
    """

    def __init__(
        self, model: str | Callable[..., Any], max_new_tokens: int = 256, prompt: str = _PROMPT, **generate_kwargs: Any
    ):
        for field in ("{question}", "{answer}"):
            if field not in prompt:
                raise ValueError(f"The prompt {prompt!r} has no {field}: the model would not see it. Add {field}.")
        self.model, self.prompt = model, prompt
        self.generate_kwargs = {"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs}
        self._pipeline = None if isinstance(model, str) else model

    def __getstate__(self) -> dict[str, Any]:
        """Leaves a loaded model out, so that each worker process loads its own."""
        return {**self.__dict__, "_pipeline": None if isinstance(self.model, str) else self._pipeline}

    def __call__(self, answer: str, question: str, seed: int) -> str:
        """Rewrites one answer.

        Args:
            answer (`str`): The right answer, with its `<evi>`.
            question (`str`): The question.
            seed (`int`): Used when sampling.

        Returns:
            `str`: what the model wrote, up to its first line break.
        """
        from transformers import pipeline, set_seed

        if self._pipeline is None:
            self._pipeline = pipeline("text-generation", model=self.model)
        if self.generate_kwargs["do_sample"]:
            set_seed(seed % 2**32)
        text = self.prompt.replace("{question}", question).replace("{answer}", answer)
        chat = getattr(getattr(self._pipeline, "tokenizer", None), "chat_template", None)
        prompt = [{"role": "user", "content": text}] if chat else text
        output = self._pipeline(prompt, return_full_text=False, **self.generate_kwargs)[0]["generated_text"]
        output = output if isinstance(output, str) else output[-1]["content"]
        return output.strip().split("\n")[0].strip()


def rewriting_fault(answer: str, rewritten: str) -> str | None:
    """Says why a rewriting cannot stand as the rejected side of a tampered answer.

    Args:
        answer (`str`): The right answer.
        rewritten (`str`): What a model made of it.

    Returns:
        `str` or `None`: the reason, or `None` if the rewriting may be used.
    """
    old, new = words(answer), words(rewritten)
    if not new:
        return "the rewriting is empty"
    if "</evi>" in rewritten or "<video>" in rewritten:
        return "the rewriting holds a token that only the processor may write"
    if rewritten.count(EVIDENCE) != answer.count(EVIDENCE):
        return "the rewriting does not keep the <evi> tokens"
    if not 0.5 <= len(new) / max(len(old), 1) <= 2.0:
        return "the rewriting is much shorter or longer than the answer"
    before, after = content_words(answer), content_words(rewritten)
    if not (before - after and after - before):
        return "the rewriting changes no key information"
    if [bool(words(part)) for part in answer.split(EVIDENCE)] != [
        bool(words(part)) for part in rewritten.split(EVIDENCE)
    ]:
        return "the rewriting moves the <evi> tokens"
    return None


__all__ = ["Rewriter", "TransformersRewriter", "rewriting_fault"]
