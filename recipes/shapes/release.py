# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Round a trained checkpoint to float16 and put it into the package, where it is the default of the pipeline.

    python recipes/shapes/release.py runs/shapes-sft

The rounded weights are what every table is measured on. They are loaded in float32, as `config.json` says. The code of
the model stays out of the folder: it is the package's own; `save_pretrained` of the pipeline adds it to a folder that
is to load without the package.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import d2vlm_hf


def release(source: str, target: str) -> float:
    """Write weights in float16, configuration and processor.

    Args:
        source (`str`): Folder of a trained checkpoint.
        target (`str`): Folder to write; what it holds of an earlier release is replaced.

    Returns:
        `float`: Size of the weights in MB.
    """
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    folder = Path(target)
    model.half().save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    for name in ("auto_map", "custom_pipelines"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (folder / "model.safetensors").stat().st_size / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Round a checkpoint and put it into the package.")
    parser.add_argument("source", help="folder of a trained checkpoint")
    parser.add_argument("target", nargs="?", default=d2vlm_hf.bundled_checkpoint(), help="default: the package's own")
    arguments = parser.parse_args()
    print(f"{arguments.target}: weights of {release(arguments.source, arguments.target):.1f} MB")
