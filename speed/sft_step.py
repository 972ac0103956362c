# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""An SFT step (forward and backward): the prompts once with a cache, against the straightforward way.

`--memory` compares peak memory instead: each side runs one step in a process of its own.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from common import (
    Setting,
    Timing,
    build_model,
    check_close,
    compare,
    machine,
    plain_forward,
    print_row,
    read_setting,
    sft_loss,
    sizes,
    train_step,
    training_batch,
)


CHILD = """
import json, sys
sys.path, side, sizes = json.loads(sys.argv[1])
import sft_step
print(json.dumps(sft_step.peak_of(side, sft_step.Setting(**sizes))))
"""


def losses(model, setting: Setting) -> dict[str, Callable[[], torch.Tensor]]:
    """The same loss, computed in both ways."""
    batch = training_batch(setting)
    return {
        "ours": lambda: model(**batch).loss,
        "baseline": lambda: sft_loss(plain_forward(model, batch), batch, model.config),
    }


def measure(setting: Setting) -> dict[str, Timing]:
    """Medians of both sides."""
    model = build_model(setting)
    return compare(model, losses(model, setting), setting.repeats)


def peak_of(side: str, setting: Setting) -> dict[str, float]:
    """Loss and peak memory in MiB of one step in this process; `before` is the peak with the model alone."""
    model = build_model(setting)
    step = train_step(model, losses(model, setting)[side])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return {"loss": loss, "before": before / unit, "peak": peak / unit}


def measure_memory(setting: Setting) -> dict[str, dict[str, float]]:
    """`peak_of` both sides, each in a fresh process: a peak never comes down again."""
    found = {}
    for side in ("ours", "baseline"):
        command = [sys.executable, "-c", CHILD, json.dumps([sys.path, side, asdict(setting)])]
        found[side] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    check_close(found["ours"]["loss"], found["baseline"]["loss"])
    return found


def print_memory(setting: Setting, found: dict[str, dict[str, float]]) -> None:
    """One Markdown row: the whole process, and what the step added to the model."""
    ours, baseline = found["ours"], found["baseline"]
    added = [side["peak"] - side["before"] for side in (ours, baseline)]
    print("| what | sizes | ours MiB (step) | baseline MiB (step) | ratio | ratio, step alone | target | versions |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| SFT step, peak memory | {sizes(setting)} | {ours['peak']:.0f} ({added[0]:.0f}) | {baseline['peak']:.0f} "
        f"({added[1]:.0f}) | {ours['peak'] / baseline['peak']:.2f} | {added[0] / max(added[1], 1):.2f} | <= 0.70 | "
        f"{machine()} |"
    )


def main() -> None:
    setting, options = read_setting(__doc__)
    if options.memory:
        print_memory(setting, measure_memory(setting))
    else:
        print_row("SFT step", setting, measure(setting), "<= 0.65")


if __name__ == "__main__":
    main()
