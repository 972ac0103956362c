# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Processor of D2VLM: questions and videos in, tensors out; tokens and spans in, seconds out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .answers_d2vlm import AnswerReader, GeneratedEvidence, format_span
from .chat_templates_d2vlm import CHAT_TEMPLATES
from .evidence_d2vlm import ROLE_QUESTION
from .spans_d2vlm import spans_to_frames, validate_spans
from .tokens_d2vlm import PromptFrame, encode_pieces, pad_evidence, pad_ids, read_template, user_pieces
from .video_processing_d2vlm import D2VLMVideoProcessor
from .video_sources_d2vlm import flatten_videos


QFORMER_MAX_LENGTH = 256
"""Tokens of a question that the Q-Former reads; longer ones lose their beginning, as in the original."""

# What a caller may say about text, since it is what happens anyway: rows are left-padded and never cut.
_TEXT_OPTIONS = {
    "padding": (True, "longest", None),
    "padding_side": ("left", None),
    "truncation": (False, None),
    "add_special_tokens": (True, False, None),
    "return_mm_token_type_ids": (False, None),
}


class D2VLMProcessor(ProcessorMixin):
    """Chat template, one `<video>` placeholder a frame, evidence tokens with spans in seconds.

    Args:
        video_processor (`D2VLMVideoProcessor`): Decodes, samples, resizes and normalises frames.
        tokenizer (`PreTrainedTokenizerBase`): Of the text model; holds `<video>`, `<evi>` and `</evi>`.
        qformer_tokenizer (`PreTrainedTokenizerBase`, *optional*): Of the Q-Former; `None` with the `"mlp"` connector.
        chat_template (`str`, *optional*): A name of `CHAT_TEMPLATES` or a Jinja template; default: the tokenizer's own.

    Raises:
        ValueError: If the tokenizer lacks one of the three tokens.
    """

    model_input_names = [
        *("input_ids", "attention_mask", "pixel_values_videos", "num_frames", "qformer_input_ids"),
        *("qformer_attention_mask", "video_index", "evidence_spans", "evidence_role"),
    ]

    def __init__(
        self,
        video_processor: D2VLMVideoProcessor,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ):
        self.video_token, self.evidence_token, self.evidence_end_token = "<video>", "<evi>", "</evi>"
        ids = tokenizer.convert_tokens_to_ids([self.video_token, self.evidence_token, self.evidence_end_token])
        if None in ids or tokenizer.unk_token_id in ids:
            raise ValueError(
                f"the tokenizer lacks one of <video>, <evi>, </evi> (their ids are {ids}): frames and evidence need a "
                'token each. Add them: tokenizer.add_tokens(["<video>", "<evi>", "</evi>"], special_tokens=True).'
            )
        self.video_token_id, self.evidence_token_id, self.evidence_end_token_id = ids
        if isinstance(chat_template, str):
            chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
        self._known_frame: tuple[Any, PromptFrame] | None = None
        super().__init__(
            video_processor, tokenizer, qformer_tokenizer, chat_template=chat_template or tokenizer.chat_template
        )

    # ---- saving and loading -----------------------------------------------------------------------------------------

    def check_argument_for_proper_class(self, argument_name: str, argument: Any):
        """As in transformers, without its need for torchvision and with an optional second tokenizer."""
        if argument_name == "video_processor":
            if not hasattr(argument, "sample_frames"):
                raise TypeError(
                    f"video_processor is a {type(argument).__name__}, which samples no frames by time. Pass a "
                    "D2VLMVideoProcessor."
                )
            return type(argument)
        if argument_name == "qformer_tokenizer" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        kwargs.pop("dtype", None)  # `pipeline()` means the model's; a tokenizer would save it
        # Without torchvision AutoVideoProcessor is a stub, so the one class there is gets loaded by name.
        video_processor = D2VLMVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not (processor_dict or {}).get("has_qformer_tokenizer", True):
            return [video_processor, tokenizer, None]
        kwargs["subfolder"] = "/".join(filter(None, [kwargs.get("subfolder"), "qformer_tokenizer"]))
        return [video_processor, tokenizer, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers; a processor without a second tokenizer saves none."""
        if self.qformer_tokenizer is not None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.get_attributes = lambda: ["video_processor", "tokenizer"]
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            del self.get_attributes

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "has_qformer_tokenizer": self.qformer_tokenizer is not None}

    # ---- text -> tokens ---------------------------------------------------------------------------------------------

    @property
    def prompt_frame(self) -> PromptFrame:
        """What the chat template writes around a question."""
        if self.chat_template is None:
            raise ValueError(
                "the processor has no chat template, so questions cannot be put to the model. Pass chat_template: one "
                f"of {', '.join(CHAT_TEMPLATES)}, or a Jinja template."
            )
        template = self._resolve_chat_template(None)
        key = (template, len(self.tokenizer))
        if self._known_frame is None or self._known_frame[0] != key:
            tokens = (self.video_token, self.evidence_token, self.evidence_end_token)
            self._known_frame = (key, read_template(self.tokenizer, template, tokens))
        return self._known_frame[1]

    def _encode(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        return encode_pieces(self.tokenizer, pieces, self.prompt_frame.control)

    @property
    def end_of_turn_id(self) -> int:
        """Token that ends an answer: what the chat template writes behind the assistant's text."""
        ids = self._encode([(self.prompt_frame.end_of_turn, False)])
        end = ids[0] if ids and ids[0] in self.tokenizer.added_tokens_decoder else self.tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                "nothing ends an answer: the chat template writes no token behind it and the tokenizer has no "
                "eos_token. Set tokenizer.eos_token, or use a template that ends its turns."
            )
        return end

    @property
    def pad_token_id(self) -> int:
        """Id that fills up rows; the end of the turn where the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.end_of_turn_id

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer."""
        ends = dict.fromkeys([self.end_of_turn_id, self.tokenizer.eos_token_id])
        return [end for end in ends if end is not None]

    def encode_prompt(self, question: str, num_frames: int, num_spans: int = 0) -> list[int]:
        """Tokens of a prompt with its frame placeholders.

        The pieces before and after the video are tokenized separately, as the original does. Control tokens that a user
        writes are text; `<evi>` is a token only where `num_spans` given moments stand for it.

        Args:
            question (`str`): The user's text.
            num_frames (`int`): Placeholders to put in.
            num_spans (`int`): Moments given in the question.

        Raises:
            ValueError: an empty question, or not one `<evi>` per given moment.
        """
        if not question.strip():
            raise ValueError("the question is empty: there is nothing to look for. Ask about the video in words.")
        written = question.count(self.evidence_token)
        if num_spans and written != num_spans:
            raise ValueError(
                f"the question {question!r} has {written} <evi> for {num_spans} given spans: every given moment needs "
                "one <evi> in the text. Write one <evi> where each moment is meant."
            )
        frame = self.prompt_frame
        asked = user_pieces(question, frame.control, {self.evidence_token} if num_spans else ())
        pieces = [(frame.between, False), *asked, (frame.after, False)]
        return self._encode_before(frame.before) + [self.video_token_id] * num_frames + self._encode(pieces)

    def _encode_before(self, before: str) -> list[int]:
        """The first piece of a prompt, behind the token that the tokenizer begins a text with, if it does."""
        ids = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        begins = bos is not None and self.tokenizer(before)["input_ids"][:1] == [bos]
        return [bos, *ids] if begins and ids[:1] != [bos] else ids

    def encode_response(self, answer: str, num_spans: int, stages: str = "both") -> list[int]:
        """Tokens of a response: `<evi>` x K, `</evi>`, the answer, the end of the turn.

        Args:
            answer (`str`): Holds one `<evi>` per event, or none (an answer that does not say when).
            num_spans (`int`): K.
            stages (`str`): `"both"`; `"answer"` leaves the grounding stage out (the coupled arm of the paper's ladder).

        Raises:
            ValueError: not one `<evi>` per span, or an empty answer.
        """
        written = answer.count(self.evidence_token)
        if written not in (num_spans, 0) or not answer.strip():
            raise ValueError(
                f"the answer {answer!r} has {written} <evi> for {num_spans} spans: each event needs one. Write one "
                "<evi> where each span is meant."
            )
        grounding = self.evidence_token * num_spans + self.evidence_end_token if stages == "both" else ""
        told = user_pieces(answer, self.prompt_frame.control, {self.evidence_token} if written else ())
        return [*self._encode([(grounding, False), *told]), self.end_of_turn_id]

    def encode_questions(self, questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Bare questions for the Q-Former: `qformer_input_ids`, `qformer_attention_mask (B, S)`; empty without one."""
        if self.qformer_tokenizer is None:
            return {}
        options = {"split_special_tokens": True, "return_special_tokens_mask": True}
        limit, rows = min(QFORMER_MAX_LENGTH, self.qformer_tokenizer.model_max_length), []
        for question in questions:
            # Cut here: tokenizers keep what they were told about padding and truncation, and save it.
            row = self.qformer_tokenizer(question, **options)
            words = [i for i, special in enumerate(row["special_tokens_mask"]) if not special]
            cut = set(words[: max(0, len(row["input_ids"]) - limit)])
            rows.append([token for i, token in enumerate(row["input_ids"]) if i not in cut])
        return {f"qformer_{k}": v for k, v in pad_ids(rows, self.qformer_tokenizer.pad_token_id, side="right").items()}

    # ---- questions and videos -> a batch ----------------------------------------------------------------------------

    def ask(
        self,
        questions: str | Sequence[str],
        videos: Any,
        question_spans: Sequence | None = None,
        video_index: Sequence[int] | None = None,
        max_context: int | None = None,
        return_metadata: bool = False,
        **videos_kwargs,
    ) -> BatchFeature:
        """Questions about videos, ready for `generate`: the chat template is applied here.

        Args:
            questions (`str` or `list[str]`): Plain words, one per prompt. Control tokens in them are text.
            videos: One video, or a list of them; see `D2VLMVideoProcessor`.
            question_spans (`list[[start, end]]`, *optional*): Seconds of the moments that `<evi>` stands for in the
                question; with a list of questions, a list of such lists.
            video_index (`list[int]`, *optional*): Which video each question is about; default: question i, video i.
            max_context (`int`, *optional*): Tokens that a prompt may have; longer ones are an error.
            return_metadata (`bool`): Adds `video_metadata`, one entry a prompt: `timestamps (T,)` in seconds, `fps` as
                sampled, `duration`, `decoder`, `skipped_packets`.
            **videos_kwargs: `fps`, `max_frames`, `video_fps`, `timestamps`, ...

        Returns:
            `BatchFeature` with left-padded `input_ids` and `attention_mask (B, S)`, `num_frames (V,)`,
            `pixel_values_videos (sum of T, 3, h, w)`, the Q-Former's text, `video_index (B,)` if given,
            `evidence_spans (B, E, 2)` and `evidence_role (B, E)` if a question has spans.

        Raises:
            ValueError: questions, videos and spans that do not fit each other, naming the values.
        """
        questions, question_spans = _as_lists(questions, question_spans)

        def encode(row: int, num_frames: int, num_spans: int) -> list[int]:
            return self.encode_prompt(questions[row], num_frames, num_spans)

        about = (videos, question_spans, video_index)
        return self._batch(questions, encode, *about, max_context, return_metadata, "pt", videos_kwargs)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        question_spans: Sequence | None = None,
        video_index: Sequence[int] | None = None,
        max_context: int | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Rendered prompts (each with one `<video>`) and videos: what `apply_chat_template(tokenize=True)` calls.

        Args and result as in [`D2VLMProcessor.ask`], which takes plain questions and is the safer way: here every
        control token in `text` counts, whoever wrote it.
        """
        if text is None or videos is None:
            raise ValueError(
                f"got text={text!r} and videos={type(videos).__name__}: a grounded answer needs a question and a "
                "video. Pass both."
            )
        prompts, question_spans = _as_lists(text, question_spans)
        wrong = [prompt for prompt in prompts if prompt.count(self.video_token) != 1]
        if wrong:
            raise ValueError(
                f"the prompt {wrong[0]!r} does not hold {self.video_token} exactly once. Render it with "
                "apply_chat_template, or pass the plain question to processor.ask(questions, videos)."
            )
        pieces = [prompt.split(self.video_token) for prompt in prompts]

        def encode(row: int, num_frames: int, num_spans: int) -> list[int]:
            before, rest = pieces[row]
            if rest.count(self.evidence_token) != num_spans:
                raise ValueError(
                    f"the prompt {prompts[row]!r} has {rest.count(self.evidence_token)} <evi> for {num_spans} given "
                    "spans: every given moment needs one <evi>. Pass question_spans, one span for each."
                )
            return self._encode_before(before) + [self.video_token_id] * num_frames + self._encode([(rest, False)])

        questions = [self._bare_question(rest) for _, rest in pieces]
        about, options = (videos, question_spans, video_index), self._videos_kwargs(kwargs)
        return self._batch(questions, encode, *about, max_context, return_metadata, return_tensors, options)

    def _bare_question(self, rest: str) -> str:
        """The question in a rendered prompt; of a longer conversation, all that is said."""
        frame = self.prompt_frame
        if rest.startswith(frame.between) and rest.endswith(frame.after):
            rest = rest.removeprefix(frame.between).removesuffix(frame.after)
        return frame.control.sub(lambda token: token[0] if token[0] == self.evidence_token else " ", rest)

    @staticmethod
    def _videos_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
        """Options of the video processor; those about text and other modalities must leave things as they are."""
        kwargs |= kwargs.pop("videos_kwargs", {})
        for name, usual in {**_TEXT_OPTIONS, "images": (None,), "audio": (None,)}.items():
            if kwargs.pop(name, None) not in usual:
                raise ValueError(
                    f"{name} cannot be chosen: prompts are text and a video, left-padded, never cut. Leave it out."
                )
        return kwargs

    def _batch(
        self,
        questions: Sequence[str],
        encode: Callable[[int, int, int], list[int]],
        videos: Any,
        question_spans: Sequence | None,
        video_index: Sequence[int] | None,
        max_context: int | None,
        return_metadata: bool,
        return_tensors: str | None,
        videos_kwargs: Mapping[str, Any],
    ) -> BatchFeature:
        videos = flatten_videos(videos)
        order = list(range(len(videos))) if video_index is None else [int(i) for i in video_index]
        if len(order) != len(questions):
            raise ValueError(
                f"{len(questions)} questions for {len(order)} videos: each question needs one. Pass video_index to ask "
                "several questions about one video."
            )
        if set(order) != set(range(len(videos))):
            raise ValueError(f"video_index={order} does not name each of the {len(videos)} videos. Number them from 0.")
        spans = [given or [] for given in question_spans] if question_spans is not None else [[]] * len(questions)
        if len(spans) != len(questions):
            raise ValueError(
                f"{len(spans)} lists of question_spans for {len(questions)} questions: pass one list a question."
            )
        encoded = self.video_processor(videos=videos, return_tensors="pt", return_metadata=True, **videos_kwargs)
        metadata = [encoded["video_metadata"][i] for i in order]
        prompts, frame_spans = [], []
        for row, (given, video) in enumerate(zip(spans, metadata, strict=True)):
            prompts.append(encode(row, len(video["timestamps"]), len(given)))
            frame_spans.append(self.spans_to_frames(given, video))
            self.check_context(prompts[-1], max_context)
        batch = pad_ids(prompts, self.pad_token_id, side="left") | self.encode_questions(questions)
        if any(frame_spans):
            batch |= pad_evidence(frame_spans, [[ROLE_QUESTION] * len(s) for s in frame_spans])
        batch["pixel_values_videos"], batch["num_frames"] = encoded["pixel_values_videos"], encoded["num_frames"]
        if video_index is not None:
            batch["video_index"] = torch.tensor(order)
        batch |= {"video_metadata": metadata} if return_metadata else {}
        return BatchFeature(batch, tensor_type=return_tensors, skip_tensor_conversion=["video_metadata"])

    @staticmethod
    def check_context(prompt: Sequence[int], max_context: int | None) -> None:
        """Raise if a prompt, or a prompt and its response, does not fit the text model's positions."""
        if max_context is not None and len(prompt) > max_context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, most of them frames, and the text model has room for "
                f"{max_context}. Lower fps or set max_frames; for generation, a lower max_new_tokens leaves more room."
            )

    @staticmethod
    def spans_to_frames(spans: Sequence, video: Mapping[str, Any]) -> list[list[int]]:
        """Spans in seconds -> (first, last) frame indices of a sampled video."""
        if not len(spans):
            return []
        # A span of the last frame, as answers give it, lasts one frame period and may end after the video does.
        last = float(video["timestamps"][-1]) + 1.0 / video["fps"]
        checked = validate_spans(spans, duration=max(video["duration"], last))
        return spans_to_frames(checked, np.asarray(video["timestamps"])).tolist()

    # ---- tokens and spans -> seconds --------------------------------------------------------------------------------

    def post_process_grounding(
        self,
        sequences: torch.Tensor,
        trace,
        video_metadata: Sequence[Mapping[str, Any]],
        prompt_length: int,
        min_score: float | None = None,
        return_curves: bool = False,
    ) -> list[dict[str, Any]]:
        """Turn generated tokens and decoded spans into answers with times.

        Args:
            sequences (`torch.LongTensor` of shape `(rows, S)`): Output of `generate`, prompts included.
            trace (`EvidenceTrace`): `generate(..., return_dict_in_generate=True).evidence_trace`.
            video_metadata (`list[dict]`): One entry a prompt, as `ask(..., return_metadata=True)` gives it.
            prompt_length (`int`): Columns of the prompts.
            min_score (`float`, *optional*): Evidence with a lower mean probability is left out of `evidence`.
            return_curves (`bool`): Adds `times (T,)` and `curves (E, T)`, one per entry of `evidence`.

        Returns:
            One `dict` a row: `answer` (each `<evi>` printed as its span), `evidence` (spans of the grounding part, in
            order: `start`, `end` in seconds, `score`), `references` (the spans named in the answer, with `char_start`,
            `char_end` and the index of the `evidence` they refer to, or `None`), `fps`, `duration`.

        Raises:
            ValueError: sequences, spans and metadata that do not belong together.
        """
        rows = len(sequences)
        if not len(video_metadata) or rows % len(video_metadata):
            raise ValueError(
                f"{rows} sequences for {len(video_metadata)} entries of video_metadata: every prompt has the same "
                "number of sequences. Pass one entry per prompt."
            )
        stop_ids = {*self.stop_token_ids, self.pad_token_id}
        reader = AnswerReader(self.tokenizer, self.evidence_token_id, self.evidence_end_token_id, stop_ids)
        return [
            reader.read(
                ids[prompt_length:].tolist(),
                GeneratedEvidence(trace.spans[row], trace.scores[row], trace.curves[row]),
                video_metadata[row * len(video_metadata) // rows],
                min_score,
                return_curves,
            )
            for row, ids in enumerate(sequences)
        ]


def _as_lists(texts: str | Sequence[str], spans: Sequence | None) -> tuple[list[str], Sequence | None]:
    """One text with its spans, or several with a list of spans each, as the latter."""
    if isinstance(texts, str):
        return [texts], None if spans is None else [spans]
    return list(texts), spans


D2VLMProcessor.register_for_auto_class("AutoProcessor")
D2VLMVideoProcessor.register_for_auto_class("AutoVideoProcessor")

__all__ = ["D2VLMProcessor", "format_span", "pad_evidence", "pad_ids"]
