import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foam_lightning import FOAM
from foam_lightning.optim.groups import foldable_shapes, is_foldable, param_groups


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.q_proj = nn.Linear(4, 6)
        self.k_proj = nn.Linear(4, 6, bias=False)
        self.norm = nn.LayerNorm(4, bias=False)
        self.lm_head = nn.Linear(4, 10, bias=False)


@pytest.fixture
def model():
    return Tiny()


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


@pytest.mark.parametrize(
    ("name", "shape", "exclude", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), (), True),
        ("model.layers.0.mlp.experts", (2, 4, 4), (), True),
        ("model.layers.0.input_layernorm.weight", (4,), (), False),
        ("model.embed_tokens.weight", (10, 4), (), False),
        ("lm_head.weight", (10, 4), (), False),
        ("model.layers.0.mlp.down_proj.weight", (4, 4), (r"layers\.0\.",), False),
        ("lm_head.weight", (4, 4), ("embed",), True),
    ],
)
def test_matrices_fold_unless_their_name_is_excluded(name, shape, exclude, expected):
    assert is_foldable(name, shape, *exclude) is expected


def test_frozen_parameters_are_left_out(model):
    assert foldable_shapes(model.named_parameters()) == {
        "q_proj.weight": (6, 4),
        "k_proj.weight": (6, 4),
    }
    model.k_proj.weight.requires_grad_(False)
    assert list(foldable_shapes(model.named_parameters())) == ["q_proj.weight"]
    levels = {"q_proj.weight": 1, "k_proj.weight": 2}
    groups = param_groups(model.named_parameters(), levels, dict.fromkeys(levels, 0.25), 0.1)
    assert [group["level"] for group in groups] == [1, 0]
    assert all("k_proj.weight" not in group for group in names(groups))


def test_one_group_per_level_and_scale_then_the_rest(model):
    levels = {"q_proj.weight": 2, "k_proj.weight": 0}
    scales = {"k_proj.weight": 0.1, "q_proj.weight": 0.25}
    groups = param_groups(model.named_parameters(), levels, scales, 0.1)
    assert names(groups) == [
        ["k_proj.weight"],
        ["q_proj.weight"],
        ["embed_tokens.weight", "q_proj.bias", "norm.weight", "lm_head.weight"],
    ]
    options = [(g["level"], g["scale"], g["weight_decay"]) for g in groups]
    assert options == [(0, 0.1, 0.1), (2, 0.25, 0.1), (0, 1.0, 0.0)]


def test_no_group_is_empty(model):
    only, scales = {"q_proj.weight": 1}, {"q_proj.weight": 1.0}
    assert len(param_groups([("q_proj.weight", model.q_proj.weight)], only, scales, 0)) == 1
    assert len(param_groups(model.named_parameters(), {}, {}, 0)) == 1


def test_the_optimizer_uses_the_groups_and_their_names(model):
    levels, scales = {"q_proj.weight": 1}, {"q_proj.weight": 0.25}
    optimizer = FOAM(param_groups(model.named_parameters(), levels, scales, 0.1))
    assert optimizer.param_groups[0]["param_names"] == ["q_proj.weight"]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[model.q_proj.weight]["exp_avg"].shape == (6, 2)
    assert optimizer.state[model.embed_tokens.weight]["exp_avg"].shape == (10, 4)


@pytest.mark.parametrize(
    ("levels", "scales", "message"),
    [
        ({"k_proj.weight": 1, "q_proj.weight": 3}, {"k_proj.weight": 1.0}, r"scale.* q_proj\.w"),
        ({"model.x": 3}, {"model.x": 1.0}, r"1 parameters .* model\.x"),
    ],
)
def test_unknown_names_and_missing_scales_are_refused(model, levels, scales, message):
    with pytest.raises(ValueError, match=message):
        param_groups(model.named_parameters(), levels, scales, 0.1)


NAMES = [f"layers.{i}.q_proj.weight" for i in range(6)]
WEIGHTS = {name: nn.Parameter(torch.zeros(2, 2)) for name in (*NAMES, "norm.weight")}


@given(
    st.dictionaries(
        st.sampled_from(NAMES), st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.25, 0.5]))
    )
)
def test_groups_partition_the_parameters_by_level_and_scale(settings):
    levels = {name: level for name, (level, _) in settings.items()}
    scales = {name: scale for name, (_, scale) in settings.items()}
    *folded, rest = param_groups(WEIGHTS.items(), levels, scales, 0.1)
    keys = [(group["level"], group["scale"]) for group in folded]
    assert keys == sorted(set(settings.values()))
    found = {name: key for key, group in zip(keys, names(folded), strict=True) for name in group}
    assert found == settings
    for group in (*names(folded), *names([rest])):
        assert group == sorted(group, key=list(WEIGHTS).index)
    assert {*found, *names([rest])[0]} == set(WEIGHTS)
