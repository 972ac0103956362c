# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Muon in float32: momentum whose update is orthogonalised, for the matrices of a model from nothing.

`torch.optim.Muon` orthogonalises in bfloat16, matrix by matrix. CPUs without bfloat16 instructions emulate it a hundred
times slower than float32; here matrices of one shape are stacked and stay in float32.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch


# Newton-Schulz quintic a*x + b*x^3 + c*x^5, tuned to bring every singular value near 1 in five steps (Jordan, 2024)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
RMS = 0.2  # root mean square of an update, that of AdamW: learning rates carry over (Liu et al., 2025)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values come out between about 0.7 and 1.2.

    Args:
        matrices (`torch.Tensor` of shape `(N, rows, columns)`): Float32.

    Returns:
        `torch.Tensor` of the same shape.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for weight matrices; everything else belongs to AdamW.

    Args:
        params (iterable of `torch.nn.Parameter`): Matrices.
        lr (`float`): As for AdamW.
        momentum (`float`): Of the running gradient, used as by Nesterov.
        weight_decay (`float`): Decoupled.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for shape in (p.shape for group in self.param_groups for p in group["params"] if p.ndim != 2):
            raise ValueError(f"Muon got a parameter of shape {tuple(shape)}: it turns matrices. Give it to AdamW.")

    @torch.no_grad()
    def step(self, closure=None):
        """One update; matrices of one shape are turned together."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                running = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                gradients = [p.grad for p in parameters]
                torch._foreach_lerp_(running, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, running, group["momentum"])
                updates = orthogonalise(torch.stack(ahead)) * (RMS * max(rows, columns) ** 0.5)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates), alpha=-group["lr"])


__all__ = ["Muon", "orthogonalise"]
