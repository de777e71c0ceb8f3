"""State in host memory, on a second device that tests/support/second_device.py simulates."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from foam_lightning import FOAM
from foam_lightning.optim.gradient_release import release_gradients
from foam_lightning.optim.offload import HostState, host_memory_options, state_on_device
from tests.support.runs import StopError
from tests.support.second_device import AWAY, AwayTensor, SecondDevice, here
from tests.support.training import (
    all_equal,
    mesh_of_one_process,
    moments,
    parameters,
    through_a_file,
    train,
)

BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8
CPU = torch.device("cpu")


def sent(params):
    return [nn.Parameter(p.detach().to(AWAY)) for p in params]


def state_bytes(optimizer):
    return sum(value.nbytes for value in moments(optimizer))


# ---- results and copies


@settings(max_examples=15)
@given(
    level=st.integers(0, 3),
    dtype=st.sampled_from([F32, BF16]),
    state_dtype=st.sampled_from([F32, BF16, INT8]),
    second_moment=st.sampled_from(["mean_square", "square_mean"]),
    clip_norm=st.sampled_from([None, 0.5]),
)
def test_offload_changes_no_bit(level, dtype, state_dtype, second_moment, clip_norm):
    options = {"level": level, "state_dtype": state_dtype, "second_moment": second_moment}
    options |= {"clip_norm": clip_norm, "weight_decay": 0.1, "fused": False}
    plain = parameters(dtype=dtype)
    expected = FOAM(plain, **options)
    train(expected, range(3))
    with SecondDevice():
        params = sent(parameters(dtype=dtype))
        found = FOAM(params, **options, state_offload=True)
        train(found, [0])
        before = [value.data_ptr() for value in moments(found)]
        train(found, [1, 2])
    assert all_equal(here(params), plain)
    assert all_equal(moments(found), moments(expected))
    assert [value.data_ptr() for value in moments(found)] == before
    assert not any(isinstance(value, AwayTensor) for value in moments(found))


@pytest.mark.parametrize("state_dtype", [F32, BF16, INT8], ids=["f32", "bf16", "int8"])
def test_a_step_copies_the_state_once_each_way(state_dtype):
    gradients = sum(p.nbytes for p in parameters())
    with SecondDevice() as device:
        optimizer = FOAM(sent(parameters()), level=1, state_dtype=state_dtype, state_offload=True)
        for step in range(3):
            device.sent_bytes = device.returned_bytes = 0
            train(optimizer, [step])
            assert device.sent_bytes - gradients == device.returned_bytes == state_bytes(optimizer)


def test_the_device_holds_one_state_at_a_time_and_none_after_the_step():
    shapes = [(64, 64)] * 6
    peaks = {}
    for state_offload in (False, True):
        with SecondDevice() as device:
            params = sent(parameters(shapes))
            optimizer = FOAM(params, level=0, state_offload=state_offload)
            train(optimizer, [0])
            weights = sum(p.nbytes for p in params)
            kept = 0 if state_offload else state_bytes(optimizer)
            assert device.alive_bytes() == weights + kept
            device.peak_bytes = 0
            train(optimizer, [1])
            peaks[state_offload] = device.peak_bytes
    (one,) = {2 * p.nbytes for p in params}
    assert peaks[False] - peaks[True] == (len(shapes) - 1) * one


def test_groups_choose_offload_separately():
    with SecondDevice():
        first, second = sent(parameters([(4, 8), (4, 8)]))
        optimizer = FOAM([{"params": [first], "state_offload": True}, {"params": [second]}])
        train(optimizer, [0])
        assert optimizer.state[first]["exp_avg"].device == CPU
        assert optimizer.state[second]["exp_avg"].device == AWAY


def test_on_the_cpu_nothing_is_copied():
    params, expected = parameters(), parameters()
    optimizer = FOAM(params, state_offload=True)
    train(optimizer, range(3))
    train(FOAM(expected), range(3))
    assert all_equal(params, expected)
    on_host = {"exp_avg": torch.ones(3)}
    with state_on_device(on_host, CPU) as copies:
        assert copies["exp_avg"] is on_host["exp_avg"]


def test_an_error_copies_nothing_back():
    on_host = {"exp_avg": torch.ones(3)}

    def fail():
        with state_on_device(on_host, AWAY) as copies:
            copies["exp_avg"].zero_()
            raise StopError

    with SecondDevice(), pytest.raises(StopError):
        fail()
    assert torch.equal(on_host["exp_avg"], torch.ones(3))


@pytest.mark.parametrize("is_cuda", [True, False])
def test_memory_is_pinned_only_for_cuda(is_cuda):
    param = SimpleNamespace(is_cuda=is_cuda)
    assert host_memory_options(param) == {"device": CPU, "pin_memory": is_cuda}


def test_sharded_state_is_offloaded_shard_by_shard():
    from torch.distributed.tensor import DTensor, Shard

    weight, grads = torch.randn(4, 8), torch.randn(3, 4, 8)
    options = {"level": 1, "fused": False, "clip_norm": 0.5}
    whole = nn.Parameter(weight.clone())
    expected = FOAM([whole], **options)
    for whole.grad in grads:
        expected.step()
    with mesh_of_one_process() as mesh, SecondDevice() as device:
        param, loaded = (
            nn.Parameter(DTensor.from_local(weight.to(AWAY), mesh, [Shard(0)])) for _ in range(2)
        )
        optimizer = FOAM([param], **options, state_offload=True)
        for grad in grads:
            param.grad = DTensor.from_local(grad.to(AWAY), mesh, [Shard(0)])
            optimizer.step()
        assert device.returned_bytes == len(grads) * state_bytes(optimizer)
        second = FOAM([loaded], **options, state_offload=True)
        second.load_state_dict(optimizer.state_dict())
        _optimizer_to_device(second, AWAY)
        for moment, value in zip(moments(second), moments(expected), strict=True):
            assert moment.placements == (Shard(0),)
            assert moment.device == CPU
            assert torch.equal(moment.to_local(), value)
        assert all_equal(here([param.to_local()]), [whole])


# ---- inside backward


@pytest.mark.parametrize("state_offload", [False, True], ids=["kept", "offloaded"])
def test_offload_works_inside_backward(state_offload):
    def run(optimizer, x):
        first, second = optimizer.param_groups[0]["params"]
        for _ in range(3):
            (x @ first @ second).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    shapes = [(6, 12), (12, 4)]
    x = torch.randn(5, 6)
    plain = parameters(shapes)
    run(FOAM(plain, lr=0.1, fused=False), x)
    with SecondDevice() as device:
        params = sent(parameters(shapes))
        optimizer = FOAM(params, lr=0.1, fused=False, state_offload=state_offload)
        away = x.to(AWAY)
        with release_gradients(optimizer):
            run(optimizer, away)
        sizes = sorted(tensor.nbytes for tensor in device.alive())
    assert all_equal(here(params), plain)
    kept = [*params, away, *([] if state_offload else moments(optimizer))]
    assert sizes == sorted(tensor.nbytes for tensor in kept)


# ---- checkpoints


@pytest.mark.parametrize("state_dtype", [F32, INT8], ids=["f32", "int8"])
@pytest.mark.parametrize("saves", [False, True], ids=["from-device", "from-host"])
@pytest.mark.parametrize("loads", [False, True], ids=["to-device", "to-host"])
def test_a_checkpoint_loads_with_and_without_offload(loads, saves, state_dtype):
    straight = parameters()
    options = {"fused": False, "state_dtype": state_dtype}
    train(FOAM(straight, **options), range(4))
    with SecondDevice():
        params = sent(parameters())
        first = FOAM(params, **options, state_offload=saves)
        train(first, range(2))
        saved = first.state_dict()
        assert {type(state) for state in saved["state"].values()} == {dict}
        # A file has the values, wherever they were.
        for state in saved["state"].values():
            state |= {key: here([v])[0] for key, v in state.items() if key != "step"}
        second = FOAM(params, **options, state_offload=loads)
        second.load_state_dict(through_a_file(saved))
        assert second.param_groups[0]["state_offload"] == loads
        assert {v.device for v in moments(second)} == {CPU if loads else AWAY}
        assert all_equal(here(moments(second)), here(moments(first)))
        train(second, range(2, 4))
    assert all_equal(here(params), straight)


@pytest.mark.parametrize("state_offload", [False, True], ids=["kept", "offloaded"])
def test_lightning_moves_a_loaded_state_to_the_device_unless_it_is_offloaded(state_offload):
    saving = FOAM(parameters())
    train(saving, range(2))
    checkpoint = {"optimizer_states": [through_a_file(saving.state_dict())]}
    with SecondDevice() as device:
        params = sent(parameters())
        optimizer = FOAM(params, state_offload=state_offload)
        strategy = SingleDeviceStrategy(device=AWAY)
        strategy._optimizers = [optimizer]
        device.peak_bytes = device.sent_bytes = 0
        strategy.load_optimizer_state_dict(checkpoint)
        assert device.sent_bytes >= state_bytes(saving)  # it tries in any case
        assert {v.device for v in moments(optimizer)} == {CPU if state_offload else AWAY}
        weights, largest = sum(p.nbytes for p in params), max(v.nbytes for v in moments(optimizer))
        assert device.alive_bytes() == weights + (0 if state_offload else state_bytes(optimizer))
        if state_offload:
            assert device.peak_bytes == weights + largest
    assert all_equal(here(moments(optimizer)), moments(saving))
    assert {state["step"] for state in optimizer.state.values()} == {2}


def test_assigning_to_a_host_state_copies_into_the_existing_tensor():
    state = HostState(exp_avg=torch.zeros(3), step=0)
    existing = state["exp_avg"]
    state["exp_avg"] = torch.arange(3.0)
    state["exp_avg"] = existing
    state["step"] += 1
    assert state["exp_avg"] is existing
    assert torch.equal(existing, torch.arange(3.0))
    assert state["step"] == 1
