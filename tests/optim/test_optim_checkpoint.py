import copy

import pytest
import torch

from foam_lightning import FOAM
from foam_lightning.errors import CheckpointError
from foam_lightning.optim.groups import param_groups
from tests.support.training import (
    all_equal,
    assert_same,
    moments,
    parameters,
    through_a_file,
    train,
)

BF16, F32 = torch.bfloat16, torch.float32
A, B = [(3, 8)], [(3, 8), (3, 8)]


def named(level, *, q_level=None, **options):
    """FOAM over two named matrices, a norm and a head."""
    shapes = {"q.weight": (4, 12), "k.weight": (4, 12), "norm.weight": (4,), "lm_head": (5, 4)}
    pairs = list(zip(shapes, parameters(shapes.values()), strict=True))
    levels = {"q.weight": level if q_level is None else q_level, "k.weight": level}
    return FOAM(param_groups(pairs, levels, dict.fromkeys(levels, 0.25), 0.1), **options)


def test_the_run_decides_how_the_state_is_stored():
    saved = FOAM(parameters(), state_dtype=F32)
    train(saved, range(2))
    state_dict = saved.state_dict()
    state_dict["param_groups"][0] |= {"state_offload": False, "state_dtype": F32}
    run = FOAM(parameters(), state_dtype=BF16, state_offload=True)
    run.load_state_dict(state_dict)
    assert run.param_groups[0]["state_dtype"] == BF16
    assert run.param_groups[0]["state_offload"] is True
    assert {moment.dtype for moment in moments(run)} == {BF16}


