"""The compiled kernel of the optimizer on a real GPU, against the plain update on the same GPU."""

import threading
from itertools import product

import pytest
import torch

from foam_lightning import FOAM
from foam_lightning.optim import gpu_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
COLUMNS, LEVELS = (4096, 5461, 11008), (0, 1, 2, 3, 8, 20)
DTYPES = ((F32, F32), (BF16, BF16), (BF16, F32), (BF16, INT8))


def run(columns, level, dtype, state_dtype, *, fused):
    random = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(64, columns, device="cuda", generator=random).to(dtype)
    param = torch.nn.Parameter(weight)
    optimizer = FOAM([param], lr=0.01, level=level, state_dtype=state_dtype, fused=fused)
    for _ in range(2):
        param.grad = torch.randn(64, columns, device="cuda", generator=random).to(dtype)
        optimizer.step()
    moments = {key: value for key, value in optimizer.state[param].items() if key != "step"}
    return {"weight": param.detach(), **moments}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_kernel_equals_the_plain_update(columns, level):
    assert gpu_kernel.is_available()
    for dtypes in DTYPES:
        plain, fused = (run(columns, level, *dtypes, fused=fused) for fused in (False, True))
        for key, expected in plain.items():
            # Few values lie so close to a boundary that the last bits of float32 round them to
            # another neighbour, at most one step of bfloat16 or one code away.
            found = fused[key]
            if expected.dtype != F32:
                assert (found != expected).sum() <= 1 + 0.01 * expected.numel(), (key, dtypes)
            step = 2**-7 if expected.dtype == BF16 else 1e-4
            atol = 1 if not expected.is_floating_point() else 1e-5
            torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=atol)


def test_no_compiled_kernel_spills_registers():
    from foam_lightning.optim.triton_kernel import foam_kernel

    for columns, level, dtypes in product(COLUMNS, LEVELS, DTYPES):
        run(columns, level, *dtypes, fused=True)
    compiled = [
        kernel for cache in foam_kernel.device_caches.values() for kernel in cache[0].values()
    ]
    assert compiled
    assert [(k.metadata, k.n_spills) for k in compiled if k.n_spills] == []


def test_the_kernel_runs_in_another_thread_without_temporaries():
    param = torch.nn.Parameter(torch.zeros(4096, 4096, device="cuda", dtype=BF16))
    param.grad = torch.ones_like(param)
    optimizer = FOAM([param], state_dtype=BF16)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert optimizer.state[param]["step"] == 2
    assert torch.cuda.max_memory_allocated() == before
