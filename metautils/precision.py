"""Half precision where the processor is faster with it, all digits and the CPU where needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


def half(device: torch.device, fp16: bool = False) -> torch.dtype | None:
    """The half precision that the device computes fast in; None where that is none.

    bfloat16 where there is. A GPU before Ampere, such as Colab's T4, has only float16, whose small
    range ordinary training bears with a `GradScaler` (`fp16=True`), and meta-training does not:
    derivatives of derivatives stay in float32 there. A CPU without bfloat16 instructions emulates
    them, several times slower than float32.

    Example:
        >>> half(torch.device("meta"), fp16=True) is None
        True
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        # Before Volta float16 is as slow as float32, or slower.
        fast = torch.cuda.get_device_capability(device) >= (7, 0)
        return torch.float16 if fp16 and fast else None
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else None


def fast_autocast(device: torch.device, fp16: bool = False) -> AbstractContextManager:
    """Autocast to the half precision of the device, otherwise plain float32; see `half`."""
    dtype = half(device, fp16)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    """What keeps small gradients of `fast_autocast(device, fp16=True)` from becoming 0.

    It does nothing where that does not compute in float16.
    """
    return torch.amp.GradScaler(device.type, enabled=half(device, fp16=True) == torch.float16)


def single(x: Tensor) -> Tensor:
    """Half precision as float32, where digits count from here on; anything else as it is.

    Example:
        >>> single(torch.ones(2, dtype=torch.bfloat16)).dtype, single(torch.ones(2).double()).dtype
        (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def all_digits(device: torch.device) -> Iterator[None]:
    """float32 as it is: no autocast, and no TF32 in convolutions.

    From Ampere on, torch lets convolutions of float32 round their inputs to 10 bits, as TF32, while
    matrix products keep all 23 unless one asks otherwise. Ordinary training bears that, gradients
    through gradients do not. So the learners that take them compute in here, and `meta_train` runs
    backward in here; whoever writes such a loop anew does the same. It holds for all threads.

    Example:
        >>> x = torch.rand(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), all_digits(x.device):
        ...     print((x @ x).dtype)
        torch.float32
    """
    where, name, off = _rounding()
    before = getattr(where, name)
    amp = torch.amp.is_autocast_available(device.type)
    _set(where, name, off)
    try:
        with torch.autocast(device.type, enabled=False) if amp else nullcontext():
            yield
    finally:
        _set(where, name, before)


def _rounding() -> tuple[Any, str, Any]:
    """Where torch is told whether convolutions round: object, attribute, and the value for no."""
    cudnn = torch.backends.cudnn
    try:
        _ = cudnn.allow_tf32
    except RuntimeError:  # the reader has set the newer way, beside which torch refuses this one
        return cudnn.conv, "fp32_precision", "ieee"
    # The older way, in every torch: set the newer one, and `cudnn.flags` in a network fails.
    return cudnn, "allow_tf32", False


def _set(where: Any, name: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases of torch warn of the older way
        setattr(where, name, value)


def on_cpu() -> AbstractContextManager:
    """New tensors lie on the CPU, whatever torch's default device is: for what is drawn by chance.

    Generators are there, so that a seed draws the same on any machine.

    Example:
        >>> with torch.device("meta"), on_cpu():
        ...     print(torch.rand(2).device)
        cpu
    """
    # Nearly always the CPU is the default, and then torch is quicker without being told.
    default = torch.get_default_device().type == "cpu"
    return nullcontext() if default else torch.device("cpu")


@contextmanager
def in_float32() -> Iterator[None]:
    """New numbers are float32, whatever torch's default is: a seed draws the same ones everywhere.

    Example:
        >>> with in_float32():
        ...     print(torch.rand(2).dtype)
        torch.float32
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def _cpu_has_bf16() -> bool:
    # Older releases of torch do not tell; float32 is the safe answer there.
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
