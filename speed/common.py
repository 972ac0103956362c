# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What the scripts beside this file share: a text-bound model, its inputs, the straightforward forward, and a clock.

The straightforward forward is what the method asks for, written down without a second thought: one pass of the prompt
through all layers for the frame states, then the whole sequence again, and the LM head at every position.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, SiglipVisionConfig

from d2vlm_hf.model.configuration_d2vlm import D2VLMConfig
from d2vlm_hf.model.evidence_d2vlm import (
    consistency_loss,
    evidence_similarity,
    grounding_log_likelihood,
    grounding_loss,
    pool_spans,
    soft_targets,
)
from d2vlm_hf.model.modeling_d2vlm import D2VLMForConditionalGeneration


EVENTS = 2  # a response has 2 * EVENTS `<evi>` tokens
PATCHES, PATCH_WIDTH = 4, 32
TOLERANCE = 1e-4


@dataclass
class Setting:
    """Sizes of what is measured; the defaults are text-bound: the vision tower is tiny and never runs."""

    frames: int = 128
    layers: int = 12
    batch: int = 2
    hidden: int = 512
    vocabulary: int = 32_064
    prompt: int = 70
    response: int = 70
    evidence_layer: int = 6
    repeats: int = 5

    @property
    def video(self) -> int:
        return self.vocabulary - 3

    @property
    def evidence(self) -> int:
        return self.vocabulary - 2

    @property
    def evidence_end(self) -> int:
        return self.vocabulary - 1


