# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models and batches, built from configs: 4 text layers, 32 wide, weights large enough to make a difference.

Token ids: 0 padding, 1 begin, 2 end, 3.. words, and `<video>`, `<evi>`, `</evi>` at the end of the vocabulary. A
`Sample` describes one prompt and its responses; what it is encoded to depends on its own seed only, so that a batch can
be compared with its rows.
"""

from dataclasses import dataclass, field

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from d2vlm_hf.model.configuration_d2vlm import D2VLMConfig
from d2vlm_hf.model.modeling_d2vlm import D2VLMForConditionalGeneration


VOCABULARY, PAD, BOS, EOS = 48, 0, 1, 2
VIDEO, EVIDENCE, EVIDENCE_END = 45, 46, 47
HIDDEN, LAYERS, EVIDENCE_LAYER = 32, 4, 2
IMAGE, PATCH, QUESTION_VOCABULARY = 28, 14, 40

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_WINDOW = 6  # narrower than every prompt here, so that a sliding window is felt
_TEXT_CONFIGS = {
    "phi3": (Phi3Config, {}),
    "phi3-sliding": (Phi3Config, {"sliding_window": _WINDOW}),
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-sliding": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": _WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": _WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    ),
}
TEXT_MODELS = tuple(_TEXT_CONFIGS)
CONNECTORS = ("qformer", "mlp")


def text_config(name: str = "llama", **changes) -> PreTrainedConfig:
    """Configuration of a tiny text model; a name of `TEXT_MODELS`."""
    config_class, own = _TEXT_CONFIGS[name]
    return config_class(**{**_TEXT, **own, **changes})


def tiny_config(text: str = "llama", connector: str = "qformer", text_changes: dict | None = None, **changes):
    """A `D2VLMConfig`: InstructBLIP tower and Q-Former with `"qformer"`, SigLIP tower with `"mlp"`."""
    tower = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    if connector == "qformer":
        parts = {
            "vision_config": InstructBlipVisionConfig(**tower, initializer_range=0.02),
            "qformer_config": InstructBlipQFormerConfig(
                vocab_size=QUESTION_VOCABULARY,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            "num_query_tokens": 3,
        }
    else:
        parts = {"vision_config": SiglipVisionConfig(**tower), "vision_feature_select_strategy": "full"}
    settings = {
        "text_config": text_config(text, **(text_changes or {})),
        "connector_type": connector,
        "video_token_id": VIDEO,
        "evidence_token_id": EVIDENCE,
        "evidence_end_token_id": EVIDENCE_END,
        "evidence_layer": EVIDENCE_LAYER,
    }
    return D2VLMConfig(**{**parts, **settings, **changes})


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights far from their initial values, biases and norms included, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model


def tiny_model(
    text: str = "llama", connector: str = "qformer", seed: int = 0, attention: str | None = None, **changes
) -> D2VLMForConditionalGeneration:
    """A seeded model in eval mode; `attention` sets the attention implementation of the text model and the towers."""
    model = D2VLMForConditionalGeneration(tiny_config(text, connector, **changes))
    if attention is not None:
        model.set_attn_implementation(attention)
    randomize(model, seed)
    with torch.no_grad():
        model.evidence_head[-1].weight *= 4  # curves with peaks, hence spans of every kind
    return model.eval()


def freeze_tower(model: D2VLMForConditionalGeneration) -> D2VLMForConditionalGeneration:
    """As in training: the vision tower is not trained."""
    model.model.vision_tower.requires_grad_(False)
    return model


@dataclass
class Sample:
    """One prompt and its responses.

    Args:
        frames: Length of the video.
        responses: The spans of the K events of each; a response is `<evi>`*K `</evi>` words `<evi>` words ...
        given: Spans of the `<evi>` tokens in the question.
        seed: What words and pixels are drawn from.
        before, after: Words before the video and after it.
    """

    frames: int
    responses: list[list[tuple[int, int]]] = field(default_factory=lambda: [[]])
    given: list[tuple[int, int]] = field(default_factory=list)
    seed: int = 0
    before: int = 3
    after: int = 3

    def __post_init__(self):
        generator = torch.Generator().manual_seed(1234 + self.seed)
        self.pixels = torch.randn(self.frames, 3, IMAGE, IMAGE, generator=generator)
        self.question = torch.randint(1, QUESTION_VOCABULARY, (3 + self.seed % 3,), generator=generator)
        words = iter(torch.randint(3, VIDEO, (400,), generator=generator).tolist())
        self.prompt = [BOS] + [next(words) for _ in range(self.before)] + [VIDEO] * self.frames
        for _ in self.given:
            self.prompt += [next(words), EVIDENCE]
        self.prompt += [next(words) for _ in range(self.after)]
        self.answers = []
        for spans in self.responses:
            answer = [EVIDENCE] * len(spans) + [EVIDENCE_END, next(words), next(words)]
            for _ in spans:
                answer += [EVIDENCE, next(words)]
            self.answers.append([*answer, EOS])

    def evidence(self, response: int | None) -> tuple[list[tuple[int, int]], list[int]]:
        """Spans and roles of the prompt and of one response."""
        spans, role = list(self.given), [0] * len(self.given)
        if response is not None:
            events = self.responses[response]
            spans, role = spans + events + events, role + [1] * len(events) + [2] * len(events)
        return spans, role


# Lengths, questions with and without given moments, K = 2, 1, 0: what batches are usually made of here.
SAMPLES = (
    Sample(5, [[(1, 2), (4, 4)]], given=[(0, 1)], seed=1),
    Sample(8, [[(3, 6)]], seed=2, after=5),
    Sample(3, [[]], seed=3, before=1),
)
PAIRS = (
    Sample(5, [[(1, 2), (4, 4)], [(0, 0)]], given=[(0, 1)], seed=1),
    Sample(8, [[(3, 6)], [(2, 3), (5, 7)]], seed=2, after=5),
    Sample(3, [[], [(0, 2)]], seed=3, before=1),
)


def _pad(rows: list[list[int]], value: int, left: bool) -> torch.Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor(
        [([value] * (width - len(r)) + list(r)) if left else (list(r) + [value] * (width - len(r))) for r in rows]
    ).reshape(len(rows), width)


def _pad_spans(rows: list[tuple[list[tuple[int, int]], list[int]]]) -> dict[str, torch.Tensor]:
    count = max(len(role) for _, role in rows)
    spans = torch.full((len(rows), count, 2), -1)
    role = torch.full((len(rows), count), -1)
    for row, (own_spans, own_role) in enumerate(rows):
        if own_role:
            spans[row, : len(own_role)] = torch.tensor(own_spans)
            role[row, : len(own_role)] = torch.tensor(own_role)
    return {"evidence_spans": spans, "evidence_role": role}


def video_inputs(samples) -> dict[str, torch.Tensor]:
    """Packed frames and the questions for the Q-Former (which the MLP connector does not read)."""
    questions = [s.question.tolist() for s in samples]
    return {
        "pixel_values_videos": torch.cat([s.pixels for s in samples]),
        "num_frames": torch.tensor([s.frames for s in samples]),
        "qformer_input_ids": _pad(questions, PAD, left=False),
        "qformer_attention_mask": _pad([[1] * len(q) for q in questions], 0, left=False),
    }


def prompt_batch(samples) -> dict[str, torch.Tensor]:
    """Left-padded prompts alone, for `generate`."""
    evidence = _pad_spans([s.evidence(None) for s in samples])
    return {
        "input_ids": _pad([s.prompt for s in samples], PAD, left=True),
        "attention_mask": _pad([[1] * len(s.prompt) for s in samples], 0, left=True),
        **(evidence if evidence["evidence_role"].shape[1] else {}),
        **video_inputs(samples),
    }


def training_batch(samples, responses: tuple[int, ...] = (0,)) -> dict[str, torch.Tensor | int]:
    """Left-padded prompts, right-padded responses: all first ones, then all second ones; `prompt_length` included."""
    rows = [(s, r) for r in responses for s in samples]
    prompts = _pad([s.prompt for s, _ in rows], PAD, left=True)
    prompt_mask = _pad([[1] * len(s.prompt) for s, _ in rows], 0, left=True)
    answers = _pad([s.answers[r] for s, r in rows], PAD, left=False)
    answer_mask = _pad([[1] * len(s.answers[r]) for s, r in rows], 0, left=False)
    return {
        "input_ids": torch.cat([prompts, answers], 1),
        "attention_mask": torch.cat([prompt_mask, answer_mask], 1),
        "labels": torch.cat([torch.full_like(prompts, -100), answers.masked_fill(answer_mask == 0, -100)], 1),
        "prompt_length": prompts.shape[1],
        **_pad_spans([s.evidence(r) for s, r in rows]),
        **video_inputs(samples),
    }


def whole_sequence_batch(samples, left: bool = False) -> dict[str, torch.Tensor]:
    """Prompt and first response in one piece, padded on one side: the plain layout, without `prompt_length`."""
    rows = [s.prompt + s.answers[0] for s in samples]
    labels = [[-100] * len(s.prompt) + s.answers[0] for s in samples]
    return {
        "input_ids": _pad(rows, PAD, left),
        "attention_mask": _pad([[1] * len(r) for r in rows], 0, left),
        "labels": _pad(labels, -100, left),
        **_pad_spans([s.evidence(0) for s in samples]),
        **video_inputs(samples),
    }


def gradients(model: torch.nn.Module, **inputs) -> tuple[object, dict[str, torch.Tensor | None]]:
    """Output of a forward, and the gradient of its loss by parameter name (trainable ones only)."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return output, named


def largest_difference(one: dict, other: dict) -> float:
    """Largest difference between two sets of gradients, relative to the largest entry of each (at least 1)."""
    assert one.keys() == other.keys()
    differences = [0.0]
    for name, gradient in one.items():
        assert (gradient is None) == (other[name] is None), name
        if gradient is not None:
            scale = max(gradient.abs().max().item(), 1.0)
            differences.append((gradient - other[name]).abs().max().item() / scale)
    return max(differences)
