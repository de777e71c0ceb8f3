"""Import once what the stages need. What cannot be imported fails in the stage that needs it."""

from contextlib import suppress
from importlib import import_module

for _name in (
    "torch",
    "transformers.models.llama.modeling_llama",
    "tests.benchmarks.memory_truth",
    "tests.benchmarks.optimizer_step",
    "tuner.planning.planner",
    "tuner.trials.runner",
):
    with suppress(Exception):
        import_module(_name)
