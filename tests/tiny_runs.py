# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A model of a few thousand weights, rows of the shapes world and preferences, for tests of training."""

from functools import cache

import torch
from datasets import Dataset, Video

from d2vlm_hf.data.preference import make_preferences
from d2vlm_hf.data.schema import features
from d2vlm_hf.data.shapes import make_rows, make_scene, write_video
from d2vlm_hf.data.sources import shapes_corpus
from d2vlm_hf.training.scratch import build_from_scratch


SPEC = {
    "vocab_size": 560,
    "qformer_vocab_size": 300,
    "vision": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8, "initializer_range": 0.1,
    },
    "qformer": {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "cross_attention_frequency": 1, "max_position_embeddings": 256, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
    },
    "text": {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "initializer_range": 0.1,
    },
    "model": {"num_query_tokens": 2, "evidence_layer": 1, "initializer_range": 0.1},
    "processor": {"fps": 1.0},
}  # fmt: skip


@cache
def corpus() -> tuple[str, ...]:
    """Texts for the tokenizers."""
    return tuple(shapes_corpus(30))


def tiny(seed: int = 0):
    """A model with random weights and its processor."""
    torch.manual_seed(seed)
    return build_from_scratch(SPEC, corpus())


def sft_rows(folder, videos: int = 3, per_video: int = 4) -> list[dict]:
    """Rows about easy videos, whose H.264 files are written into a folder."""
    rows = []
    for index in range(videos):
        scene = make_scene("easy", "train", index, 0)
        path = write_video(scene, folder / f"{scene.name}.mp4", size=32)
        rows += make_rows(scene, per_video, {"tvg": 0.4, "tal": 0.3, "dvc": 0.3}, video=str(path))
    return rows


def preference_dataset(rows, per_row: int | None = None) -> Dataset:
    """Preference rows as `FPOTrainer` takes them; videos are paths, whether torchcodec can decode them or not."""
    dataset = Dataset.from_list(list(make_preferences(rows, per_row=per_row)), features=features(preference=True))
    return dataset.cast_column("video", Video(decode=False))