@pytest.mark.parametrize("state_dtype", [F32, BF16, torch.int8], ids=["f32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["weights-f32", "weights-bf16"])
@pytest.mark.parametrize("level", [0, 1, 5])
def test_save_and_load_continues_as_if_uninterrupted(level, dtype, state_dtype):
    straight, stopped = parameters(dtype=dtype), parameters(dtype=dtype)
    options = {"level": level, "state_dtype": state_dtype}
    train(FOAM(straight, weight_decay=0.1, **options), range(6))
    first = FOAM(stopped, weight_decay=0.1, **options)
    train(first, range(3))
    second = FOAM(stopped, **options)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert all_equal(moments(first), moments(second))
    train(second, range(3, 6))
    assert all_equal(straight, stopped)


def test_loaded_state_is_a_copy():
    saved, run = FOAM(parameters()), FOAM(parameters())
    train(saved, range(2))
    before = copy.deepcopy(moments(saved))
    run.load_state_dict(saved.state_dict())
    train(run, range(3))
    assert all_equal(before, moments(saved))


def test_a_step_saved_as_a_tensor_becomes_an_int():
    saved, run = FOAM(parameters()), FOAM(parameters())
    train(saved, range(2))
    state_dict = saved.state_dict()
    for state in state_dict["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    run.load_state_dict(state_dict)
    assert [(state["step"], type(state["step"])) for state in run.state.values()] == [(2, int)] * 5


def test_a_checkpoint_from_before_the_first_step_loads():
    run = FOAM(parameters())
    run.load_state_dict(FOAM(parameters(), lr=0.5).state_dict())
    assert run.param_groups[0]["lr"] == 0.5
    assert not run.state


@pytest.mark.parametrize("num_steps", [0, 2], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    ("levels", "name", "level"),
    [
        ({"level": 2}, "q.weight", 2),
        ({"level": 1, "q_level": 3}, "q.weight", 3),
        ({"level": 4, "q_level": 1}, "k.weight", 4),
    ],
    ids=["same groups", "a group more", "another group"],
)
def test_another_level_is_refused_by_name(num_steps, levels, name, level):
    saved, run = named(1), named(**levels)
    train(saved, range(num_steps))
    with pytest.raises(CheckpointError, match=rf"fold level 1 for {name}.* level {level}; .*plan"):
        run.load_state_dict(saved.state_dict())
    assert not run.state


@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg_sq", "exp_avg_sq_scale"])
def test_a_state_with_a_part_missing_is_refused_by_name(missing):
    saved, run = (named(1, state_dtype=torch.int8) for _ in range(2))
    train(saved, range(2))
    state_dict = saved.state_dict()
    del state_dict["state"][1][missing]
    with pytest.raises(CheckpointError, match=rf"no {missing} for k.weight"):
        run.load_state_dict(state_dict)
    assert not run.state


def test_empty_entries_of_parameters_without_gradients_load():
    saved, run = FOAM(parameters(B)), FOAM(parameters(B))
    for optimizer in (saved, run):
        param, other = optimizer.param_groups[0]["params"]
        param.grad = torch.ones_like(param)
        assert not optimizer.state[other]  # torch creates an entry
    saved.step()
    run.load_state_dict(saved.state_dict())
    assert all_equal(moments(run), moments(saved))


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def foam(params):
    return FOAM(params, level=0, scale=1, fused=False)


@pytest.mark.parametrize(("before", "after"), [(adamw, foam), (foam, adamw)])
def test_adamw_and_foam_at_level_0_go_on_with_each_other(before, after):
    straight, moved = parameters(), parameters()
    train(adamw(straight), range(6))
    first = before(moved)
    first.param_groups[0] |= {"lr": 1e-2, "weight_decay": 0.1}
    train(first, range(3))
    second = after(moved)
    second.load_state_dict(through_a_file(first.state_dict()))
    train(second, range(3, 6))
    assert all_equal(straight, moved)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_state_of_a_compiled_or_parallel_model_loads_into_the_plain_one(prefix):
    def named_by(prefix):
        return FOAM([(f"{prefix}{name}", p) for name, p in zip("ab", parameters(B), strict=True)])

    for saved, run in ((named_by(prefix), named_by("")), (named_by(""), named_by(prefix))):
        train(saved, range(2))
        run.load_state_dict(saved.state_dict())
        assert all_equal(moments(run), moments(saved))


def test_hooks_on_loading_see_and_change_the_state():
    saved, run = FOAM(parameters(A)), FOAM(parameters(A))
    train(saved, range(2))
    seen = []

    def renamed(_, state_dict):
        return {**state_dict, "state": {0: state_dict["state"]["old name"]}}

    run.register_load_state_dict_pre_hook(renamed)
    run.register_load_state_dict_post_hook(lambda loaded: seen.extend(moments(loaded)))
    state_dict = saved.state_dict()
    run.load_state_dict({**state_dict, "state": {"old name": state_dict["state"][0]}})
    assert all_equal(moments(run), moments(saved))
    assert all_equal(seen, moments(saved))
    for _ in range(2):  # nothing of the first load is left
        run.load_state_dict({**state_dict, "state": {"old name": state_dict["state"][0]}})


@pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning")
@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": torch.int8}, {"level": 0, "maximize": True}], ids=str
)
def test_a_distributed_checkpoint_goes_there_and_back(options, flattened, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as distributed

    shape = distributed.StateDictOptions(flatten_optimizer_state_dict=flattened)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6))
    groups = [{"params": [model[0].weight], "level": 1}, {"params": [model[0].bias]}]
    saved = FOAM([*groups, {"params": model[1].parameters(), "lr": 0.5}], **options)
    train(saved, range(3))
    content = {"optimizer": distributed.get_optimizer_state_dict(model, saved, options=shape)}
    checkpoint.save(content, checkpoint_id=tmp_path, no_dist=True)

    groups = [{**group, "params": list(group["params"])} for group in saved.param_groups]
    run = FOAM(groups, **options)
    content = {"optimizer": distributed.get_optimizer_state_dict(model, run, options=shape)}
    checkpoint.load(content, checkpoint_id=tmp_path, no_dist=True)
    distributed.set_optimizer_state_dict(
        model, run, optim_state_dict=content["optimizer"], options=shape
    )
    assert_same(run.state_dict(), saved.state_dict())


def test_the_level_of_what_never_folds_does_not_matter():
    run = FOAM(parameters([(7,)]), level=2)
    run.load_state_dict(FOAM(parameters([(7,)]), level=1).state_dict())


@pytest.mark.parametrize(
    ("saved", "run", "message"),
    [
        (lambda: FOAM(parameters(B), level=1), lambda: FOAM(parameters(B), level=2), "parameter 0"),
        (lambda: named(1, second_moment="square_mean"), lambda: named(1), "square_mean .*mean_sq"),
        (lambda: FOAM(parameters(A)), lambda: FOAM(parameters(B)), "no .*state for parameter 1"),
        (lambda: FOAM(parameters(B)), lambda: FOAM(parameters(A)), "parameter 1, .*not train"),
        (lambda: FOAM(parameters(A)), lambda: FOAM(parameters([(3, 12)])), r"\(3, 2\).*\(3, 3\)"),
        (
            lambda: torch.optim.AdamW(parameters(A)),
            lambda: FOAM(parameters(A)),
            "level 0 for parameter 0, this run has level 2",
        ),
        (
            lambda: torch.optim.AdamW(parameters(A), amsgrad=True),
            lambda: FOAM(parameters(A), level=0),
            "amsgrad",
        ),
        (
            lambda: torch.optim.Adam(parameters(A), weight_decay=0.1),
            lambda: FOAM(parameters(A), level=0),
            "Adam with weight_decay 0.1",
        ),
        (
            lambda: torch.optim.SGD(parameters(A), momentum=0.9),
            lambda: FOAM(parameters(A), level=0),
            "neither FOAM nor AdamW",
        ),
    ],
    ids=[
        *("level", "second_moment", "missing", "too many", "shape"),
        *("adamw at level 2", "amsgrad", "adam with decay", "sgd"),
    ],
)
def test_another_state_is_refused(saved, run, message):
    optimizer = saved()
    train(optimizer, [0])
    with pytest.raises(CheckpointError, match=message):
        run().load_state_dict(optimizer.state_dict())


def test_another_grouping_is_refused():
    pairs = list(zip("ab", parameters([(3, 8), (3, 8)]), strict=True))
    together, swapped = [{"params": pairs}], [{"params": pairs[::-1]}]
    apart = [{"params": pairs[:1]}, {"params": pairs[1:]}]
    for saved, run in ((apart, together), (together, swapped)):
        with pytest.raises(CheckpointError, match=r"groups .* differently.* b;"):
            FOAM(run).load_state_dict(FOAM(saved).state_dict())
