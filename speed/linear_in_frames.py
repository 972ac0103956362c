# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Time of an SFT step (forward and backward) over the number of frames, 32 to 1024: is it linear?

A straight line is fitted by least squares; `curvature` is the cost of a frame between the two longest videos over its
cost between the two shortest that differ by at least 64 frames: 1 is linear, and twice-as-long videos that cost four
times as much would give about 8.
"""

from dataclasses import replace

import numpy as np
from common import Setting, Timing, build_model, interleave, machine, read_setting, train_step, training_batch


LENGTHS = (32, 64, 128, 256, 512, 1024)


def measure(setting: Setting, lengths: tuple[int, ...] = LENGTHS) -> dict[int, Timing]:
    """Medians for each number of frames, all in turn."""
    model = build_model(setting)

    def step(frames: int):
        batch = training_batch(replace(setting, frames=frames))
        return train_step(model, lambda: model(**batch).loss)

    steps = {str(frames): step(frames) for frames in lengths}
    for work in steps.values():
        work()  # warms up
    return {int(name): timing for name, timing in interleave(steps, setting.repeats).items()}


def linearity(times: dict[int, float]) -> dict[str, float]:
    """How straight a curve is.

    Args:
        times (`dict[int, float]`): Seconds by number of frames.

    Returns:
        `r2` of the straight line, `exponent` of the power law between the two longest, `per_frame`: seconds by which
        the line rises, and `curvature`.
    """
    frames, seconds = np.array(list(times), dtype=float), np.array(list(times.values()))
    slope, offset = np.polyfit(frames, seconds, 1)
    rest = seconds - (slope * frames + offset)
    rise = np.diff(seconds) / np.diff(frames)
    first = int(np.argmax(np.diff(frames) >= min(64, np.diff(frames).max())))
    return {
        "r2": float(1 - (rest**2).sum() / ((seconds - seconds.mean()) ** 2).sum()),
        "exponent": float(np.log(seconds[-1] / seconds[-2]) / np.log(frames[-1] / frames[-2])),
        "per_frame": float(slope),
        "curvature": float(rise[-1] / rise[first]),
    }


def main() -> None:
    setting, _ = read_setting(__doc__, batch=1, repeats=3, frames=LENGTHS[-1])
    lengths = tuple(length for length in LENGTHS if length <= setting.frames)
    found = measure(setting, lengths)
    wall, cpu = (linearity({t: getattr(timing, name) for t, timing in found.items()}) for name in ("wall", "cpu"))
    print("| T | " + " | ".join(map(str, found)) + " |")
    print("| --- " * (len(found) + 1) + "|")
    print("| wall s | " + " | ".join(f"{timing.wall:.2f}" for timing in found.values()) + " |")
    print("| CPU s | " + " | ".join(f"{timing.cpu:.2f}" for timing in found.values()) + " |")
    print()
    print("| clock | R2 of a line | exponent of the last doubling | ms a frame | curvature | versions |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, fit in (("wall", wall), ("CPU", cpu)):
        print(
            f"| {name} | {fit['r2']:.4f} | {fit['exponent']:.2f} | {1000 * fit['per_frame']:.2f} | "
            f"{fit['curvature']:.2f} | {machine()} |"
        )


if __name__ == "__main__":
    main()
