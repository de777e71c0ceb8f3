"""Check that a saved optimizer state belongs to this run, and load it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from foam_lightning.errors import CheckpointError
from foam_lightning.optim.options import ONLY_IN_ADAMW
from foam_lightning.optim.state import MOMENTS, read_moment, state_layout, write_moment_


class _Entry(NamedTuple):
    group_index: int
    group: dict[str, Any]
    param: Any  # a tensor in the run, a number in the checkpoint


def readable_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state in the form that FOAM saves, as a copy that shares the tensors.

    A state of torch.optim.AdamW becomes one at level 0. Parameters without moments lose their empty
    entries: torch makes such entries when a parameter is looked up in `optimizer.state`, and where
    it reads the flattened state of `torch.distributed.checkpoint`.

    Args:
        state_dict: From `state_dict()` of a FOAM or a torch.optim.AdamW.

    Raises:
        CheckpointError: It is of another optimizer, or of AdamW with options that FOAM lacks.
    """
    states = {
        key: {name: value for name, value in state.items() if not isinstance(value, dict)}
        for key, state in state_dict["state"].items()
    }
    return {
        **state_dict,
        "state": {key: state for key, state in states.items() if state},
        "param_groups": [_readable_group(group) for group in state_dict["param_groups"]],
    }


def check_compatible(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Refuse a saved state that would mean something else in this run.

    torch compares only the sizes of the groups, and would accept moments of another fold level.

    Args:
        groups: The `param_groups` of the run.
        state_dict: From `readable_state`.

    Raises:
        CheckpointError: Parameters, groups, levels, second moments or shapes differ. The message
            names the first parameter that differs, or its number if either side has no names.
    """
    saved_groups = state_dict["param_groups"]
    has_names = all("param_names" in group for group in (*groups, *saved_groups))
    run, saved = _entries(groups, has_names), _entries(saved_groups, has_names)
    for label, entry in run.items():
        if label not in saved:
            raise CheckpointError(f"the checkpoint has no optimizer state for {label}")
        _check_options(label, entry, saved[label].group)
        _check_state(label, entry, state_dict["state"].get(saved[label].param, {}))
    for label in saved:
        if label not in run:
            raise CheckpointError(f"the checkpoint has {label}, which this run does not train")
    for (label, entry), (saved_label, saved_entry) in zip(run.items(), saved.items(), strict=True):
        if (label, entry.group_index) != (saved_label, saved_entry.group_index):
            raise CheckpointError(
                f"the checkpoint groups the parameters differently, the first is {label}; "
                "pass the checkpoint's fold plan or start a new run"
            )


def load_state_(state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Copy the saved state of one parameter into a fresh one, converting the dtype if it differs.

    Args:
        state: As the optimizer creates it before the first step; its tensors keep dtype and device,
            and `step` becomes an int.
        saved: `step` as an int or a tensor of one value, and tensors.
    """
    fresh = {key: value for key, value in state.items() if key != "step"}
    device = fresh["exp_avg"].device
    tensors = {key: value.to(device) for key, value in saved.items() if key != "step"}
    if all(key in tensors and tensors[key].dtype == fresh[key].dtype for key in fresh):
        for key, value in fresh.items():
            value.copy_(tensors[key])
    else:
        for moment in MOMENTS:
            write_moment_(fresh, moment, read_moment(tensors, moment), None)
    state["step"] = int(saved["step"])


def renumber_by_model_order(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], order: Sequence[Tensor]
) -> dict[str, Any]:
    """Number the parameters of a saved state in the order of the model.

    An optimizer numbers them group by group and accepts any numbers on loading, but FSDP2 takes
    them for positions in the model.

    Args:
        state_dict: From `state_dict()` of any optimizer; unchanged.
        groups: The `param_groups` of that optimizer.
        order: All parameters of the model.
    """
    positions = {id(param): position for position, param in enumerate(order)}
    numbers = {
        number: positions[id(param)]
        for group, saved in zip(groups, state_dict["param_groups"], strict=True)
        for param, number in zip(group["params"], saved["params"], strict=True)
    }
    return {
        **state_dict,
        "state": {numbers[number]: state for number, state in state_dict["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[number] for number in group["params"]]}
            for group in state_dict["param_groups"]
        ],
    }


def _readable_group(group: dict[str, Any]) -> dict[str, Any]:
    if "level" in group:
        return group
    if "amsgrad" not in group:  # of torch's optimizers only Adam and AdamW have it
        raise CheckpointError(
            "the checkpoint's optimizer is neither FOAM nor AdamW; start a new run"
        )
    if group["amsgrad"]:
        raise CheckpointError(
            "the checkpoint's optimizer is AdamW with amsgrad, which FOAM lacks; start a new run"
        )
    if group["weight_decay"] and group.get("decoupled_weight_decay") is False:
        raise CheckpointError(
            f"the checkpoint's optimizer is Adam with weight_decay {group['weight_decay']}, which "
            "FOAM would apply as AdamW does; set it to 0 in the checkpoint or start a new run"
        )
    only_in_adamw = (*ONLY_IN_ADAMW, "decoupled_weight_decay")
    return {"level": 0, **{key: group[key] for key in group if key not in only_in_adamw}}


def _entries(groups: Sequence[dict[str, Any]], has_names: bool) -> dict[str, _Entry]:
    """Index every parameter by its name, or by its number if names are unknown."""
    params = [
        _Entry(index, group, param)
        for index, group in enumerate(groups)
        for param in group["params"]
    ]
    if has_names:
        labels = _unwrapped([name for group in groups for name in group["param_names"]])
    else:
        labels = [f"parameter {number}" for number in range(len(params))]
    return dict(zip(labels, params, strict=True))


def _unwrapped(names: Sequence[str]) -> list[str]:
    """Remove what torch.compile and DistributedDataParallel put into the names of parameters."""
    names = [name.replace("_orig_mod.", "") for name in names]
    is_wrapped = all(name.startswith("module.") for name in names)
    return [name.removeprefix("module.") if is_wrapped else name for name in names]


def _check_options(label: str, entry: _Entry, saved: dict[str, Any]) -> None:
    run = entry.group
    if entry.param.ndim < 2:
        return
    if saved["level"] != run["level"]:
        raise CheckpointError(
            f"the checkpoint has fold level {saved['level']} for {label}, this run has level "
            f"{run['level']}; pass the checkpoint's fold plan or start a new run"
        )
    if run["level"] > 0 and saved["second_moment"] != run["second_moment"]:
        raise CheckpointError(
            f"the checkpoint has second_moment {saved['second_moment']} for {label}, this run has "
            f"{run['second_moment']}; set the same or start a new run"
        )


def _check_state(label: str, entry: _Entry, saved_state: dict[str, Any]) -> None:
    if not saved_state:  # the parameter had no gradient yet
        return
    scaled = [m for m in MOMENTS if m in saved_state and not saved_state[m].is_floating_point()]
    for key in ("step", *MOMENTS, *(f"{moment}_scale" for moment in scaled)):
        if key not in saved_state:
            raise CheckpointError(
                f"the checkpoint has no {key} for {label}; pass a complete checkpoint, and a "
                "flattened one with the state_dtype that it was saved with"
            )
    group = entry.group
    expected = state_layout(entry.param.shape, group["level"], group["state_dtype"])
    for moment in MOMENTS:
        if tuple(saved_state[moment].shape) != expected[moment].shape:
            raise CheckpointError(
                f"the checkpoint has {moment} of shape {tuple(saved_state[moment].shape)} for "
                f"{label}, this run needs {expected[moment].shape}; pass a checkpoint of this model"
            )
