"""Fold plans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, Content, Prepare, fit


def _changed(change: Callable[[dict[str, Any]], object]) -> Prepare:
    def prepare(at: Path, good: Path) -> None:
        plan = json.loads((good / "plan.json").read_text(encoding="utf-8"))
        change(plan)
        (at / "plan.json").write_text(json.dumps(plan), encoding="utf-8")

    return prepare


def _cut(at: Path, good: Path) -> None:
    text = (good / "plan.json").read_text(encoding="utf-8")
    (at / "plan.json").write_text(text[: len(text) // 2], encoding="utf-8")


def _set(*keys: str, to: Any) -> Prepare:
    def change(plan: dict[str, Any]) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        plan[keys[-1]] = to

    return _changed(change)


def _without(*keys: str) -> Prepare:
    def change(plan: dict[str, Any]) -> None:
        for key in keys[:-1]:
            plan = plan[key]
        del plan[keys[-1]]

    return _changed(change)


def _first_level(to: Any) -> Prepare:
    return _changed(lambda plan: plan["levels"].update({next(iter(plan["levels"])): to}))


def _first_scale(to: Any) -> Prepare:
    return _changed(lambda plan: plan["scales"].update({next(iter(plan["scales"])): to}))


_USE_PLAN = "--fold-plan {at}/plan.json"
_SCHEMA_1 = '{"schema": "foam-lightning/fold-plan/1", '


def _text_plan(name: str, content: Content, says: str) -> Case:
    return fit(f"plan: {name}", _USE_PLAN, says, files={"plan.json": content})


PLANS = [
    fit("plan: missing", _USE_PLAN, "cannot read the fold plan"),
    fit("plan: a folder", "--fold-plan {good}", "cannot read the fold plan"),
    fit("plan: a checkpoint", "--fold-plan {good}/run/checkpoints/last.ckpt", "fold plan"),
    _text_plan("empty", "", "not JSON"),
    _text_plan("bytes", bytes(range(256)), "cannot read"),
    _text_plan("YAML", "levels: {}\n", "not JSON"),
    _text_plan("null", "null", "schema"),
    _text_plan("a list", "[1]", "schema"),
    _text_plan("a text", '"plan"', "schema"),
    _text_plan("a number", "1" * 5000, "not JSON"),
    _text_plan("deep", "[" * 100_000, "not JSON"),
    _text_plan("deep within", _SCHEMA_1 + '"levels": ' + '{"a":' * 100_000, "not JSON"),
    _text_plan("no schema", "{}", "schema"),
    _text_plan("a schema of a list", '{"schema": []}', "schema"),
    _text_plan("schema alone", _SCHEMA_1 + '"x": 1}', "not a valid fold plan"),
    _text_plan("levels of a list", _SCHEMA_1 + '"levels": [], "scales": []}', "not a valid"),
    _text_plan("levels of a text", _SCHEMA_1 + '"levels": "a", "scales": "b"}', "not a valid"),
    _text_plan("a key twice", _SCHEMA_1 + '"lr": 1, "lr": 2}', "a key appears twice"),
    _text_plan("a line break in a name", _SCHEMA_1 + '"a\\nb": 1, "levels": {}, "scales": {}}',
               "not a valid"),
    fit("plan: cut off", _USE_PLAN, "not JSON", prepare=_cut),
    *(
        fit(f"plan: {name}", _USE_PLAN, says, prepare=prepare)
        for name, prepare, says in [
            ("another schema", _set("schema", to="foam-lightning/fold-plan/9"), "schema"),
            ("no memory options", _without("memory_options"), "memory_options"),
            ("no levels", _without("levels"), "levels"),
            ("no model", _without("model"), "model"),
            ("an unknown key", _set("extra", to=1), "extra"),
            ("an unknown memory option", _set("memory_options", "extra", to=1), "extra"),
            ("memory options of a list", _set("memory_options", to=[]), "not a valid"),
            ("model of a list", _set("model", to=[1]), "not a valid"),
            ("model of a number", _set("model", to=1), "not a valid"),
            ("model of a text size", _set("model", "hidden_size", to="32"), "hidden_size"),
            ("scales of null", _set("scales", to=None), "not a valid"),
            ("lr 0", _set("lr", to=0), "lr must be"),
            ("lr NaN", _set("lr", to=float("nan")), "lr must be"),
            ("lr of 400 digits", _set("lr", to=10**400), "lr must be"),
            ("lr of a text", _set("lr", to="high"), "lr must be"),
            ("lr true", _set("lr", to=True), "lr must be"),
            ("a negative level", _first_level(-1), "level of"),
            ("level 63", _first_level(63), "level of"),
            ("a huge level", _first_level(10**30), "level of"),
            ("level 1.5", _first_level(1.5), "level of"),
            ("a level of a text", _first_level("2"), "level of"),
            ("a level of null", _first_level(None), "level of"),
            ("a level true", _first_level(True), "level of"),
            ("a scale of NaN", _first_scale(float("nan")), "scale of"),
            ("a scale of infinity", _first_scale(float("inf")), "scale of"),
            ("a negative scale", _first_scale(-0.25), "scale of"),
            ("a scale of a list", _first_scale([0.25]), "scale of"),
            ("micro-batch 0", _set("memory_options", "micro_batch_size", to=0), "micro_batch_size"),
            ("half a row", _set("memory_options", "micro_batch_size", to=1.5), "micro_batch_size"),
            ("text as option", _set("memory_options", "chunked_loss", to="no"), "chunked_loss"),
            ("an unknown dtype", _set("memory_options", "state_dtype", to="int4"), "int4"),
            ("a dtype of a list", _set("memory_options", "state_dtype", to=["int8"]), "int8"),
            ("contradictory options", _set("memory_options", "selective_checkpointing", to=True),
             "activation_checkpointing"),
            ("release and accumulation", _changed(lambda plan: plan["memory_options"].update(
                gradient_release=True, accumulate_grad_batches=2)), "gradient_release"),
            ("another batch", _set("memory_options", "micro_batch_size", to=3), "batch"),
            ("another model", _set("model", "hidden_size", to=64), "hidden_size 64"),
            ("a name that is not there", _changed(lambda plan: [plan["levels"].update(x=1),
                plan["scales"].update(x=1.0)]), "x is foldable in"),
            ("a proxy model of a list", _set("proxy_model", to=[1]), "not a valid"),
        ]
    ),
    fit("plan: with a baseline", "--fold-plan {good}/plan.json --model.optimizer adamw",
         "does not support"),
]  # fmt: skip
