"""The update on a GPU: by Triton's interpreter where there is no GPU, against the plain update.

tests/gpu/test_kernel.py runs it compiled.
"""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from foam_lightning import FOAM
from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.optim import gpu_kernel
from foam_lightning.optim.functional import foam_step_
from foam_lightning.optim.gpu_kernel import gpu_kernel_step_, is_supported
from tests.optim.test_functional import assert_follows_the_paper
from tests.optim.test_kernels import BF16, F32, INT8, constants, factors_at, tensors
from tests.reference.foam_paper import Settings

pytest.importorskip("triton", reason="needs Triton, which Linux has")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, INT8)]
LEVELS = [0, 1, 2, 3, 8, 20]


def on_device(param, grad, state):
    return param.to(DEVICE), grad.to(DEVICE), {key: x.to(DEVICE) for key, x in state.items()}


def both(shape, level, dtypes, *, seed=None, steps=2, second_moment="mean_square", **factors):
    """Update the same tensors by the kernel and by the plain update."""
    plain, fused = tensors(shape, level, *dtypes), on_device(*tensors(shape, level, *dtypes))
    assert is_supported(*fused, level)
    options = {"seed": seed, **constants(level, second_moment)}
    for step in range(1, steps + 1):
        foam_step_(*plain, factors_at(step, **factors), **options)
        gpu_kernel_step_(*fused, factors_at(step, **factors), **options)
    for name, a, b in zip(
        ("param", *plain[2]), (plain[0], *plain[2].values()), (fused[0], *fused[2].values()),
        strict=True,
    ):  # fmt: skip
        yield name, a, b.cpu()


def assert_equal_but_for_last_bits(results):
    """Assert equality within float32's last bits, which rounding may turn into another neighbour.

    bfloat16 has neighbours 2**-7 apart, int8 codes 1; few values lie so close to a boundary.
    """
    for name, a, b in results:
        if a.dtype == F32:
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            continue
        assert (a != b).sum() <= 1 + 0.005 * a.numel(), name
        distance = {"rtol": 2**-7, "atol": 1e-6} if a.dtype == BF16 else {"rtol": 0, "atol": 1}
        torch.testing.assert_close(a.float(), b.float(), **distance)


@pytest.mark.parametrize("columns", [4096, 5461, 11008, 31, 1])
@pytest.mark.parametrize("level", LEVELS)
def test_the_kernel_equals_the_plain_update(columns, level):
    for dtypes in DTYPES:
        for seed in (None, -12345):
            shape = (1 if columns > 100 else 9, columns)
            assert_equal_but_for_last_bits(both(shape, level, dtypes, seed=seed, steps=1))


@pytest.mark.parametrize(
    "shape", [(7,), (1500,), (), (3, 2, 40), (5, 1), (1, 600), (9, 22)], ids=str
)
@pytest.mark.parametrize("level", [0, 1, 3])
def test_any_shape_is_updated(shape, level):
    level = level if len(shape) > 1 else 0
    for dtypes in DTYPES:
        assert_equal_but_for_last_bits(both(shape, level, dtypes, seed=3))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mean_square", [True, False], ids=["mean_square", "square_mean"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_the_kernel_follows_the_paper(level, mean_square, dtypes):
    settings = Settings(level=level, mean_square=mean_square, weight_decay=0.1)

    def step_(param, grad, state, factors, **options):
        moved = on_device(param, grad, state)
        gpu_kernel_step_(*moved, factors, **options)
        for old, new in zip((param, *state.values()), (moved[0], *moved[2].values()), strict=True):
            old.copy_(new)

    assert_follows_the_paper((5, 22), settings, dtypes, step_=step_)


@pytest.mark.parametrize(
    "changed",
    [
        {"residual_scale": 0.5},
        {"residual_scale": 0.0, "second_moment": "square_mean"},
        {"bias_correct_moments_only": True},
        {"weight_decay": 0.0, "scale": 1.0},
    ],
    ids=str,
)
def test_every_setting_reaches_the_kernel(changed):
    assert_equal_but_for_last_bits(both((6, 44), 3, (F32, F32), **changed))


def test_the_clip_factor_multiplies_the_gradient():
    plain, fused = tensors((6, 44), 2), on_device(*tensors((6, 44), 2))
    factor = torch.tensor(0.25, device=DEVICE)
    foam_step_(plain[0], plain[1] * 0.25, plain[2], factors_at(1), **constants(2))
    gpu_kernel_step_(*fused, factors_at(1), clip_factor=factor, **constants(2))
    torch.testing.assert_close(plain[0], fused[0].cpu())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, INT8)], ids=str)
