"""Check that a saved optimizer state belongs to this run, and load it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from foam_lightning.errors import CheckpointError
from foam_lightning.optim.state import MOMENTS, read_moment, state_layout, write_moment_


class _Entry(NamedTuple):
    group_index: int
    group: dict[str, Any]
    param: Any  # a tensor in the run, a number in the checkpoint


def check_compatible(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Refuse a saved state that would mean something else in this run.

    torch compares only the sizes of the groups, and would accept moments of another fold level.

    Args:
        groups: The `param_groups` of the run.
        state_dict: From `state_dict()` of a FOAM.

    Raises:
        CheckpointError: Parameters, groups, levels, second moments or shapes differ. The message
            names the first parameter that differs, or its number if either side has no names.
    """
    saved_groups = state_dict["param_groups"]
    if any("level" not in group for group in saved_groups):
        raise CheckpointError("the checkpoint's optimizer is not FOAM; start a new run")
    has_names = all("param_names" in group for group in (*groups, *saved_groups))
    run, saved = _entries(groups, has_names), _entries(saved_groups, has_names)
    for label, entry in run.items():
        if label not in saved:
            raise CheckpointError(f"the checkpoint has no optimizer state for {label}")
        _check_options(label, entry, saved[label].group)
        _check_shapes(label, entry, state_dict["state"].get(saved[label].param, {}))
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


def _entries(groups: Sequence[dict[str, Any]], has_names: bool) -> dict[str, _Entry]:
    """Index every parameter by its name, or by its number if names are unknown."""
    entries: dict[str, _Entry] = {}
    for group_index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            label = group["param_names"][i] if has_names else f"parameter {len(entries)}"
            entries[label] = _Entry(group_index, group, param)
    return entries


def _check_options(label: str, entry: _Entry, saved: dict[str, Any]) -> None:
    run = entry.group
    if entry.param.ndim >= 2 and saved["level"] != run["level"]:
        raise CheckpointError(
            f"the checkpoint has fold level {saved['level']} for {label}, this run has level "
            f"{run['level']}; pass the checkpoint's fold plan or start a new run"
        )
    if saved["second_moment"] != run["second_moment"]:
        raise CheckpointError(
            f"the checkpoint has second_moment {saved['second_moment']} for {label}, this run has "
            f"{run['second_moment']}; set the same or start a new run"
        )


def _check_shapes(label: str, entry: _Entry, saved_state: dict[str, Any]) -> None:
    group = entry.group
    expected = state_layout(entry.param.shape, group["level"], group["state_dtype"])
    for moment in MOMENTS:
        if moment in saved_state and tuple(saved_state[moment].shape) != expected[moment].shape:
            raise CheckpointError(
                f"the checkpoint has {moment} of shape {tuple(saved_state[moment].shape)} for "
                f"{label}, this run needs {expected[moment].shape}; pass a checkpoint of this model"
            )
