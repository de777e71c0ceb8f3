import copy
import io

import pytest
import torch

from foam_lightning import FOAM
from foam_lightning.errors import CheckpointError
from foam_lightning.optim.groups import param_groups
from tests.training import all_equal, parameters, train

BF16, F32 = torch.bfloat16, torch.float32


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def named(level, *, q_level=None, **options):
    """FOAM over two named matrices, a norm and a head."""
    shapes = {"q.weight": (4, 12), "k.weight": (4, 12), "norm.weight": (4,), "lm_head": (5, 4)}
    pairs = list(zip(shapes, parameters(shapes.values()), strict=True))
    levels = {"q.weight": level if q_level is None else q_level, "k.weight": level}
    return FOAM(param_groups(pairs, levels, dict.fromkeys(levels, 0.25), 0.1), **options)


@pytest.mark.parametrize("state_dtype", [F32, BF16], ids=["state-f32", "state-bf16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_state_dtype_is_what_was_asked_also_after_loading(dtype, state_dtype):
    optimizer = FOAM(parameters(dtype=dtype), state_dtype=state_dtype)
    train(optimizer, range(2))
    loaded = FOAM(parameters(dtype=dtype), state_dtype=state_dtype)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for before, after in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert type(after["step"]) is int
        for key in ("exp_avg", "exp_avg_sq"):
            assert after[key].dtype == state_dtype
            assert torch.equal(before[key], after[key])


def test_the_run_decides_the_state_dtype():
    saved = FOAM(parameters(), state_dtype=F32)
    train(saved, range(2))
    run = FOAM(parameters(), state_dtype=BF16)
    run.load_state_dict(saved.state_dict())
    assert run.param_groups[0]["state_dtype"] == BF16
    assert {state["exp_avg"].dtype for state in run.state.values()} == {BF16}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("level", [0, 1, 2, 5])
def test_save_and_load_continues_as_if_uninterrupted(level, dtype):
    straight, stopped = parameters(dtype=dtype), parameters(dtype=dtype)
    train(FOAM(straight, level=level, weight_decay=0.1), range(6))
    first = FOAM(stopped, level=level, weight_decay=0.1)
    train(first, range(3))
    second = FOAM(stopped, level=level)
    second.load_state_dict(through_a_file(first.state_dict()))
    train(second, range(3, 6))
    assert all_equal(straight, stopped)


def test_loaded_state_is_a_copy():
    saved, run = FOAM(parameters()), FOAM(parameters())
    train(saved, range(2))
    kept = copy.deepcopy(saved.state_dict())
    run.load_state_dict(saved.state_dict())
    train(run, range(3))
    assert all_equal(
        [state["exp_avg"] for state in kept["state"].values()],
        [state["exp_avg"] for state in saved.state.values()],
    )


def test_a_step_saved_as_a_tensor_becomes_an_int():
    saved, run = FOAM(parameters()), FOAM(parameters())
    train(saved, range(2))
    state_dict = saved.state_dict()
    for state in state_dict["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    run.load_state_dict(state_dict)
    assert [(state["step"], type(state["step"])) for state in run.state.values()] == [(2, int)] * 5


def test_a_fresh_checkpoint_loads():
    run = FOAM(parameters())
    run.load_state_dict(FOAM(parameters(), lr=0.5).state_dict())
    assert run.param_groups[0]["lr"] == 0.5
    assert not run.state


@pytest.mark.parametrize("num_steps", [0, 2], ids=["fresh", "trained"])
def test_another_level_is_refused_by_name_whatever_the_groups(num_steps):
    saved = named(1)
    train(saved, range(num_steps))
    message = (
        "the checkpoint has fold level 1 for {}, this run asks for {}; "
        "pass the checkpoint's fold plan or start a new run"
    )
    # The same groups, and one group more.
    for run, name, level in (
        (named(2), "q.weight", 2),
        (named(1, q_level=3), "q.weight", 3),
        (named(4, q_level=1), "k.weight", 4),
    ):
        with pytest.raises(CheckpointError) as caught:
            run.load_state_dict(saved.state_dict())
        assert str(caught.value) == message.format(name, level)
        assert not run.state


def test_another_level_is_refused_by_number_without_names():
    run = FOAM(parameters([(7,), (3, 8)]), level=2)
    with pytest.raises(CheckpointError, match="fold level 1 for parameter 1, this run asks for 2"):
        run.load_state_dict(FOAM(parameters([(7,), (3, 8)]), level=1).state_dict())


def test_the_level_of_what_never_folds_does_not_matter():
    run = FOAM(parameters([(7,)]), level=2)
    run.load_state_dict(FOAM(parameters([(7,)]), level=1).state_dict())


def test_another_second_moment_is_refused():
    saved = named(1, second_moment="square_mean").state_dict()
    with pytest.raises(CheckpointError, match=r"second moment square_mean for q\.weight, this run"):
        named(1).load_state_dict(saved)


def test_a_checkpoint_of_another_model_is_refused():
    saved = FOAM(parameters([(3, 8)]))
    train(saved, [0])
    with pytest.raises(CheckpointError, match=r"exp_avg of shape \(3, 2\) for parameter 0, this"):
        FOAM(parameters([(3, 12)])).load_state_dict(saved.state_dict())
    with pytest.raises(CheckpointError, match="no optimizer state for parameter 1"):
        FOAM(parameters([(3, 8), (3, 8)])).load_state_dict(saved.state_dict())
    with pytest.raises(CheckpointError, match="has parameter 1, which this run does not train"):
        FOAM(parameters([(3, 8)])).load_state_dict(FOAM(parameters([(3, 8)] * 2)).state_dict())


def test_another_grouping_is_refused():
    pairs = list(zip("ab", parameters([(3, 8), (3, 8)]), strict=True))
    saved = FOAM([{"params": pairs[:1]}, {"params": pairs[1:]}]).state_dict()
    with pytest.raises(CheckpointError, match="groups the parameters differently, first b"):
        FOAM([{"params": pairs}]).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="groups the parameters differently, first b"):
        FOAM([{"params": pairs[::-1]}]).load_state_dict(FOAM([{"params": pairs}]).state_dict())


def test_a_checkpoint_of_adamw_is_refused():
    with pytest.raises(CheckpointError, match="another optimizer than FOAM"):
        FOAM(parameters()).load_state_dict(torch.optim.AdamW(parameters()).state_dict())
