# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The shapes world as a `datasets` builder, for `push_to_hub` and everything else that `datasets` can do.

builder = ShapesBuilder(num_videos={"train": 1000, "test": 100}, difficulty="middle")
builder.download_and_prepare()
dataset = builder.as_dataset()
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from .schema import features
from .shapes import ShapesConfig, generate, load_rows
from .shapes_render import DEFAULT_SIZE


@dataclass
class ShapesBuilderConfig(datasets.BuilderConfig):
    """Settings of the builder.

    Args:
        difficulty (`str`, *optional*, defaults to `"middle"`):
            Level of all its splits.
        num_videos (`dict[str, int]`, *optional*):
            Videos of each split, by the name of the split.
        rows_per_video (`int`, *optional*, defaults to 4):
            Rows asked about each video.
        seed (`int`, *optional*, defaults to 0):
            Seed of the whole data set.
        size (`int`, *optional*, defaults to 128):
            Height and width of the files in pixels.
        embed (`bool`, *optional*, defaults to `True`):
            Whether the rows hold the bytes of the files, or their paths.
        folder (`str`, *optional*):
            Where the files are written, by default a folder in the cache.
        num_proc (`int`, *optional*, defaults to 1):
            Processes that write files.
    """

    difficulty: str = "middle"
    num_videos: dict[str, int] = field(default_factory=lambda: {"train": 100, "validation": 20, "test": 20})
    rows_per_video: int = 4
    seed: int = 0
    size: int = DEFAULT_SIZE
    embed: bool = True
    folder: str | None = None
    num_proc: int = 1


class ShapesBuilder(datasets.GeneratorBasedBuilder):
    """Videos of moving coloured shapes with exact temporal annotations, in the schema of this package."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ShapesBuilderConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=self.__doc__, features=features(), license="apache-2.0")

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        root = Path(self.config.folder or os.path.join(self._cache_dir_root, "shapes_files", self.config.name))
        generators = []
        for split, count in self.config.num_videos.items():
            config = ShapesConfig(
                difficulty=self.config.difficulty,
                split=split,
                num_videos=count,
                rows_per_video=self.config.rows_per_video,
                seed=self.config.seed,
                size=self.config.size,
            )
            settings = f"{config.difficulty}-{split}-{config.seed}-{config.size}-{config.rows_per_video}"
            arguments = {"config": config, "folder": str(root / settings)}
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs=arguments))
        return generators

    def _generate_examples(self, config: ShapesConfig, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        generate(config, folder, num_proc=self.config.num_proc, progress=datasets.is_progress_bar_enabled())
        for row in load_rows(folder):
            if self.config.embed:
                path = Path(row["video"])
                row["video"] = {"bytes": path.read_bytes(), "path": path.name}
            yield row["id"], row


__all__ = ["ShapesBuilder", "ShapesBuilderConfig"]
