import logging
import subprocess

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from foam_lightning.optim import cpu_kernel as native
from foam_lightning.optim import dispatch as update
from foam_lightning.optim import gpu_kernel as compiled
from foam_lightning.optim.dispatch import update_
from foam_lightning.optim.functional import StepFactors, foam_step_
from foam_lightning.optim.state import layouts

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8


def tensors(shape, level, dtype=F32, state_dtype=F32, second_moment="mean_square", seed=0):
    """Weights, gradient and moments that are the same for the same arguments."""
    random = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    state = {}
    for key, layout in layouts(shape, level, state_dtype, second_moment).items():
        values = torch.rand(layout.shape, generator=random)
        state[key] = (values * 100 if not layout.dtype.is_floating_point else values).to(
            layout.dtype
        )
    return param, grad, state


def factors_at(step, **changed):
    options = {"lr": 0.01 * step, "weight_decay": 0.1, "scale": 0.25, **changed}
    return StepFactors.at(step, beta1=0.9, beta2=0.999, **options)


def constants(level, second_moment="mean_square"):
    return {
        **{"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
        **{"level": level, "second_moment": second_moment},
    }


def assert_same(left, right, **tolerance):
    for a, b in zip((left[0], *left[2].values()), (right[0], *right[2].values()), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


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
def test_the_native_kernel_is_the_plain_update(
    shape, level, second_moment, residual_scale, moments_only
):
    level = level if len(shape) > 1 else 0
    plain, fused = tensors(shape, level), tensors(shape, level)
    for step in (1, 2):
        factors = factors_at(
            step, residual_scale=residual_scale, bias_correct_moments_only=moments_only
        )
        foam_step_(*plain, factors, seed=None, **constants(level, second_moment))
        native.cpu_kernel_step_(
            fused[0], fused[1], **fused[2], factors=factors, **constants(level, second_moment)
        )
        assert_same(plain, fused)


@given(
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(0, 7),
    st.integers(1, 200),
    st.sampled_from([(F32, F32), (BF16, BF16), (BF16, INT8)]),
    st.sampled_from(["mean_square", "square_mean", "row", "none"]),
)
def test_a_matrix_in_parts_is_updated_as_a_whole(
    rows, columns, level, limit, dtypes, second_moment
):
    whole, parts = (tensors((rows, columns), level, *dtypes, second_moment) for _ in range(2))
    options = {"seed": None, "fused": False, **constants(level, second_moment)}
    update_(*whole, factors_at(1), **options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(update, "_PART_ELEMENTS", limit)
        update_(*parts, factors_at(1), **options)
    assert_same(whole, parts)


def test_large_matrices_are_split_between_threads():
    plain, fused = tensors((333, 1001), 3), tensors((333, 1001), 3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    foam_step_(*plain, factors_at(1), **constants(3))
    native.cpu_kernel_step_(fused[0], fused[1], **fused[2], factors=factors_at(1), **constants(3))
    torch.set_num_threads(before)
    assert_same(plain, fused)


def test_the_kernel_takes_float32_that_is_dense_on_the_cpu():
    dense = torch.zeros(4, 6)
    assert native.takes("mean_square", dense, dense)
    for other in (dense.bfloat16(), dense.t(), dense.to("meta"), dense.double()):
        assert not native.takes("mean_square", dense, other)
    assert not native.takes("row", dense, dense)


def test_autograd_sees_that_the_kernel_changed_the_weights():
    param, grad, state = tensors((4, 8), 1)
    x = torch.ones(8, requires_grad=True)
    y = param @ x
    update_(param, grad, state, factors_at(1), seed=None, fused=True, **constants(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fake_tensors_pass_the_kernel_without_a_temporary():
    with FakeTensorMode():
        param, grad, state = tensors((4, 8), 1)
        update_(param, grad, state, factors_at(1), seed=None, fused=True, **constants(1))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_plain_update_runs_and_one_line_says_so(
    compiler, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._kernel.cache_clear()
    plain, fused = tensors((4, 8), 1), tensors((4, 8), 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            update_(*fused, factors_at(1), seed=None, fused=True, **constants(1))
    native._kernel.cache_clear()
    for _ in range(2):
        foam_step_(*plain, factors_at(1), **constants(1))
    assert_same(plain, fused, rtol=0, atol=0)
    (record,) = caplog.records
    assert "a C++ compiler" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not list(tmp_path.rglob("step-*"))


def test_the_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = native._compiled()
    monkeypatch.setattr(subprocess, "run", None)
    assert native._compiled() == first
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.parametrize(
    ("level", "dtypes", "second_moment"),
    [
        (0, (F32, F32), "mean_square"),
        (1, (BF16, BF16), "mean_square"),
        (3, (BF16, INT8), "mean_square"),
        (1, (F32, F32), "square_mean"),
        (1, (F32, F32), "row"),
        (1, (F32, F32), "none"),
    ],
    ids=str,
)
def test_the_traced_update_is_the_plain_one(level, dtypes, second_moment, monkeypatch):
    # Traced, made functional and taken apart as for a GPU, but run by torch's own operators: the
    # code generator's own rounding is the next test's.
    def traced(function, **options):
        return torch.compile(function, backend="aot_eager", **options)

    monkeypatch.setattr(compiled, "_compile", traced)
    compiled._program.cache_clear()
    seed = None if dtypes[0] == F32 else 12345
    for shape in ((6, 22), (9, 22)):
        plain, other = (tensors(shape, level, *dtypes, second_moment) for _ in range(2))
        for step in (1, 2):
            options = {"seed": seed, **constants(level, second_moment)}
            foam_step_(*plain, factors_at(step), **options)
            compiled.gpu_kernel_step_(*other, factors_at(step), **options)
        assert_same(plain, other)
    compiled._program.cache_clear()


def test_where_compiling_fails_the_plain_update_runs_and_one_line_says_so(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    def fails(function, **options):
        return torch.compile(function, backend=broken, **options)

    monkeypatch.setattr(compiled, "_compile", fails)
    monkeypatch.setattr(compiled, "_failures", [])
    monkeypatch.setattr(compiled, "_has_triton", lambda: True)
    compiled._program.cache_clear()
    assert compiled.available()
    plain, other = tensors((6, 22), 1), tensors((6, 22), 1)
    foam_step_(*plain, factors_at(1), seed=None, **constants(1))
    with caplog.at_level(logging.WARNING, logger=compiled.__name__):
        compiled.gpu_kernel_step_(*other, factors_at(1), seed=None, **constants(1))
    assert_same(plain, other, rtol=0, atol=0)
    (record,) = [record for record in caplog.records if record.name == compiled.__name__]
    assert "Failed to find C compiler. Set CC." in record.getMessage()
    assert not compiled.available()
    compiled._program.cache_clear()


@pytest.mark.slow
def test_one_compiled_program_serves_a_schedule_and_every_number_of_rows():
    torch._dynamo.reset()
    compiled._program.cache_clear()
    plain, fused = tensors((6, 20), 2), tensors((6, 20), 2)
    more_rows = tensors((11, 20), 2)

    def programs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    for step in range(1, 101):
        foam_step_(*plain, factors_at(step, lr=0.01 / step), seed=None, **constants(2))
        compiled.gpu_kernel_step_(
            *fused, factors_at(step, lr=0.01 / step), seed=None, **constants(2)
        )
        compiled.gpu_kernel_step_(*more_rows, factors_at(step), seed=None, **constants(2))
        if step == 1:
            after_the_first = programs()
    assert programs() == after_the_first
    assert_same(plain, fused)


@pytest.mark.parametrize(
    ("level", "dtypes"),
    [(0, (BF16, BF16)), (1, (BF16, BF16)), (8, (BF16, F32)), (1, (BF16, INT8)), (1, (F32, F32))],
    ids=str,
)
def test_temporaries_are_at_most_64_mb(level, dtypes):
    from foam_lightning.memory.tracker import StorageTracker

    with FakeTensorMode(), StorageTracker() as tracker:
        tracker.term = "weights"
        param, grad, state = (
            torch.empty(3000, 4096, dtype=dtypes[0]),
            torch.empty(3000, 4096, dtype=dtypes[0]),
            {
                key: torch.empty(shape, dtype=dtype)
                for key, (shape, dtype) in layouts((3000, 4096), level, dtypes[1]).items()
            },
        )
        tracker.term = "workspace"
        update_(param, grad, state, factors_at(1), seed=1, fused=False, **constants(level))
    assert 0 < tracker.peak().terms["workspace"] <= 64_000_000


@pytest.mark.parametrize("dtype", [BF16, F32, INT8], ids=str)
def test_without_values_the_first_part_has_the_temporaries_of_all(dtype):
    from foam_lightning.memory.tracker import StorageTracker

    def workspace(device="cpu"):
        param, grad, state = tensors((2500, 1000), 2, state_dtype=dtype)  # parts: 1048, 1048, 404
        param, grad = param.to(device), grad.to(device)
        state = {key: tensor.to(device) for key, tensor in state.items()}
        tracker = StorageTracker()
        tracker.claim([param, grad, *state.values()], "weights")
        tracker.term = "workspace"
        with tracker:
            update_(param, grad, state, factors_at(1), seed=1, fused=False, **constants(2))
        return tracker.peak().terms["workspace"]

    measured = workspace()
    assert workspace("meta") == measured > 0
    with FakeTensorMode():
        assert workspace() == measured
