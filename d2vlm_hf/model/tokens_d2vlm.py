# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""From text to tokens: what a user writes is never taken for a control token; rows of tokens become tensors."""

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase


_TEXT = "\ue0d2text\ue0d2"  # stands for what is said while a chat template is rendered


class PromptFrame(NamedTuple):
    """What a chat template writes around a question.

    Args:
        before, between, after (`str`): Text before the video, between video and question, after the question.
        end_of_turn (`str`): What follows an answer.
        control (`re.Pattern`): Matches the control tokens.
    """

    before: str
    between: str
    after: str
    end_of_turn: str
    control: re.Pattern


def read_template(tokenizer: PreTrainedTokenizerBase, template: str, tokens: Sequence[str]) -> PromptFrame:
    """Find out what a chat template writes around a question about a video.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the text model.
        template (`str`): A Jinja template. One that was made for text alone gets `<video>` as the text's first line.
        tokens (sequence of `str`): `<video>` and the other control tokens of the method.

    Raises:
        ValueError: If it does not write the video once and the question behind it once.
    """
    block = {"type": "text", "text": _TEXT}
    for question, answer in (([{"type": "video"}, block], [block]), (f"{tokens[0]}\n{_TEXT}", _TEXT)):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            options = {"chat_template": template, "tokenize": False}
            prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, **options)
            dialogue = tokenizer.apply_chat_template(turns, **options)
        except TypeError:  # text and a list of blocks were added up: a template for plain strings
            continue
        before, video, rest = prompt.partition(tokens[0])
        around, said = rest.split(_TEXT), dialogue.split(_TEXT)
        if video and tokens[0] not in rest and len(around) == 2 and len(said) == 3:
            return PromptFrame(before, *around, said[2], control_pattern(tokenizer, prompt + dialogue, tokens))
    raise ValueError(
        f"the chat template does not write {tokens[0]} once and the question behind it once: {template!r}. Use one of "
        "CHAT_TEMPLATES, or add the video block to yours."
    )


def control_pattern(tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: Collection[str]) -> re.Pattern:
    """What is a control token: the given ones, every special token, and added ones that the chat template writes.

    Added tokens that are neither (white space and HTML tags of some vocabularies) are ordinary text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Of the text model.
        prompt (`str`): A rendered prompt.
        tokens (collection of `str`): Control tokens in any case.

    Returns:
        `re.Pattern`: Matches one control token, the longest there is.
    """
    added = tokenizer.added_tokens_decoder.values()
    written = {str(t) for t in added if t.special or (str(t) in prompt and not str(t).isspace())}
    return re.compile("|".join(map(re.escape, sorted(written.union(tokens), key=len, reverse=True))))


def user_pieces(text: str, control: re.Pattern, allowed: Collection[str] = ()) -> list[tuple[str, bool]]:
    """Split what a user wrote into `(piece, literal)` for `encode_pieces`: a piece with a control token is literal.

    Args:
        text (`str`): The user's text.
        control (`re.Pattern`): See `control_pattern`.
        allowed (collection of `str`): Control tokens that are meant as such.
    """
    places = [match.span() for match in control.finditer(text) if match.group() in allowed]
    cuts = [0, *(cut for place in places for cut in place), len(text)]
    pieces = [text[start:end] for start, end in pairwise(cuts)]  # text, token, text, ..., text
    return [(piece, i % 2 == 0 and control.search(piece) is not None) for i, piece in enumerate(pieces)]


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[tuple[str, bool]], control: re.Pattern
) -> list[int]:
    """Encode `(piece, literal)` in order; pieces that are not literal are joined first, as one text.

    Returns:
        `list[int]`: Token ids, without any that the tokenizer would put around a text.
    """
    ids, run = [], ""
    for text, literal in [*pieces, ("", True)]:
        if not literal:
            run += text
            continue
        ids += tokenizer(run, add_special_tokens=False)["input_ids"] if run else []
        ids += _encode_literally(tokenizer, text, control) if text else []
        run = ""
    return ids


def _encode_literally(tokenizer: PreTrainedTokenizerBase, text: str, control: re.Pattern) -> list[int]:
    """Encode a text in which no control token counts."""
    ids = tokenizer._encode_without_added_tokens(text)
    found = set(tokenizer.convert_tokens_to_ids(control.findall(text)))
    if found.isdisjoint(ids):
        return ids
    # Some vocabularies (Unigram) hold the token among their words too: such a one is spelled out.
    pieces, last = [], 0
    for match in control.finditer(text):
        pieces += [text[last : match.start()], *match.group()]
        last = match.end()
    pieces.append(text[last:])
    return [i for piece in pieces if piece for i in tokenizer._encode_without_added_tokens(piece)]


def pad_ids(rows: Sequence[Sequence[int]], pad_token_id: int, side: str) -> dict[str, torch.Tensor]:
    """Token rows -> `input_ids` and `attention_mask (B, S)`, padded on one side."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, place] = torch.tensor(tokens, dtype=torch.long)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pad_evidence(spans: Sequence[Sequence], roles: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Frame spans and roles per row -> `evidence_spans (B, E, 2)` and `evidence_role (B, E)`, padded with -1."""
    width = max((len(r) for r in roles), default=0)
    padded_spans = torch.full((len(spans), width, 2), -1, dtype=torch.long)
    padded_roles = torch.full((len(spans), width), -1, dtype=torch.long)
    for row, (row_spans, row_roles) in enumerate(zip(spans, roles, strict=True)):
        if row_roles:
            padded_spans[row, : len(row_roles)] = torch.tensor(row_spans, dtype=torch.long)
            padded_roles[row, : len(row_roles)] = torch.tensor(row_roles, dtype=torch.long)
    return {"evidence_spans": padded_spans, "evidence_role": padded_roles}


__all__ = [
    "PromptFrame",
    "control_pattern",
    "encode_pieces",
    "pad_evidence",
    "pad_ids",
    "read_template",
    "user_pieces",
]
