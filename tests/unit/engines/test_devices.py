"""The device of a run."""

import pytest
import torch

from lctrain.devices import choose_device, gemm_flops, peak_flops, peak_memory_mb
from lctrain.errors import UserError


def without_cuda(monkeypatch: pytest.MonkeyPatch, count: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_choice_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"engine\.device=cuda, but torch sees no CUDA device"):
        choose_device("cuda")


def test_choice_with_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch, count=2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(UserError, match=r"3 processes on this machine .* it has 2"):
        choose_device("auto", 0, local_size=3)


def test_peak_on_cpu_is_measured() -> None:
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
    assert source == "measured matrix product"
    assert gemm_flops(torch.device("cpu"), torch.float32, size=64, seconds=0.01) > 0


@pytest.mark.parametrize(("name", "teraflops"), [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA H200", 989.5)])
def test_published_peaks(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float) -> None:
    """An A10 must not answer for an A100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == (teraflops * 1e12, f"{name}, published")


def test_memory_is_in_mib() -> None:
    import psutil

    resident = psutil.Process().memory_info().rss / 2**20
    assert 0.9 * resident <= peak_memory_mb(torch.device("cpu")) < psutil.virtual_memory().total / 2**20
