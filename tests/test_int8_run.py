"""Runs with int8 weights: settings, plans, exact resume, and a folder that is fine-tuned."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import cli
from foam_lightning.checkpoint.load import load_module, read_checkpoint
from foam_lightning.errors import CheckpointError, ConfigError, PlanError
from foam_lightning.evaluate import validate
from foam_lightning.job import Job
from foam_lightning.plan import FoldPlan
from foam_lightning.training import train
from foam_lightning.units import at_least
from tests.support.pretrained import LLAMA3_8B, save_pretrained
from tests.support.runs import STEPS, StopAfter, StopError, open_folder, validation_loss
from tests.support.tiny import REPOSITORY, write_settings
from tests.support.training import assert_same
from tuner.commands.plan import plan as make_plan
from tuner.planning.planner import BudgetPlanner

INT8 = {"weights_dtype": "int8", "gradient_release": True}
NewJob = Callable[..., Job]


# ---- settings and plans


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model.weights_dtype int8 needs model.gradient_release"),
        (["--trainer.devices", "2", "--trainer.strategy", "ddp"], "needs one device, got 2"),
        (["--trainer.devices", "2", "--trainer.strategy", "fsdp2"], "needs one device, got 2"),
        (["--model.optimizer", "adamw"], "adamw does not support .*model.weights_dtype"),
        (["--model.weights_dtype", "int4"], "model.weights_dtype"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_int8_weights_do_not_combine_with_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_settings(tmp_path))
    assert cli.main(["fit", "--config", config, "--model.weights_dtype", "int8", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line


def test_a_budget_turns_gradient_release_on(new_job: NewJob) -> None:
    job = new_job(model={"weights_dtype": "int8"})
    with pytest.raises(ConfigError, match="gradient_release"):
        job.configured_plan()
    options = BudgetPlanner(job, 10**9).default_plan().memory_options
    assert (options.weights_dtype, options.gradient_release) == ("int8", True)
    assert options.micro_batch_size == 8


def test_a_plan_keeps_the_dtype_and_older_plans_have_none(new_job: NewJob) -> None:
    plan = new_job(model=INT8).configured_plan()
    text = plan.to_json()
    assert FoldPlan.from_json(text) == plan
    content = json.loads(text)
    del content["memory_options"]["weights_dtype"]
    older = FoldPlan.from_json(json.dumps(content))
    assert older.memory_options.weights_dtype is None
    assert json.loads(older.to_json()) == content
    content["memory_options"]["weights_dtype"] = "int4"
    with pytest.raises(PlanError, match="weights_dtype must be int8 or null, got 'int4'"):
        FoldPlan.from_json(json.dumps(content))


@pytest.mark.slow
def test_llama_3_8b_is_planned_in_16_gb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.config.parser import parse

    monkeypatch.setattr("foam_lightning.job.find_gpu", lambda **_: None)  # what one here costs
    LlamaConfig(**LLAMA3_8B).save_pretrained(tmp_path)
    config = REPOSITORY / "configs" / "finetune_llama3_8b_24gb.yaml"
    words = ["--config", str(config), "--model.pretrained", str(tmp_path)]
    words += ["--model.weights_dtype", "int8", "--memory-budget", "16GB"]
    settings = parse("plan", words, default=config)
    answer = make_plan(settings.job(), settings.memory_budget)
    found = json.loads(answer.json)
    assert answer.refusal is None
    assert found["feasible"]
    terms = found["breakdown"]
    assert sum(terms.values()) == found["predicted_peak_bytes"] <= 16 * 10**9
    matrices, rest = 6_979_321_856, 2 * 128256 * 4096 + 65 * 4096
    assert terms["weights"] == matrices * 130 // 128 + 2 * rest
    assert terms["optimizer_state"] > 10**9  # on the card
    assert at_least(found["minimum_budget_bytes"]) == "12.55GB"  # as docs/budget.md says
    assert found["memory_options"]["weights_dtype"] == "int8"


# ---- runs


def int8_job(new_job: NewJob, precision: str = "bf16-true", **trainer: Any) -> Job:
    return new_job(
        model={**INT8, "state_dtype": "bfloat16", "hidden_size": 160, "num_attention_heads": 4},
        trainer={"max_steps": STEPS, "val_check_interval": 4, "precision": precision, **trainer},
    )


@pytest.fixture(params=["random weights", "a folder"])
def killable(request: pytest.FixtureRequest, new_job: NewJob, tmp_path: Path) -> Callable[..., Job]:
    """Return a function that makes a job with some arguments of the trainer."""
    if request.param == "random weights":
        return lambda **trainer: int8_job(new_job, **trainer)
    folder = str(save_pretrained(tmp_path / "pretrained", "llama-3.1"))
    model = {**INT8, "pretrained": folder, "lr": 0.01, "state_dtype": "bfloat16"}
    settings = {"max_steps": STEPS, "val_check_interval": 4, "precision": "bf16-true"}
    data = {"tokenizer": folder, "vocab_size": 328}
    return lambda **trainer: new_job(model=model, data=data, trainer={**settings, **trainer})


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(killable: Callable[..., Job], tmp_path: Path) -> None:
    job = killable()
    plan = job.configured_plan()
    whole, broken = (open_folder(tmp_path / name) for name in ("whole", "broken"))
    expected = train(job, plan, whole)
    with pytest.raises(StopError):
        train(killable(callbacks=[StopAfter(random.Random(STEPS).randrange(STEPS))]), plan, broken)
    found = train(killable(), plan, broken)
    assert found.final_validation_loss == expected.final_validation_loss
    states = [read_checkpoint(folder.last_checkpoint) for folder in (broken, whole)]
    assert_same(states[0]["state_dict"], states[1]["state_dict"])
    name = "model.model.layers.0.mlp.up_proj"
    assert states[0]["state_dict"][f"{name}.weight_codes"].dtype == torch.int8
    assert f"{name}.weight" not in states[0]["state_dict"]
    # The checkpoint alone has the model, and another dtype does not go on with it.
    module = load_module(whole.last_checkpoint)
    trainer = job.new_trainer(plan.memory_options, [], bare=True)
    loss, _ = validate(trainer, module, job.new_data(plan.memory_options))
    assert loss == expected.final_validation_loss
    options = replace(plan.memory_options, weights_dtype=None)
    with pytest.raises(CheckpointError, match="weights_dtype"):
        train(job, replace(plan, memory_options=options), whole)
    plain = replace(job, model=replace(job.model, weights_dtype=None))
    with pytest.raises(CheckpointError, match=r"model\.weights_dtype is null"):
        train(plain, plan, whole)


@pytest.mark.slow
def test_it_trains_as_far_as_bfloat16_weights(new_job: NewJob, tmp_path: Path) -> None:
    job = int8_job(new_job, max_steps=40, val_check_interval=40)
    plan = job.configured_plan()
    plain = replace(plan, memory_options=replace(plan.memory_options, weights_dtype=None))
    losses = [
        train(one, each, open_folder(tmp_path / str(number))).final_validation_loss
        for number, (one, each) in enumerate(
            [(job, plan), (replace(job, model=replace(job.model, weights_dtype=None)), plain)]
        )
    ]
    assert losses[0] < 4  # the first is log(300) = 5.7
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_a_folder_is_fine_tuned_and_exported_in_bfloat16(new_job: NewJob, tmp_path: Path) -> None:
    pretrained = save_pretrained(tmp_path / "pretrained", "llama-3.1")
    job = new_job(
        model={**INT8, "pretrained": str(pretrained), "lr": 0.01, "state_dtype": "bfloat16"},
        data={"tokenizer": str(pretrained), "vocab_size": 328},
        trainer={"precision": "bf16-true", "max_steps": 4},
    )
    folder = open_folder(tmp_path)
    trained = train(job, job.configured_plan(), folder)
    model = AutoModelForCausalLM.from_pretrained(folder.hf)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    # transformers attends with another kernel, so bfloat16 rounds otherwise.
    loss = validation_loss(model.model, model.lm_head, job)
    assert loss == pytest.approx(trained.final_validation_loss, abs=2e-3)
    words = ["--ckpt_path", str(folder.last_checkpoint)]
    assert cli.main(["export", *words, "--output", str(tmp_path / "exported")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    assert_same(again, model.state_dict())
    assert cli.main(["generate", *words, "--prompt", "def ", "--max_new_tokens", "3"]) == 0
