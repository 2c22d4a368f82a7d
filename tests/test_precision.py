"""Half precision is chosen by what the device computes fast in; all digits are kept where asked."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import convolutions_round

from metautils import precision
from metautils.precision import (
    all_digits,
    fast_autocast,
    grad_scaler,
    half,
    in_float32,
    single,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def pretend(monkeypatch, bf16, capability=(7, 5)):
    """A GPU of this kind."""

    def supported(including_emulation=True):
        return bf16 or including_emulation  # a T4 emulates bfloat16, slowly

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("bf16", "capability", "meta", "ordinary"),
    [
        pytest.param(True, (8, 0), torch.bfloat16, torch.bfloat16, id="A100"),
        pytest.param(False, (7, 5), None, torch.float16, id="T4"),
        pytest.param(False, (7, 0), None, torch.float16, id="V100"),
        pytest.param(False, (6, 1), None, None, id="GTX 1080"),
    ],
)
def test_half_precision_of_a_gpu(monkeypatch, bf16, capability, meta, ordinary):
    pretend(monkeypatch, bf16, capability)
    assert half(GPU) == meta
    assert half(GPU, fp16=True) == ordinary


@pytest.mark.parametrize("has", [True, False])
def test_half_precision_of_a_cpu(monkeypatch, has):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: has)
    for fp16 in (False, True):
        assert half(CPU, fp16) == (torch.bfloat16 if has else None)
        with fast_autocast(CPU, fp16):
            expected = torch.bfloat16 if has else torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert not grad_scaler(CPU).is_enabled()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, None], ids=str)
def test_gradients_are_scaled_in_float16_alone(monkeypatch, kind):
    monkeypatch.setattr(precision, "half", lambda device, fp16=False: kind if fp16 else None)
    scaler = grad_scaler(CPU)
    assert scaler.is_enabled() == (kind == torch.float16)
    assert float(scaler.scale(torch.ones(()))) == (2**16 if kind == torch.float16 else 1)


def test_other_devices_compute_in_float32():
    assert half(torch.device("mps")) is half(torch.device("mps"), fp16=True) is None
    assert not grad_scaler(torch.device("mps")).is_enabled()


# All digits


def products():
    return torch.ones(2, 2) @ torch.ones(2, 2)


def test_all_digits_end_autocast_and_rounding_for_the_while():
    before = convolutions_round()
    assert before, "torch rounds by default; if it no longer does, less is to be done here"
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        with all_digits(CPU), all_digits(CPU):
            assert products().dtype == torch.float32
            assert not convolutions_round()
        assert products().dtype == torch.bfloat16
    assert convolutions_round()
    assert torch.backends.cudnn.allow_tf32  # the older way of asking still answers


def test_all_digits_end_with_an_error_too():
    with pytest.raises(KeyboardInterrupt), all_digits(CPU):
        raise KeyboardInterrupt
    assert convolutions_round()


def test_all_digits_leave_a_reader_s_own_choice():
    torch.backends.cudnn.allow_tf32 = False
    try:
        with all_digits(CPU):
            assert not convolutions_round()
        assert not convolutions_round()
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_all_digits_in_an_older_torch(monkeypatch):
    """Which knows but one way to say it."""
    older = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends, "cudnn", older)
    with all_digits(CPU):
        assert older.allow_tf32 is False
    assert older.allow_tf32 is True


def test_all_digits_beside_the_usual_way_around_recurrent_kernels():
    """`cudnn.flags` in a network reads the older setting, which torch refuses beside the newer."""
    with all_digits(CPU), torch.backends.cudnn.flags(enabled=False):
        assert not torch.backends.cudnn.enabled
    assert convolutions_round()


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has one way alone")
def test_all_digits_where_a_reader_has_set_the_newer_way():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        with pytest.raises(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
        with all_digits(CPU):
            assert conv.fp32_precision == "ieee"
        assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = before


def test_all_digits_on_a_device_without_autocast():
    with all_digits(torch.device("meta")):
        assert not convolutions_round()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_becomes_single_and_double_stays(dtype, expected):
    assert single(torch.ones(2, dtype=dtype)).dtype == expected


def test_numbers_in_float32_and_the_default_back_afterwards(float64):
    with pytest.raises(KeyError), in_float32():
        assert torch.rand(1).dtype == torch.float32
        raise KeyError
    assert torch.get_default_dtype() == torch.float64
