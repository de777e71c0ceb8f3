import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from foam_lightning.errors import CheckpointError, ConfigError
from foam_lightning.module import LlamaFoam
from foam_lightning.optim import baselines, low_rank
from foam_lightning.optim.baselines import OPTIMIZERS, BaselineSettings, create_baseline
from foam_lightning.optim.plain_state import measure_state_bytes
from foam_lightning.training import train
from tests.support.runs import StopAfter, StopError, final_weights, open_folder, small
from tests.support.training import assert_same, through_a_file

NEEDS_TORCHAO = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not in the extra dev, but in baselines"
)
BASELINES = [
    pytest.param(name, marks=[NEEDS_TORCHAO, pytest.mark.filterwarnings("ignore")])
    if name == "adamw8bit"
    else name
    for name in OPTIMIZERS[1:]
]
HIDDEN, HEADS, LAYERS, VOCABULARY, WIDE = 32, 2, 2, 320, 88


def new_model(seed=0):
    module = LlamaFoam(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        seed=seed,
    )
    module.configure_model()
    assert module.model is not None
    return module.model


def new_optimizer(name, model, **changed):
    settings = BaselineSettings(
        **{"lr": 5e-3, "matrix_scale": 0.5, "hidden_size": HIDDEN, "num_heads": HEADS, **changed}
    )
    return create_baseline(name, model.named_parameters(), settings)


def steps(model, optimizer, numbers):
    losses = []
    for number in numbers:
        random = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 8, (4, 16), generator=random)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", BASELINES)
def test_each_lowers_the_loss_and_resumes_exactly(name, monkeypatch):
    if name in ("galore", "apollo", "fira"):  # a new projection before and after the save
        monkeypatch.setattr(low_rank, "UPDATE_GAP", 3)
    whole = new_model()
    expected = steps(whole, new_optimizer(name, whole), range(8))
    assert expected[-1] < expected[0] - 0.5
    first = new_model()
    optimizer = new_optimizer(name, first)
    losses = steps(first, optimizer, range(4))
    weights, state = through_a_file([first.state_dict(), optimizer.state_dict()])
    second = new_model(seed=1)
    resumed = new_optimizer(name, second)
    second.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.randn(7)  # other draws from torch's generator change nothing
    losses += steps(second, resumed, range(4, 8))
    assert losses == expected
    for found, wanted in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)


# ---- bytes of state, by hand

MATRICES = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)
NORMS = (2 * LAYERS + 1) * HIDDEN
NUM_TENSORS = LAYERS * 9 + 3
REST = 2 * VOCABULARY * HIDDEN + NORMS
RANK = HIDDEN // 4
# Of a matrix, both moments are (larger side, rank), and the projection is (rank, smaller side).
PROJECTED = LAYERS * (4 * 3 * HIDDEN * RANK + 3 * (2 * WIDE * RANK + RANK * HIDDEN))
NUM_MATRICES, NUM_REST = LAYERS * 7, NUM_TENSORS - LAYERS * 7
BYTES = {
    "adamw": 4 * (2 * (MATRICES + REST) + NUM_TENSORS),
    "split_adamw": 4 * (2 * (MATRICES + REST) + NUM_TENSORS),
    "galore": 4 * (PROJECTED + 2 * REST),
    "apollo": 4 * (PROJECTED + NUM_MATRICES + 2 * REST),
    "fira": 4 * (PROJECTED + NUM_MATRICES + 2 * REST),
    "muon": 4 * (MATRICES + 2 * REST + NUM_REST),
}


@pytest.mark.parametrize("name", BYTES)
def test_state_bytes_match_the_formula(name):
    model = new_model()
    optimizer = new_optimizer(name, model)
    steps(model, optimizer, range(2))
    assert measure_state_bytes(optimizer) == BYTES[name]


# Adam-mini keeps both moments of embedding and head, and one of the rest.
ONE_MOMENT = 4 * (MATRICES + NORMS + 2 * 2 * VOCABULARY * HIDDEN)
EIGHT_BIT = pytest.param(
    *("adamw8bit", BYTES["adamw"] / 4, BYTES["adamw"]), marks=[NEEDS_TORCHAO, pytest.mark.slow]
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "low", "high"), [("adam_mini", ONE_MOMENT, 1.01 * ONE_MOMENT), EIGHT_BIT]
)
def test_state_bytes_are_in_range(name, low, high):
    model = new_model()
    optimizer = new_optimizer(name, model)
    steps(model, optimizer, range(2))
    assert low < measure_state_bytes(optimizer) < high


