"""What torch's own tests ask of its optimizers, asked of FOAM; level 0 is compared with AdamW.

After test/test_optim.py of torch 2.13, which torch does not ship. It does ship the inputs.
"""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import AdamW, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

from foam_lightning import FOAM
from tests.support.training import (
    all_equal,
    assert_same,
    mesh_of_one_process,
    moments,
    parameters,
    through_a_file,
    train,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# In a process of its own, because importing torch's test utilities changes global flags. They need
# expecttest, which torch does not require, only as the base of a TestCase.
READ_INPUTS = """
import pickle, sys, types, unittest
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
import torch
from torch.testing._internal import common_optimizers as common
make = common.optim_inputs_func_adamw
inputs = [i for device in ("cpu", "cuda", "mps") for i in make(device, torch.float32)]
errors = common.optim_error_inputs_func_adamw("cpu", torch.float32)
errors = [(e.error_type, e.optimizer_error_input) for e in errors]
with open(sys.argv[1], "wb") as file:
    pickle.dump(
        (
            [i.kwargs for i in inputs],
            [(error, i.desc, i.params, i.kwargs) for error, i in errors],
        ),
        file,
    )
"""


@pytest.fixture(scope="module")
def torch_inputs(tmp_path_factory):
    """How torch's tests construct AdamW: the arguments that it takes, and those that it refuses."""
    path = tmp_path_factory.mktemp("inputs") / "inputs.pkl"
    subprocess.run([sys.executable, "-W", "ignore", "-c", READ_INPUTS, path], check=True)
    return pickle.loads(path.read_bytes())


def adamw(params, **options):
    return AdamW(params, **{"weight_decay": 0.0, "foreach": False, **options})


def foam(params, **options):
    return FOAM(params, **{"level": 0, "scale": 1, "fused": False, **options})


@pytest.mark.slow
def test_what_torch_gives_adamw_trains_alike_or_is_refused_by_name(torch_inputs):
    taken, _ = torch_inputs
    assert len(taken) > 10
    for kwargs in taken:
        refused = [name for name in ("amsgrad", "capturable") if kwargs.get(name)]
        if refused:
            with pytest.raises(ValueError, match="|".join(f"{name}=True" for name in refused)):
                foam(parameters(), **kwargs)
        options = {key: value for key, value in kwargs.items() if key not in refused}
        ours, theirs = parameters(), parameters()
        train(foam(ours, **options), range(4))
        numbers = {key: float(v) for key, v in options.items() if isinstance(v, torch.Tensor)}
        if "betas" in options:
            numbers["betas"] = tuple(map(float, options["betas"]))
        train(adamw(theirs, **{**options, **numbers}), range(4))
        for a, b in zip(ours, theirs, strict=True):  # tensors have float32 values, not float64
            torch.testing.assert_close(a, b, rtol=0 if not numbers else 1e-6, atol=0)


@pytest.mark.slow
def test_what_torch_refuses_for_adamw_is_refused(torch_inputs):
    _, errors = torch_inputs
    assert len(errors) > 8
    for error, description, params, kwargs in errors:
        if "either both floats" in description:
            continue  # a limit of torch's kernels; FOAM reads each by itself
        params = parameters() if params is None else params
        if "a param group cannot have duplicate" in description:
            with pytest.warns(UserWarning, match="duplicate"):  # torch only warns
                FOAM(params, **kwargs)
            continue
        with pytest.raises(error):
            FOAM(params, **kwargs)


@pytest.mark.parametrize("name", ["foreach", "amsgrad", "capturable", "differentiable"])
def test_an_option_of_adamw_is_accepted_unless_it_is_set(name):
    FOAM(parameters(), **{name: False})
    FOAM([{"params": parameters(), name: None if name == "foreach" else False}])
    with pytest.raises(ValueError, match=f"{name}=True"):
        FOAM(parameters(), **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True"):
        FOAM([{"params": parameters(), name: True}])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "broadcast"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("level", [0, 1, 5])
def test_a_step_goes_in_the_right_direction(level, maximize, dtype, layout):
    value = torch.linspace(-1, 1, 4 * 3 * 5 * 6, dtype=dtype).view(4, 3, 5, 6)
    if layout == "channels_last":
        value = value.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        value = value.transpose(1, 3)
    param = nn.Parameter(value)
    strides = param.stride()
    optimizer = FOAM([param], lr=1e-2, level=level, maximize=maximize)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = param.sum() if layout == "broadcast" else param.square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=not maximize)
    assert losses[0] != losses[-1]
    assert param.stride() == strides


def test_gradients_may_be_more_precise_than_the_weights():
    params, expected = parameters(dtype=BF16), parameters(dtype=BF16)
    for dtype, found in ((F32, params), (BF16, expected)):
        for param in found:
            param.grad_dtype = dtype
            param.grad = torch.ones_like(param, dtype=dtype)
        FOAM(found, level=1).step()
    assert all_equal(params, expected)


def test_weights_may_change_their_dtype_between_steps():
    changing, double = parameters(dtype=F64), parameters(dtype=F64)
    optimizer, other = FOAM(changing, lr=1e-2), FOAM(double, lr=1e-2)
    for step, dtype in enumerate((F32, BF16, F32, F64)):
        for param in changing:
            param.data = param.data.to(dtype)
        train(optimizer, [step])
        train(other, [step])
    for a, b in zip(changing, double, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, 2, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "swa": lambda o: swa_utils.SWALR(o, 0.5, anneal_epochs=3),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_act_as_on_adamw(name, tensor_lr):
    found = []
    for make in (foam, adamw):
        params = parameters()
        groups = [{"params": params[:2], "lr": 0.05}, {"params": params[2:]}]
        if tensor_lr:
            groups[0]["lr"] = torch.tensor(0.05, dtype=F64)
        optimizer = make(groups, lr=torch.tensor(0.01, dtype=F64) if tensor_lr else 0.01)
        schedule = SCHEDULES[name](optimizer)
        for step in range(6):
            train(optimizer, [step])
            schedule.step(*([1.0] if name == "plateau" else []))
        found.append((params, [float(group["lr"]) for group in optimizer.param_groups]))
    (ours, our_rates), (theirs, their_rates) = found
    assert our_rates == their_rates != [0.05, 0.01]
    assert all_equal(ours, theirs)


def test_hooks_run_around_a_step():
    calls = []
    (param,) = parameters([(3, 8)])
    before = param.detach().clone()
    optimizer = FOAM([param])

    def note(name):
        return lambda *_: calls.append((name, torch.equal(param, before)))

    with (
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global")),
    ):
        train(optimizer, [0])
    train(optimizer, [1])
    assert calls == [("pre", True), ("post", False), ("global", False)]


def test_hooks_on_saving_see_and_change_the_state():
    optimizer = FOAM(parameters())
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "kept"})
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    run = FOAM(parameters())
    run.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    assert all_equal(moments(run), moments(optimizer))


