# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""An FPO step (forward and backward): one video and one prompt for both responses, against the straightforward way."""

from collections.abc import Callable

import torch
from common import (
    Scores,
    Setting,
    Timing,
    build_model,
    compare,
    fpo_loss,
    plain_forward,
    print_row,
    read_setting,
    training_batch,
)


def losses(model, setting: Setting) -> dict[str, Callable[[], torch.Tensor]]:
    """The same loss, computed in both ways."""
    batch = training_batch(setting, responses=2)

    def ours() -> torch.Tensor:
        outputs = model(**batch)
        scores = Scores(outputs.token_logps, outputs.evidence_logits, outputs.evidence_queries)
        return fpo_loss(scores, batch, model.config)

    return {"ours": ours, "baseline": lambda: fpo_loss(plain_forward(model, batch), batch, model.config)}


def measure(setting: Setting) -> dict[str, Timing]:
    """Medians of both sides."""
    model = build_model(setting)
    return compare(model, losses(model, setting), setting.repeats)


def main() -> None:
    setting, _ = read_setting(__doc__)
    print_row("FPO step", setting, measure(setting), "<= 0.45")


if __name__ == "__main__":
    main()
