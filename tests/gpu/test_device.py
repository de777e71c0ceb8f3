"""The memory cap and the calibration on a real GPU; tests/memory/test_device.py simulates one."""

import pytest
import torch

from foam_lightning.memory.device import Gpu, is_out_of_memory, memory_cap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MB = 10**6


def test_nothing_is_reserved_beyond_the_cap():
    gpu, costs = Gpu(), Gpu().measure()
    budget = costs.context + torch.cuda.memory_reserved() + 500 * MB
    kept = []
    gpu.reset_peaks()
    with memory_cap(gpu, budget, costs.context):
        with pytest.raises(torch.OutOfMemoryError) as caught:
            kept.extend(torch.empty(30 * MB, dtype=torch.int8, device="cuda") for _ in range(99))
        assert is_out_of_memory(caught.value)
        assert gpu.usage().reserved > 300 * MB
        assert gpu.usage().reserved <= budget - costs.context
    kept.append(torch.empty(600 * MB, dtype=torch.int8, device="cuda"))


def test_the_overhead_of_a_gpu_has_the_expected_size():
    costs = Gpu().measure()
    assert 100 * MB < costs.context < 2_000 * MB
    assert 0 <= costs.workspace <= 4 * 33.6 * MB