def test_a_gradient_scaler_skips_what_overflows():
    scaled, plain = parameters(), parameters()
    optimizer, other = FOAM(scaled), FOAM(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        random = torch.Generator().manual_seed(step)
        factors = [torch.randn(p.shape, generator=random) for p in scaled]
        if overflows := step == 2:
            factors[0].fill_(torch.inf)
        for params in (scaled, plain):
            for param in params:
                param.grad = None
        loss = sum((p * f).sum() for p, f in zip(scaled, factors, strict=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            for param, factor in zip(plain, factors, strict=True):
                param.grad = factor.clone()
            other.step()
    assert {state["step"] for state in optimizer.state.values()} == {3}
    assert all_equal(scaled, plain)


@pytest.mark.parametrize(
    "options", [{}, {"lr": torch.tensor(0.01)}, {"state_offload": True}], ids=str
)
def test_a_pickled_optimizer_goes_on(options):
    params = parameters()
    original = FOAM(params, **options)
    train(original, range(2))
    restored = pickle.loads(pickle.dumps(original))
    train(original, [2])
    train(restored, [2])
    assert all_equal(params, restored.param_groups[0]["params"])


def test_a_pickle_and_a_state_of_before_an_option_was_added_go_on():
    params, other = parameters(), parameters()
    original, run = FOAM(params), FOAM(other)
    train(original, range(2))
    train(run, range(2))
    state, older = original.__getstate__(), original.state_dict()
    for group in (*state["param_groups"], *older["param_groups"]):
        del group["maximize"]
    restored = FOAM.__new__(FOAM)
    restored.__setstate__(state)
    run.load_state_dict(older)
    for optimizer in (restored, run):
        train(optimizer, [2])
    assert all_equal(params, other)


def test_a_group_may_join_after_steps():
    params = parameters()
    optimizer = FOAM(params[:2], lr=1e-2)
    train(optimizer, range(2))
    optimizer.add_param_group({"params": params[2:], "level": 1, "maximize": True})
    train(optimizer, range(2, 4))
    assert [state["step"] for state in optimizer.state.values()] == [4, 4, 2, 2, 2]
    run = FOAM([{"params": params[:2]}, {"params": params[2:], "level": 1}])
    run.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same(run.state_dict(), optimizer.state_dict())


def test_a_parameter_that_is_frozen_midway_stays():
    frozen, free = parameters([(3, 8), (3, 8)])
    optimizer = FOAM([frozen, free], weight_decay=0.1)

    def step():
        optimizer.zero_grad()
        (frozen.square().sum() + free.square().sum()).backward()
        optimizer.step()

    step()
    frozen.requires_grad_(False)
    before = frozen.detach().clone(), copy.deepcopy(optimizer.state[frozen])
    step()
    assert torch.equal(frozen, before[0])
    assert_same(optimizer.state[frozen], before[1])
    assert optimizer.state[free]["step"] == 2
    frozen.requires_grad_(True)
    step()
    assert optimizer.state[frozen]["step"] == 2


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_are_set_to_zero_or_none(set_to_none):
    params = parameters()
    optimizer = FOAM(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in params)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", ["level", "shape"])
def test_a_level_or_shape_that_changes_after_a_step_is_refused(change, fused):
    (param,) = parameters([(4, 16)])
    optimizer = FOAM([param], level=2, fused=fused)
    train(optimizer, [0])
    if change == "level":
        optimizer.param_groups[0]["level"] = 0
    else:
        param.data = torch.zeros(4, 32)
        param.grad = None
    with pytest.raises(RuntimeError, match=r"moments of shape \(4, 4\).* after a step"):
        train(optimizer, [1])
    assert optimizer.state[param]["step"] == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_it_works_inside_the_sharded_optimizer_of_torch():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params, other = parameters(), parameters()
    plain = FOAM(other, level=1)
    with mesh_of_one_process():
        sharded = ZeroRedundancyOptimizer(params, optimizer_class=FOAM, level=1)
        train(sharded, range(2))
        sharded.consolidate_state_dict()
        sharded.load_state_dict(through_a_file(sharded.state_dict()))
        train(sharded, [2])
    train(plain, range(3))
    assert all_equal(params, other)


def test_it_can_be_printed():
    text = repr(FOAM(parameters(), level=3))
    assert "FOAM" in text
    assert "level: 3" in text
