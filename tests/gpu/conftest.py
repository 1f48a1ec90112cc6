"""Tests of the CUDA paths: skipped where there is no CUDA device, run by `make gpu-check` where there is one."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
