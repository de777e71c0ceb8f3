"""Whether a saved optimizer state belongs to this run, and its way back into the optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from foam_lightning.errors import CheckpointError
from foam_lightning.optim.state import MOMENTS, layouts, read, write_


class _Entry(NamedTuple):
    group_index: int
    group: dict[str, Any]
    param: Any  # a tensor in the run, a number in the checkpoint


def check_fit(groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Refuse a saved state that this run would read with another meaning.

    torch compares the sizes of the groups only: moments of another level would be taken for good.

    Args:
        groups: The `param_groups` of the run.
        state_dict: From `state_dict()` of a FOAM.

    Raises:
        CheckpointError: Parameters, groups, levels, second moments or shapes differ. The message
            names the first parameter in question, or gives its number if either side has no names.
    """
    saved_groups = state_dict["param_groups"]
    if any("level" not in group for group in saved_groups):
        raise CheckpointError("the checkpoint is of another optimizer than FOAM; start a new run")
    named = all("param_names" in group for group in (*groups, *saved_groups))
    run, saved = _entries(groups, named), _entries(saved_groups, named)
    for label, entry in run.items():
        if label not in saved:
            raise CheckpointError(f"the checkpoint has no optimizer state for {label}")
        _check_meaning(label, entry, saved[label].group)
        _check_shapes(label, entry, state_dict["state"].get(saved[label].param, {}))
    for label in saved:
        if label not in run:
            raise CheckpointError(f"the checkpoint has {label}, which this run does not train")
    for (label, entry), (saved_label, saved_entry) in zip(run.items(), saved.items(), strict=True):
        if (label, entry.group_index) != (saved_label, saved_entry.group_index):
            raise CheckpointError(
                f"the checkpoint groups the parameters differently, first {label}; "
                "pass the checkpoint's fold plan or start a new run"
            )


def restore_(state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Fill the state of one parameter with what was saved.

    Args:
        state: As the optimizer makes it before the first step; its tensors keep dtype and device,
            and `step` becomes an int.
        saved: `step` as an int or a tensor of one value, and tensors.
    """
    fresh = {key: value for key, value in state.items() if key != "step"}
    home = fresh["exp_avg"].device
    tensors = {key: value.to(home) for key, value in saved.items() if key != "step"}
    if all(key in tensors and tensors[key].dtype == fresh[key].dtype for key in fresh):
        for key, value in fresh.items():
            value.copy_(tensors[key])
    else:
        for moment in MOMENTS:
            if moment in fresh:
                write_(fresh, moment, read(tensors, moment), None)
    state["step"] = int(saved["step"])


def renumbered(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], order: Sequence[Tensor]
) -> dict[str, Any]:
    """Number the parameters of a saved state as the model lists them.

    An optimizer numbers them group by group. It reads any numbers back, but FSDP2 takes them for
    positions in the model.

    Args:
        state_dict: From `state_dict()` of any optimizer; left as it is.
        groups: The `param_groups` of that optimizer.
        order: All parameters of the model.
    """
    places = {id(param): place for place, param in enumerate(order)}
    numbers = {
        number: places[id(param)]
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


def _entries(groups: Sequence[dict[str, Any]], named: bool) -> dict[str, _Entry]:
    """Key every parameter by its name, or by its number where names are not known."""
    entries: dict[str, _Entry] = {}
    for group_index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            label = group["param_names"][i] if named else f"parameter {len(entries)}"
            entries[label] = _Entry(group_index, group, param)
    return entries


def _check_meaning(label: str, entry: _Entry, saved: dict[str, Any]) -> None:
    run = entry.group
    if entry.param.ndim >= 2 and saved["level"] != run["level"]:
        raise CheckpointError(
            f"the checkpoint has fold level {saved['level']} for {label}, this run asks for "
            f"{run['level']}; pass the checkpoint's fold plan or start a new run"
        )
    if saved["second_moment"] != run["second_moment"]:
        raise CheckpointError(
            f"the checkpoint has second moment {saved['second_moment']} for {label}, this run asks "
            f"for {run['second_moment']}; ask for the same or start a new run"
        )


def _check_shapes(label: str, entry: _Entry, saved_state: dict[str, Any]) -> None:
    group = entry.group
    expected = layouts(
        entry.param.shape, group["level"], group["state_dtype"], group["second_moment"]
    )
    for moment in MOMENTS:
        if moment in saved_state and tuple(saved_state[moment].shape) != expected[moment].shape:
            raise CheckpointError(
                f"the checkpoint has {moment} of shape {tuple(saved_state[moment].shape)} for "
                f"{label}, this run needs {expected[moment].shape}; it was made for another model"
            )
