# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Shapes videos as the frozen tower sees them: rendered and encoded once, then read by every arm."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from d2vlm_hf.data.shapes import Scene, render_frames


CHUNK = 32  # videos in a file


class PatchStore:
    """Patch features of videos by name, on disk: `store[name]` is what collators take for a video.

    Args:
        folder (`Path`): Where the files are; a killed run goes on with those that are missing.
        settings (`Mapping`): What decides the features; a folder of other settings is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.files = Path(folder), {}
        self.folder.mkdir(parents=True, exist_ok=True)
        path, wanted = self.folder / "settings.json", json.loads(json.dumps(dict(settings)))
        if path.exists() and json.loads(path.read_text()) != wanted:
            raise ValueError(f"{self.folder} holds features of other settings than {wanted}. Use another output_dir.")
        path.write_text(json.dumps(wanted, indent=1) + "\n")

    def fill(self, model, processor, scenes: Sequence[Scene], fps: float) -> None:
        """Encode the scenes that are not there yet."""
        size = model.config.vision_config.image_size
        for number in tqdm(range(math.ceil(len(scenes) / CHUNK)), desc=f"patches {self.folder.name}"):
            path = self.folder / f"patches-{number:05d}.safetensors"
            if not path.exists():
                tensors = {}
                for scene in scenes[number * CHUNK : (number + 1) * CHUNK]:
                    times = np.arange(0, scene.duration, 1 / fps)
                    frames = render_frames(scene, times, size)
                    encoded = processor.video_processor(videos=[frames], timestamps=[times], fps=fps)
                    with torch.no_grad():
                        tensors[scene.name] = model.model.encode_patches(encoded["pixel_values_videos"]).half()
                    tensors[f"{scene.name}/times"] = torch.from_numpy(times)
                save_file(tensors, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
            opened = safe_open(path, "pt")
            self.files |= {name: opened for name in opened.keys() if not name.endswith("/times")}  # noqa: SIM118

    def __getitem__(self, name: str) -> dict[str, Any]:
        opened = self.files[name]
        return {"patch_features": opened.get_tensor(name), "timestamps": opened.get_tensor(f"{name}/times").numpy()}


class StoredVideos:
    """A collator whose rows name their videos: the features are put in before it is called.

    Args:
        collator (`Callable`): An `SFTCollator` or `PreferenceCollator`.
        store (`PatchStore`): The videos.
    """

    def __init__(self, collator: Callable, store: PatchStore):
        self.collator, self.store = collator, store

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [row for item in items for row in item.get("rows", [item])]
        names = [row["video"]["path"] if isinstance(row["video"], Mapping) else row["video"] for row in rows]
        videos = {name: self.store[name] for name in names}
        return self.collator([{**row, "video": videos[name]} for row, name in zip(rows, names, strict=True)])
