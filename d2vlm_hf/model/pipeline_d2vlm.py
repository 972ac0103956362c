# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The "video-grounding" pipeline: videos and questions in, answers with their moments in seconds out."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import BatchFeature, Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .modeling_d2vlm import D2VLMForConditionalGeneration
from .processing_d2vlm import D2VLMProcessor
from .requests_d2vlm import Request, join_inputs, make_request, naming


TASK = "video-grounding"
MAX_NEW_TOKENS = 256
"""Tokens of an answer where nothing else is said."""

# Options of a call (or of the whole pipeline), by the step that heeds them: preprocess, _forward, postprocess.
_OPTIONS = (
    ("video_fps", "timestamps"),
    ("fps", "max_frames", "max_new_tokens", "generate_kwargs", "streamer"),
    ("min_score", "return_curves"),
)


class VideoGroundingPipeline(Pipeline):
    """Answers questions about videos and says when: `pipeline("video-grounding", model=...)`.

    ```python
    grounder = pipeline("video-grounding", model="org/d2vlm")
    grounder("kitchen.mp4", question="When does the man open the door?")
    grounder("kitchen.mp4", question=["When does he come in?", "What is he holding?"])
    grounder([{"video": "a.mp4", "question": "..."}, {"video": "b.mp4", "question": "..."}], batch_size=2)
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, model: D2VLMForConditionalGeneration, processor: D2VLMProcessor | None = None, **kwargs):
        kwargs.pop("local_files_only", None)  # handed on by `pipeline()`, which has heeded it
        _check_parts(model, processor)
        super().__init__(model=model, processor=processor, **kwargs)

    def __call__(
        self,
        video: Any = None,
        question: str | Sequence[str] | None = None,
        question_spans: Sequence | None = None,
        **kwargs,
    ) -> Any:
        """Answer questions about videos.

        Args:
            video: One video (path, URL, bytes, decoder, or frames with `video_fps` or `timestamps`), or a dict with
                `video`, `question` and, if wanted, `question_spans`, `video_fps`, `timestamps` (other keys are
                ignored); or a list, a data set or a generator of those.
            question (`str` or `list[str]`): What is asked. Several questions about one video share its encoding. With
                a list of videos, one question for all or one for each.
            question_spans (`list[[start, end]]`, *optional*): Seconds of the moments that `<evi>` stands for in the
                question; with a list of questions, a list of such lists.
            fps (`float`), max_frames (`int`): Sampling; default: as the model was trained.
            video_fps (`float`), timestamps (`list[float]`): Times of videos that are given as frames.
            max_new_tokens (`int`, defaults to 256): Length of an answer at most.
            generate_kwargs (`dict`): More for `generate`, such as `do_sample`. Default: greedy, whatever the
                checkpoint says.
            streamer (*optional*): Hears of tokens, and of spans if it is an `EvidenceStreamer`; one question at a time.
            min_score (`float` in [0, 1]): Evidence with a lower score is left out.
            return_curves (`bool`): Adds `times (T,)` and `curves (E, T)`, the probability of every frame.
            batch_size (`int`, defaults to 1): Videos (of any length) that go through the model at a time.

        Returns:
            `dict` with `answer`, `evidence`, `references`, `fps`, `duration`, as `post_process_grounding` of the
            processor says. A list of them for a list of questions, for a list of videos, and where
            `num_return_sequences` is set. A data set or a generator gives an iterator.

        Raises:
            ValueError: Whatever is wrong with a video, a question or an option; of many inputs, it says which.
        """
        if video is None:
            raise ValueError(
                "no video was given: answers are found in one. Call pipe(video, question=...), or pass dicts with the "
                "keys 'video' and 'question'."
            )
        inputs = join_inputs(video, question, question_spans)
        return [] if inputs == [] else super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **kwargs) -> tuple[dict[str, Any], ...]:
        given = {name: value for name, value in kwargs.items() if value is not None}
        _check_options(given)
        return tuple({name: given[name] for name in stage if name in given} for stage in _OPTIONS)

    # ---- one input after the other, batch by batch ------------------------------------------------------------------

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        requests = [self.preprocess(inputs, **preprocess_params)]
        return self.postprocess(self.forward(requests, **forward_params), **postprocess_params)[0]

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[Any]:
        """Batches of requests: the stock collate function would pad packed frames and spans as if they were tokens."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} is no number of videos. Pass a whole number, 1 or more.")
        numbered = enumerate(inputs)
        while batch := list(islice(numbered, batch_size)):
            requests = [self.preprocess(item, position=position, **preprocess_params) for position, item in batch]
            yield from self.postprocess(self.forward(requests, **forward_params), **postprocess_params)

    def preprocess(
        self,
        input_: Mapping[str, Any],
        video_fps: float | None = None,
        timestamps: Sequence[float] | None = None,
        position: int | None = None,
    ) -> Request:
        """Check what is asked; the video itself is read together with the others of its batch."""
        with naming(position):
            return make_request(input_, {"video_fps": video_fps, "timestamps": timestamps}, position)

    # ---- the model --------------------------------------------------------------------------------------------------

    def _forward(
        self,
        requests: list[Request],
        fps: float | None = None,
        max_frames: int | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        streamer: Any = None,
    ) -> dict[str, Any]:
        rows = sum(len(request.questions) for request in requests)
        if streamer is not None and rows > 1:
            raise ValueError(
                f"a streamer was given for {rows} questions at once: their words would be mixed. Ask one question, "
                "with batch_size=1, or leave the streamer out."
            )
        options = self._generate_options(max_new_tokens, generate_kwargs or {})
        room = self._room_for_prompt(options)
        inputs = self._encode(requests, fps=fps, max_frames=max_frames, max_context=room)
        metadata = inputs.pop("video_metadata")
        with _timed(streamer, metadata[0]["timestamps"]):
            outputs = self.model.generate(**inputs.to(self.device), **{"streamer": streamer, **options})
        return {
            "sequences": outputs.sequences,
            "trace": outputs.evidence_trace,
            "video_metadata": metadata,
            "prompt_length": inputs["input_ids"].shape[1],
            "requests": requests,
        }

    def _encode(self, requests: Sequence[Request], **options) -> BatchFeature:
        """The tensors of a batch; each video is in it once, however many questions there are about it."""
        times = {name: [request.times[name] for request in requests] for name in requests[0].times}
        with naming(requests[0].position if len(requests) == 1 else None):
            try:
                return self.processor.ask(
                    [question for request in requests for question in request.questions],
                    [request.video for request in requests],
                    question_spans=[spans for request in requests for spans in request.spans],
                    video_index=[i for i, request in enumerate(requests) for _ in request.questions],
                    return_metadata=True,
                    **{name: values for name, values in times.items() if any(value is not None for value in values)},
                    **options,
                )
            except ValueError:
                for request in requests if len(requests) > 1 else ():
                    self._encode([request], **options)  # names the one that cannot be read
                raise

    def _generate_options(self, max_new_tokens: int | None, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`: greedy and stopping at the end of the turn, unless something else is asked for."""
        ends = self.model.generation_config.eos_token_id
        ends = [*self.processor.stop_token_ids, *(ends if isinstance(ends, list) else [ends])]
        length = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        defaults = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_length": None,  # the checkpoint's would only cause a warning
            "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)),
            "pad_token_id": self.processor.pad_token_id,
        }
        if given.get("generation_config") is None:
            return {**defaults, **length, **given, "return_dict_in_generate": True}
        config = copy.deepcopy(given["generation_config"])
        config.update(**defaults, defaults_only=True)
        config.update(**length, return_dict_in_generate=True)
        return {**given, "generation_config": config}

    def _room_for_prompt(self, options: Mapping[str, Any]) -> int | None:
        """Tokens that a prompt may have, so that an answer of full length fits behind it."""
        positions = getattr(self.model.config.text_config, "max_position_embeddings", None)
        config = options.get("generation_config")
        length = options["max_new_tokens"] if config is None else config.max_new_tokens
        return None if positions is None else positions - length

    def postprocess(
        self, outputs: dict[str, Any], min_score: float | None = None, return_curves: bool = False
    ) -> list[Any]:
        requests = outputs.pop("requests")
        answers = self.processor.post_process_grounding(**outputs, min_score=min_score, return_curves=return_curves)
        each = len(answers) // sum(len(request.questions) for request in requests)
        # num_return_sequences = each: a list of answers to every question
        grouped = iter(answers if each == 1 else [answers[i : i + each] for i in range(0, len(answers), each)])
        results = [list(islice(grouped, len(request.questions))) for request in requests]
        return [own if request.listed else own[0] for own, request in zip(results, requests, strict=True)]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save model, processor and code; see `save_checkpoint`.

        Args:
            save_directory (`str`): The folder.
            push_to_hub (`bool`): Also push to the repository `repo_id` (default: the name of the folder).
            **kwargs: For the model's `save_pretrained`; with `push_to_hub`, those of `push_to_hub`.
        """
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
            kwargs = {}
        save_checkpoint(save_directory, self.model, self.processor, **kwargs)


def _pipelines() -> dict[str, Any]:
    """The entry `custom_pipelines` of `config.json`, by which `trust_remote_code=True` finds the pipeline."""
    implementation = f"{VideoGroundingPipeline.__module__.split('.')[-1]}.{VideoGroundingPipeline.__name__}"
    return {TASK: {"impl": implementation, "pt": ["AutoModelForImageTextToText"], "type": "multimodal"}}


def save_checkpoint(
    folder: str | os.PathLike, model: D2VLMForConditionalGeneration, processor: D2VLMProcessor, **kwargs
) -> None:
    """Save all that is needed to load a model again, with this package or without it.

    All of it is written beside `folder` first: what cannot be saved, on a full disk say, leaves the old files whole.

    Args:
        folder (`str`): Made if there is none.
        model (`D2VLMForConditionalGeneration`): The model.
        processor (`D2VLMProcessor`): Its processor.
        **kwargs: For the model's `save_pretrained`.

    Raises:
        ValueError: If `folder` is a file.
    """
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file: a checkpoint is a folder of several. Pass another path.")
    if hasattr(model.config, "custom_pipelines"):  # `pipeline()` has put classes in, which JSON cannot hold
        model.config.custom_pipelines = _pipelines()
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        model.save_pretrained(partial, **kwargs)
        complete_checkpoint(partial, processor)
        _move_into(folder, Path(partial))


def _move_into(folder: Path, partial: Path) -> None:
    """Let new files take the place of old ones, and of weights that are split otherwise; others stay."""
    folder.mkdir(exist_ok=True)
    new = {path.name for path in partial.iterdir()}
    for old in folder.iterdir():
        if old.is_dir() and old.name in new:
            shutil.rmtree(old)
        elif old.name not in new and old.name.startswith("model") and ".safetensors" in old.suffixes:
            old.unlink()
    for path in partial.iterdir():
        os.replace(path, folder / path.name)


def complete_checkpoint(folder: str | os.PathLike, processor: D2VLMProcessor) -> None:
    """Add processor and code to a folder that has weights and configuration, as a `Trainer` or a conversion leaves it.

    Args:
        folder (`str`): The folder; its `config.json` gets `auto_map` and `custom_pipelines`.
        processor (`D2VLMProcessor`): The processor.

    Raises:
        ValueError: If `folder` lacks `config.json`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json to complete. Save the model there first.")
    processor.save_pretrained(folder)
    custom_object_save(VideoGroundingPipeline, folder)  # and, through its imports, all the code there is
    config = json.loads(path.read_text(encoding="utf-8"))
    model_class = "modeling_d2vlm.D2VLMForConditionalGeneration"
    config["auto_map"] = {
        "AutoConfig": "configuration_d2vlm.D2VLMConfig",
        "AutoModel": model_class,
        "AutoModelForImageTextToText": model_class,
        "AutoModelForMultimodalLM": model_class,
        "AutoProcessor": "processing_d2vlm.D2VLMProcessor",
    }
    config["custom_pipelines"] = _pipelines()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_parts(model: Any, processor: Any) -> None:
    """Model and processor belong together."""
    if processor is None:
        raise ValueError("the pipeline has no processor, which reads videos and questions. Pass processor=....")
    config = model.config
    ids = (config.video_token_id, config.evidence_token_id, config.evidence_end_token_id)
    own = (processor.video_token_id, processor.evidence_token_id, processor.evidence_end_token_id)
    if ids != own:
        raise ValueError(
            f"the model knows <video>, <evi>, </evi> as tokens {ids} and the processor as {own}: they do not belong "
            "together. Load both from one checkpoint."
        )
    if config.connector_type == "qformer" and processor.qformer_tokenizer is None:
        raise ValueError(
            "the model's Q-Former reads the question, but the processor has no qformer_tokenizer to write it for it. "
            "Make the processor with one."
        )


def _check_options(options: Mapping[str, Any]) -> None:
    """What neither the processor nor `generate` would notice."""
    known = [name for stage in _OPTIONS for name in stage]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"unknown option {', '.join(unknown)}: it would have no effect. There are {', '.join(known)}; what "
            "generate takes goes into generate_kwargs={...}."
        )
    length = options.get("max_new_tokens", MAX_NEW_TOKENS)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"max_new_tokens={length!r} leaves no answer. Pass a whole number, 1 or more.")
    score = options.get("min_score", 0.0)
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"min_score={score!r} is no score: scores are mean probabilities. Pass a number from 0 to 1.")
    given = options.get("generate_kwargs", {})
    whole = given.get("max_length", getattr(given.get("generation_config"), "max_length", None))
    if whole is not None:
        raise ValueError(
            f"max_length={whole} counts the frames and the padding of a batch too, so it would cut answers anywhere. "
            "Pass max_new_tokens."
        )


@contextmanager
def _timed(streamer: Any, times: Sequence[float]) -> Iterator[None]:
    """A streamer that prints spans prints them in seconds; it forgets the video's times afterwards."""
    if streamer is None or getattr(streamer, "times", times) is not None:
        yield
        return
    streamer.times = times
    try:
        yield
    finally:
        streamer.times = None


__all__ = ["MAX_NEW_TOKENS", "TASK", "VideoGroundingPipeline", "complete_checkpoint", "save_checkpoint"]
