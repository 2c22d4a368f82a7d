"""Half precision where the processor is faster with it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch


def fast_autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast where the device computes in it, otherwise plain float32.

    A CPU without bfloat16 instructions emulates them, several times slower than float32.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


@cache
def _cpu_has_bf16() -> bool:
    # Older releases of torch do not tell; float32 is the safe answer there.
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