def test_a_gradient_that_is_not_finite_changes_only_its_own_part(value, dtypes):
    param, grad, state = on_device(*tensors((4, 600), 2, *dtypes))
    grad[1, 9] = value
    before = param.clone()
    gpu_kernel_step_(param, grad, state, factors_at(1), seed=1, **constants(2))
    spoilt = param.isfinite().logical_not().cpu()
    assert spoilt[1, 9]
    assert spoilt.sum() <= 4  # its block
    assert not torch.equal(param.cpu()[0], before.cpu()[0])
    # A later step meets the same block again, and with int8 the block's group of 256 codes.
    gpu_kernel_step_(param, torch.ones_like(grad), state, factors_at(2), seed=2, **constants(2))
    assert param[1, 8:12].isfinite().logical_not().all()
    assert param[[0, 2, 3]].isfinite().all()


def test_autograd_sees_that_the_kernel_changed_the_weights():
    param, grad, state = on_device(*tensors((4, 8), 1))
    y = param @ torch.ones(8, requires_grad=True, device=DEVICE)
    gpu_kernel_step_(param, grad, state, factors_at(1), **constants(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- which update runs


@pytest.mark.parametrize(
    ("change", "level"),
    [
        (lambda x: x.double(), 2),
        (lambda x: x.half(), 2),
        (lambda x: x.expand(2, 3), 2),
        (lambda x: x.expand(2, 70_000).contiguous(), 20),  # one block of 131,072 columns
    ],
    ids=["float64", "float16", "strides", "width"],
)
def test_other_tensors_are_left_to_the_plain_update(change, level):
    param = torch.zeros(2, 1)
    state = {"exp_avg": torch.zeros(2, 1), "exp_avg_sq": torch.zeros(2, 1)}
    assert is_supported(param, param, state, level)
    assert not is_supported(change(param), change(param), state, level)


def step_of(device, **options):
    """Measure the temporaries of the update of a matrix of 12 MB in bytes."""
    param = torch.nn.Parameter(torch.empty(2000, 3000, dtype=BF16, device=device))
    param.grad = torch.empty_like(param)
    optimizer = FOAM([param], state_dtype=BF16, **options)
    optimizer.step()
    param.grad = torch.empty_like(param)
    tracker = StorageTracker()
    moments = [value for key, value in optimizer.state[param].items() if key != "step"]
    tracker.claim([param, param.grad, *moments], "weights")
    tracker.term = "workspace"
    with tracker:
        optimizer.step()
    return tracker.peak().terms.get("workspace", 0)


def test_without_data_the_update_has_no_temporaries_as_on_a_gpu():
    assert step_of("meta", fused=False) > 12_000_000
    assert step_of("meta") == 0
    assert step_of("meta", clip_norm=1.0) < 100
    with FakeTensorMode():
        assert step_of("cuda") == 0


def test_without_triton_plans_count_the_plain_update(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert step_of("meta") == 0
    monkeypatch.setattr(gpu_kernel, "find_spec", lambda _: None)
    assert step_of("meta") > 12_000_000


def test_if_triton_cannot_compile_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "foam_lightning.optim.triton_kernel", None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None: zeros(*shape))
    gpu_kernel.is_available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not gpu_kernel.is_available()
            assert not gpu_kernel.is_available()
    finally:
        gpu_kernel.is_available.cache_clear()
    (record,) = caplog.records
    assert "triton" in record.getMessage()
    assert "\n" not in record.getMessage()


# ---- the code for a GPU, which is compiled without one

COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from foam_lightning.optim.triton_kernel import foam_kernel

MOMENTS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
POINTERS = ("param", "grad", *MOMENTS, "clip_factor")
SIZES = ("columns", "blocks", "tiles", "seed")
for capability, types, width, blocks, ragged in json.loads(sys.argv[1]):
    constants = {"WIDTH": width, "BLOCKS": blocks, "RAGGED": ragged, "CLIP": True}
    constants |= {"MEAN_SQUARE": True, "STOCHASTIC": True}
    names = foam_kernel.arg_names
    signature = dict.fromkeys(names, "fp32") | dict.fromkeys(SIZES, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    signature |= {name: "*" + types.get(name, "fp32") for name in POINTERS}
    aligned = [n for n in names if n in POINTERS or (not ragged and n in ("columns", "blocks"))]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(foam_kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    code = triton.compile(source, target=target, options={"num_warps": width * blocks // 256}).asm
    print(json.dumps({"local": ".local" in code["ptx"], "wide": "ld.global.v4.b32" in code["ptx"]}))
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_since_ampere_and_reads_16_bytes_at_once(tmp_path):
    bf16 = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), "bf16")
    int8 = {**bf16, "exp_avg": "i8", "exp_avg_sq": "u8"}
    cases = [
        *((capability, bf16, 4, 256, False) for capability in (80, 89, 90, 120)),
        (90, {}, 4, 256, False),
        (90, {}, 1, 1024, False),
        (90, int8, 4, 256, False),
        (90, int8, 1, 1024, False),
        (90, bf16, 2048, 1, False),
        (90, bf16, 4, 256, True),
        (90, int8, 8192, 1, True),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(cases)
    assert not any(result["local"] for result in results)
    # A row of an odd number of columns begins anywhere.
    assert [result["wide"] for result in results] == [not ragged for *_, ragged in cases]