def read_setting(description: str, **defaults: int) -> tuple[Setting, argparse.Namespace]:
    """Options of every script: `--repeats --batch --frames --layers`, and `--memory` where a script has it."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    start = Setting(**defaults)
    for name in ("repeats", "batch", "frames", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(start, name), help="default: %(default)s")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time (sft_step.py)")
    options = parser.parse_args()
    chosen = {name: getattr(options, name) for name in ("repeats", "batch", "frames", "layers")}
    return Setting(**{**defaults, **chosen}), options


def build_model(setting: Setting) -> D2VLMForConditionalGeneration:
    """A seeded model of the given sizes; its vision tower is a stub, since `patch_features` go in."""
    torch.manual_seed(0)
    heads = max(setting.hidden // 64, 2)
    config = D2VLMConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=PATCH_WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14,
        ),
        vision_feature_select_strategy="full",
        connector_type="mlp",
        text_config=LlamaConfig(
            vocab_size=setting.vocabulary, hidden_size=setting.hidden, intermediate_size=4 * setting.hidden,
            num_hidden_layers=setting.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        video_token_id=setting.video,
        evidence_token_id=setting.evidence,
        evidence_end_token_id=setting.evidence_end,
        evidence_layer=setting.evidence_layer,
    )  # fmt: skip
    model = D2VLMForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)
    return model


def prompts(setting: Setting) -> dict[str, torch.Tensor]:
    """`batch` prompts, half of the words before the frames and half after, and the patches of one video each."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, setting.video, (setting.batch, setting.prompt), generator=generator)
    half = setting.prompt // 2
    frames = torch.full((setting.batch, setting.frames), setting.video)
    ids = torch.cat([words[:, :half], frames, words[:, half:]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "patch_features": torch.randn(setting.batch * setting.frames, PATCHES, PATCH_WIDTH, generator=generator),
        "num_frames": torch.full((setting.batch,), setting.frames),
    }


def training_batch(setting: Setting, responses: int = 1) -> dict:
    """The prompts with their responses: all first ones, then all second ones, each with spans of its own."""
    batch = prompts(setting)
    generator = torch.Generator().manual_seed(2)
    rows = responses * setting.batch
    response = torch.randint(3, setting.video, (rows, setting.response), generator=generator)
    response[:, :EVENTS] = setting.evidence
    response[:, EVENTS] = setting.evidence_end
    response[:, EVENTS + 2 : 3 * EVENTS + 2 : 2] = setting.evidence
    spans = torch.randint(0, setting.frames, (rows, EVENTS, 2), generator=generator).sort(-1).values
    ids = torch.cat([batch["input_ids"].repeat(responses, 1), response], dim=1)
    prompt_length = batch["input_ids"].shape[1]
    labels = ids.clone()
    labels[:, :prompt_length] = -100
    return {
        **batch,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "prompt_length": prompt_length,
        "evidence_spans": torch.cat([spans, spans], dim=1),
        "evidence_role": torch.tensor([[1] * EVENTS + [2] * EVENTS] * rows),
    }


# ---- the straightforward way ------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What the losses are made of: `(rows, S)`, `(rows, E, T)`, `(rows, E, H)`."""

    token_logps: torch.Tensor
    similarity: torch.Tensor
    queries: torch.Tensor


def plain_forward(model: D2VLMForConditionalGeneration, batch: dict) -> Scores:
    """A pass of the prompt, a pass of everything, logits everywhere; one video a row, no padding."""
    text, config = model.model.language_model, model.config
    ids, labels, prompt = batch["input_ids"], batch["labels"], batch["prompt_length"]
    rows, columns = ids.shape
    videos = len(batch["num_frames"])
    features = []
    for _ in range(rows // videos):  # the video is encoded once per response
        encoded = model.get_video_features(patch_features=batch["patch_features"], num_frames=batch["num_frames"])
        features += encoded.pooler_output
    video, evidence = ids == config.video_token_id, ids == config.evidence_token_id
    embeds = text.embed_tokens(ids).masked_scatter(video[..., None], torch.cat(features))
    mask = torch.ones(columns, columns, dtype=torch.bool).tril() | (video[:, :, None] & video[:, None, :])
    mask = mask[:, None]  # (rows, 1, S, S): causal, and frames see each other both ways

    def run(length: int) -> tuple[torch.Tensor, ...]:
        outputs = text(
            inputs_embeds=embeds[:, :length], attention_mask=mask[..., :length, :length],
            use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        return outputs.hidden_states

    captured = run(prompt)[config.evidence_layer][video[:, :prompt]].view(rows, -1, embeds.shape[-1])  # (rows, T, H)
    filling = pool_spans(captured, batch["evidence_spans"]).flatten(0, 1)
    embeds = embeds.masked_scatter(evidence[..., None], embeds[evidence] + filling)
    states = run(columns)
    logits = model.lm_head(states[-1])[:, :-1].flatten(0, 1)  # at every position
    losses = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    predicts = evidence.roll(-1, dims=1)
    queries = model.evidence_head(states[-2][predicts].view(rows, -1, embeds.shape[-1]))
    keys = model.frame_head(states[-2][video].view(rows, -1, embeds.shape[-1]))
    return Scores(F.pad(-losses.view(rows, -1), (1, 0)), evidence_similarity(queries, keys), queries)


def sft_loss(scores: Scores, batch: dict, config: D2VLMConfig) -> torch.Tensor:
    """The SFT loss of rows that all have events."""
    rows = len(scores.token_logps)
    spans, role = batch["evidence_spans"][:rows], batch["evidence_role"][:rows]
    everywhere = torch.ones_like(scores.similarity[:, 0], dtype=torch.bool)
    targets = soft_targets(spans, scores.similarity.shape[-1], config.evidence_decay)
    grounding = grounding_loss(scores.similarity, targets, role > 0, everywhere).mean()
    consistency = consistency_loss(scores.queries, role).mean()
    lm = -scores.token_logps.sum() / (batch["labels"][:rows] != -100).sum()
    return lm + config.grounding_weight * grounding + config.consistency_weight * consistency


def fpo_loss(scores: Scores, batch: dict, config: D2VLMConfig, beta: float = 0.1) -> torch.Tensor:
    """The FPO loss (reference-free) and the SFT loss of the chosen responses, which are the first half of the rows."""
    everywhere = torch.ones_like(scores.similarity[:, 0], dtype=torch.bool)
    grounding = grounding_log_likelihood(
        scores.similarity, batch["evidence_spans"], batch["evidence_role"] > 0, everywhere, config.evidence_decay
    )
    chosen, rejected = (scores.token_logps.sum(1) + grounding).chunk(2)
    first = Scores(scores.token_logps.chunk(2)[0], scores.similarity.chunk(2)[0], scores.queries.chunk(2)[0])
    return -F.logsigmoid(beta * (chosen - rejected)).mean() + sft_loss(first, batch, config)


# ---- the clock --------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Medians in seconds, of wall time and of this process's CPU time."""

    wall: float
    cpu: float


def check_close(ours: float, baseline: float, what: str = "loss") -> None:
    """Stop unless both sides compute the same thing: a ratio of two different things says nothing."""
    if not abs(ours - baseline) <= TOLERANCE * max(abs(baseline), 1.0):
        raise SystemExit(
            f"the two sides disagree, {what}: ours {ours:.6f}, baseline {baseline:.6f}. Nothing was measured: mend the "
            "baseline in this folder, or the model."
        )


def train_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """Forward and backward; the optimizer, the same on both sides, is left out."""

    def step() -> float:
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.item()

    return step


def interleave(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time the sides in turn, A B A B ..., so that a change of the machine's load meets both; medians."""
    wall, cpu = ({name: [] for name in sides} for _ in range(2))
    for _ in range(repeats):
        for name, work in sides.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {name: Timing(statistics.median(wall[name]), statistics.median(cpu[name])) for name in sides}


def compare(model: torch.nn.Module, losses: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, Timing]:
    """Time the training steps of "ours" and "baseline"; the first, untimed one of each must give equal losses."""
    steps = {name: train_step(model, loss) for name, loss in losses.items()}
    check_close(**{name: step() for name, step in steps.items()})
    return interleave(steps, repeats)


def machine() -> str:
    """Versions and thread count, for the last column of a row."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} thread(s)"
    )


def sizes(setting: Setting) -> str:
    """What was measured, for a column of a row."""
    return f"batch {setting.batch}, T={setting.frames}, {setting.layers} layers, H={setting.hidden}"


def print_row(title: str, setting: Setting, sides: dict[str, Timing], target: str) -> None:
    """One Markdown row: ours / baseline, in wall and in CPU time."""
    ours, baseline = sides["ours"], sides["baseline"]
    print("| what | sizes | ours s (CPU) | baseline s (CPU) | ratio wall | ratio CPU | target | versions |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {title} | {sizes(setting)}, {setting.repeats} repeats | {ours.wall:.2f} ({ours.cpu:.2f}) | "
        f"{baseline.wall:.2f} ({baseline.cpu:.2f}) | {ours.wall / baseline.wall:.2f} | {ours.cpu / baseline.cpu:.2f} | "
        f"{target} | {machine()} |"
    )