# ---- which tensors, at which settings


def test_split_adamw_scales_the_learning_rate_of_matrices_only():
    model = new_model()
    optimizer = new_optimizer("split_adamw", model, lr=0.1, matrix_scale=0.25, weight_decay=0.3)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is other for other in group["params"])
    }
    assert len(found) == NUM_TENSORS
    for name, settings in found.items():
        folds = "_proj" in name
        assert settings == ((0.025, 0.3) if folds else (0.1, 0.0)), name


@pytest.mark.parametrize("name", ["adamw", "galore", "adam_mini", "muon"])
def test_weight_decay_applies_to_matrices_that_are_not_frozen(name):
    model = new_model()
    frozen = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = new_optimizer(name, model, weight_decay=0.5)
    steps(model, optimizer, range(2))
    assert torch.equal(frozen, before)
    folding = {id(p) for key, p in model.named_parameters() if "_proj" in key}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter is not frozen
            assert group["weight_decay"] == (0.5 if id(parameter) in folding else 0.0)


def test_the_rank_is_a_quarter_of_the_smaller_side_of_each_matrix():
    wide, narrow = (torch.nn.Parameter(torch.randn(size)) for size in ((32, 64), (8, 32)))
    settings = BaselineSettings(lr=1e-3, hidden_size=32, num_heads=2)
    optimizer = create_baseline("galore", [("q.weight", wide), ("k.weight", narrow)], settings)
    for parameter in (wide, narrow):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.state[wide]["exp_avg"].shape == (8, 64)
    assert optimizer.state[narrow]["exp_avg"].shape == (2, 32)


# ---- refusals


def test_an_unknown_name_is_refused_with_all_names():
    with pytest.raises(ConfigError, match=r"'adam'.* foam, adamw, .*adamw8bit"):
        new_optimizer("adam", new_model())


def test_a_missing_package_is_named(monkeypatch, new_job):
    monkeypatch.setattr(
        baselines, "find_spec", lambda name: None if name == "pytorch_optimizer" else name
    )
    installed = baselines.installed_optimizers()
    assert set(OPTIMIZERS) - set(installed) == {"galore", "apollo", "fira", "adam_mini"}
    with pytest.raises(ConfigError, match="pip install pytorch-optimizer"):
        _ = new_job(model={"optimizer": "galore"}).memory_options


def test_pytorch_optimizer_is_not_imported_before_it_is_needed():
    code = "import sys, foam_lightning.module; print('pytorch_optimizer' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "value"), [("gradient_release", True), ("state_offload", True), ("clip_norm", 1.0)]
)
def test_options_of_foam_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"muon .*model\.{name}"):
        LlamaFoam(optimizer="muon", **{name: value})


def test_fsdp_is_refused(new_job):
    sharded = {"devices": 2, "strategy": "fsdp2"}
    with pytest.raises(ConfigError, match="adamw"):
        _ = new_job(model={"optimizer": "adamw"}, trainer=sharded).memory_options


def test_memory_options_of_foam_are_refused(new_job):
    job = new_job(model={"optimizer": "adamw"})
    for changed in ({"gradient_release": True}, {"state_dtype": "int8"}):
        with pytest.raises(ConfigError, match="use foam"):
            job.check_memory_options(replace(job.memory_options, **changed))


# ---- in fit


def baseline_job(new_job, name, **trainer):
    job = small(new_job, **trainer)
    model = {"level": 2, "optimizer": name, "lr": 3e-3}
    return replace(job, model=replace(job.model, **model))


@pytest.mark.parametrize("name", ["adamw", "muon", "galore"])
def test_a_killed_run_resumes_exactly(name, new_job, tmp_path):
    job = baseline_job(new_job, name)
    plan = job.configured_plan()
    assert set(plan.levels.values()) == {0}
    whole, killed = open_folder(tmp_path / "whole"), open_folder(tmp_path / "killed")
    expected = train(job, plan, whole)
    with pytest.raises(StopError):
        train(baseline_job(new_job, name, callbacks=[StopAfter(9)]), plan, killed)
    resumed = train(job, plan, killed)
    assert resumed.final_validation_loss == expected.final_validation_loss
    assert_same(final_weights(killed), final_weights(whole))
    with pytest.raises(CheckpointError, match=f"split_adamw.*model.optimizer {name}"):
        train(baseline_job(new_job, "split_adamw"), plan, killed)
