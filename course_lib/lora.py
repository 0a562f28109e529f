"""The LoRA layer as lesson 5 builds it, kept for the lessons after.

Hu et al. 2021 (arXiv 2106.09685), section 4.1: ``h = W x + (alpha / r) B A x``. A projects down to r numbers, B up again;
A starts random, B at zero, so the layer starts as what it wraps.
"""

from __future__ import annotations

import math

from course_lib.errors import ModelError


def lora_linear(linear, rank: int, alpha: float, *, seed: int | None = None):
    """Return a linear layer with a trainable low-rank update beside it; the layer itself is frozen in place. (Week 6, lesson 5.)

    ``linear`` may be any module from (..., in_features) to (..., out_features) that tells both, one of bitsandbytes' in 4
    bit too. The result has ``A`` (rank, in_features), ``B`` (out_features, rank), ``scale`` and ``update()``, the weight's
    change, (out_features, in_features). A starts as peft's does. Raises ModelError for a rank below 1 or a layer without sizes.
    """
    import torch
    from torch import nn

    if rank < 1:
        raise ModelError(f"the rank is the number of values between A and B, at least 1; you gave {rank}")
    if not hasattr(linear, "in_features") or not hasattr(linear, "out_features"):
        raise ModelError(f"LoRA goes on a linear layer; {type(linear).__name__} tells no in_features and out_features")

    class LoRALinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear.requires_grad_(False)
            self.scale = alpha / rank
            device = next(linear.parameters()).device
            generator = None if seed is None else torch.Generator(device).manual_seed(seed)
            self.A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
            self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

        def forward(self, x):
            down = nn.functional.linear(x.to(self.A.dtype), self.A)  # (..., rank)
            return self.linear(x) + (self.scale * nn.functional.linear(down, self.B)).to(x.dtype)

        def update(self):
            return self.scale * (self.B @ self.A)

    return LoRALinear()
