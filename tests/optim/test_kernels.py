"""The fused kernels against `foam_step_`, how they are compiled, and which of them runs."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from foam_lightning.memory.tracker import StorageTracker
from foam_lightning.optim import cpu_kernel, dispatch
from foam_lightning.optim.dispatch import update_tensor_
from foam_lightning.optim.functional import StepFactors, foam_step_
from foam_lightning.optim.state import state_layout

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8


def tensors(shape, level, dtype=F32, state_dtype=F32, seed=0):
    """Weights, gradient and moments that are the same for the same arguments."""
    random = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    state = {}
    for key, layout in state_layout(shape, level, state_dtype).items():
        values = torch.rand(layout.shape, generator=random)
        is_code = not layout.dtype.is_floating_point
        state[key] = (values * 100 if is_code else values).to(layout.dtype)
    return param, grad, state


def factors_at(step, **changed):
    options = {"lr": 0.01 * step, "weight_decay": 0.1, "scale": 0.25, **changed}
    return StepFactors.at_step(step, beta1=0.9, beta2=0.999, **options)


def constants(level, second_moment="mean_square"):
    shared = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    return {**shared, "level": level, "second_moment": second_moment}


def assert_same(left, right, **tolerance):
    for a, b in zip((left[0], *left[2].values()), (right[0], *right[2].values()), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# ---- CPU


@given(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 130)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40)),
        st.tuples(st.integers(1, 200)),
    ),
    st.integers(0, 12),
    st.sampled_from(["mean_square", "square_mean"]),
    st.floats(0, 1),
    st.booleans(),
)
def test_the_cpu_kernel_equals_the_plain_update(
    shape, level, second_moment, residual_scale, moments_only
):
    level = level if len(shape) > 1 else 0
    plain, fused = tensors(shape, level), tensors(shape, level)
    for step in (1, 2):
        factors = factors_at(
            step, residual_scale=residual_scale, bias_correct_moments_only=moments_only
        )
        options = constants(level, second_moment)
        foam_step_(*plain, factors, **options)
        cpu_kernel.cpu_kernel_step_(*fused[:2], **fused[2], factors=factors, **options)
        assert_same(plain, fused)


def test_the_cpu_kernel_splits_large_matrices_between_threads():
    plain, fused = tensors((333, 1001), 3), tensors((333, 1001), 3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    foam_step_(*plain, factors_at(1), **constants(3))
    update_tensor_(*fused, factors_at(1), seed=None, fused=True, **constants(3))
    torch.set_num_threads(before)
    assert_same(plain, fused)


def test_the_cpu_kernel_supports_contiguous_float32_tensors_on_the_cpu():
    dense = torch.zeros(4, 6)
    assert cpu_kernel.is_supported(dense, dense)
    for other in (dense.bfloat16(), dense.t(), dense.to("meta"), dense.double()):
        assert not cpu_kernel.is_supported(dense, other)


def test_autograd_sees_that_the_cpu_kernel_changed_the_weights():
    param, grad, state = tensors((4, 8), 1)
    y = param @ torch.ones(8, requires_grad=True)
    update_tensor_(param, grad, state, factors_at(1), seed=None, fused=True, **constants(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fake_tensors_are_updated_without_temporaries():
    with FakeTensorMode(), StorageTracker() as tracker:
        fake = tensors((4, 8), 1)
        tracker.term = "workspace"
        update_tensor_(*fake, factors_at(1), seed=None, fused=True, **constants(1))
    assert tracker.peak().terms.get("workspace", 0) == 0


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_plain_update_runs_with_one_warning(
    compiler, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernel._load_kernel.cache_clear()
    plain, fused = tensors((4, 8), 1), tensors((4, 8), 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            update_tensor_(*fused, factors_at(1), seed=None, fused=True, **constants(1))
    cpu_kernel._load_kernel.cache_clear()
    for _ in range(2):
        foam_step_(*plain, factors_at(1), **constants(1))
    assert_same(plain, fused, rtol=0, atol=0)
    (record,) = caplog.records
    assert "C++ compiler" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not list(tmp_path.rglob("step-*"))


def test_the_cpu_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cpu_kernel._build_library()
    compiled_at = first.stat().st_mtime_ns
    assert cpu_kernel._build_library() == first
    assert first.stat().st_mtime_ns == compiled_at
    assert [path.name for path in first.parent.iterdir()] == [first.name]


# ---- in parts


@given(
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(0, 7),
    st.integers(1, 200),
    st.sampled_from([(F32, F32), (BF16, BF16), (BF16, INT8)]),
    st.sampled_from(["mean_square", "square_mean"]),
    st.sampled_from([None, 7]),
)
def test_a_matrix_in_parts_is_updated_like_a_whole_one(
    rows, columns, level, max_elements, dtypes, second_moment, seed
):
    whole, parts = (tensors((rows, columns), level, *dtypes) for _ in range(2))
    options = {"seed": seed, "fused": False, **constants(level, second_moment)}
    update_tensor_(*whole, factors_at(1), **options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "_PART_ELEMENTS", max_elements)
        update_tensor_(*parts, factors_at(1), **options)
    assert_same(whole, parts)


def peak_workspace(shape, level, dtypes, device="cpu"):
    """Measure the temporaries of an update of a matrix in bytes."""
    param, grad, state = tensors(shape, level, *dtypes)
    param, grad = param.to(device), grad.to(device)
    state = {key: tensor.to(device) for key, tensor in state.items()}
    tracker = StorageTracker()
    tracker.claim([param, grad, *state.values()], "weights")
    tracker.term = "workspace"
    with tracker:
        update_tensor_(param, grad, state, factors_at(1), seed=1, fused=False, **constants(level))
    return tracker.peak().terms["workspace"]


@pytest.mark.parametrize(
    ("level", "dtypes"),
    [(0, (BF16, BF16)), (1, (BF16, BF16)), (8, (BF16, F32)), (1, (BF16, INT8)), (1, (F32, F32))],
    ids=str,
)
def test_temporaries_are_at_most_64_mb(level, dtypes):
    with FakeTensorMode():
        assert 0 < peak_workspace((3000, 4096), level, dtypes) <= 64_000_000


@pytest.mark.parametrize("dtype", [BF16, F32, INT8], ids=str)
def test_without_data_the_first_part_has_the_peak_of_all(dtype):
    arguments = (2500, 1000), 2, (F32, dtype)  # parts: 1048, 1048, 404 rows
    measured = peak_workspace(*arguments)
    assert peak_workspace(*arguments, device="meta") == measured > 0
    with FakeTensorMode():
        assert peak_workspace(*arguments) == measured
