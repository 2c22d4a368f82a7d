"""A pretend accelerator: it computes on the CPU and refuses what a real one would refuse.

Within `device()` torch has a device named `pretend`. Where tensors of two devices meet, it fails as
a GPU does; numpy does not see its tensors; a CPU's generator does not serve it; its random numbers
come from a state of its own, which a checkpoint has to keep. Without `float64` it is like a Mac's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup
except ImportError:  # torch before 2.10 or so
    setup = None

NAME = "pretend"
# These take a CPU's tensor as an index, as on a GPU.
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)


class OnDevice(Tensor):
    """A tensor of the device; `raw` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        if raw.dtype == torch.float64 and not Accelerator.float64:
            raise TypeError(f"Cannot convert to float64: the device {NAME!r} does not have it.")
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        place = torch.device(NAME, 0)
        return Tensor._make_wrapper_subclass(
            cls, raw.shape, dtype=raw.dtype, device=place, **layout
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"{self.raw!r} on {NAME}"

    def __format__(self, form: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), form)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: OnDevice) -> None:
        Tensor.data.__set__(self, other)
        self.raw = other.raw

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # a file holds values, not a device


class Accelerator:
    """What torch asks of a device."""

    float64 = True
    state = torch.Generator().manual_seed(1).get_state()

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        cls.state = torch.Generator().manual_seed(seed).get_state()

    @classmethod
    def get_rng_state(cls, device: Any = 0) -> Tensor:
        return cls.state

    @classmethod
    def set_rng_state(cls, state: Tensor, device: Any = 0) -> None:
        cls.state = state

    @classmethod
    @contextmanager
    def random(cls) -> Iterator[None]:
        """Random numbers from the device's state, not from the CPU's."""
        kept = torch.get_rng_state()
        torch.set_rng_state(cls.state)
        try:
            yield
        finally:
            cls.state = torch.get_rng_state()
            torch.set_rng_state(kept)


class _Everywhere(TorchDispatchMode):
    """Sees every operation, those that make tensors of nothing too."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not types and kwargs.get("device") is None:  # nothing of the device's
            return op(*args, **kwargs)
        return _run(op, args, kwargs)


def _run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU; its results lie on the device where a real one would put them."""
    ours = [x for x in tree.tree_leaves((args, kwargs)) if isinstance(x, OnDevice)]
    place = kwargs.get("device")
    here = bool(ours) if place is None else torch.device(place).type == NAME
    if here:
        _refuse(op, args, kwargs, ours)
    if place is not None and (here or ours):
        kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
        kwargs["device"] = torch.device("cpu")
    raw_args, raw_kwargs = tree.tree_map_only(OnDevice, lambda x: x.raw, (args, kwargs))
    if here and torch.Tag.inplace_view in op.tags:  # the device's own tensor takes the shape too
        with torch._C._ExcludeDispatchKeyGuard(PYTHON):
            op(*args, **kwargs)
    if here and torch.Tag.nondeterministic_seeded in op.tags:
        with Accelerator.random():
            out = op(*raw_args, **raw_kwargs)
    else:
        out = op(*raw_args, **raw_kwargs)
    if not here:  # a copy to the CPU must not be the very tensor that lies on the device
        same = ours and isinstance(out, Tensor) and any(out is x.raw for x in ours)
        return out.clone() if same else out
    known = {id(x.raw): x for x in ours}  # what was changed in place stays the tensor it is
    return tree.tree_map_only(
        Tensor, lambda x: known[id(x)] if id(x) in known else OnDevice(x), out
    )


def _refuse(op: Any, args: tuple, kwargs: dict[str, Any], ours: list[OnDevice]) -> None:
    leaves = tree.tree_leaves((args, kwargs))
    name = op._schema.name.removeprefix("aten::")
    if any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")
    cpus = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    if ours and cpus and not _may_meet(op, name, args, cpus):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} found {NAME} and cpu"
        )


def _may_meet(op: Any, name: str, args: tuple, cpus: list[Tensor]) -> bool:
    """Whether a GPU would take these tensors of the CPU beside its own."""
    if name == "copy_":
        return True
    if name in INDEXED:  # indices may lie on the CPU, and what is put there if it is a number
        put = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
        return isinstance(args[0], OnDevice) and not any(x.dim() for x in put)
    changed = op._schema.arguments[0].alias_info
    if changed is not None and changed.is_write and not isinstance(args[0], OnDevice):
        return False  # a sum on the CPU cannot take up what lies on the device
    return name not in ("cat", "stack") and not any(x.dim() for x in cpus)


_LIBRARY = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> OnDevice:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    source, raw = (x.raw if isinstance(x, OnDevice) else x for x in (source, target))
    raw.copy_(source)
    return target


def _lstm_cell(
    x: Tensor, hx: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor]:
    """torch's own for accelerators is one kernel, which the CPU does not have."""
    h, c = hx
    gates = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@contextmanager
def device(float64: bool = True) -> Iterator[str]:
    """Give torch the device for a while; yields its name.

    In a process that has not run backward yet: then torch makes a thread for each device it knows.

    Raises:
        NotImplementedError: if this torch is too old to have a device written in Python.
    """
    if setup is None:
        raise NotImplementedError(f"torch {torch.__version__} has no devices written in Python.")
    if not hasattr(torch, NAME):
        setup(NAME, backend_module=Accelerator)
        # A list as an index becomes a tensor of the device beneath all that is seen above.
        for name, kernel in {"empty_strided": _empty_strided, "_copy_from": _copy_from}.items():
            _LIBRARY.impl(name, kernel, "PrivateUse1")
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    Accelerator.float64 = float64
    try:
        with _Everywhere(), mock.patch.object(torch._VF, "lstm_cell", _lstm_cell):
            yield NAME
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
        Accelerator.float64 = True
