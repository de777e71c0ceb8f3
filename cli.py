"""The door: `python cli.py fit --memory-budget 24GB`.

Heavy imports (torch, lightning, transformers) wait inside the commands, so that `--help` and a
mistyped budget are answered at once.
"""

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foam_lightning import __version__
from foam_lightning.distributed.topology import Devices, check_launched, is_first_process
from foam_lightning.errors import (
    CheckpointError,
    ConfigError,
    FellBackError,
    FoamError,
    breakage,
    in_one_line,
)
from foam_lightning.signals import Interrupted, listening
from foam_lightning.storage.paths import exists, is_file
from tuner.config.help import (
    COMMANDS,
    check_at_once,
    check_config,
    command_help,
    general_help,
    values_of,
)

if TYPE_CHECKING:
    from foam_lightning.job import Job
    from foam_lightning.storage.run_folder import RunFolder
    from tuner.config.parser import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; those it was started with by default.

    Returns:
        The exit code: 0 done, 2 bad usage, 3 the budget is infeasible or memory ran out with every
        lever pulled, 4 memory ran out and the same words go on with less (a process of its own
        does so by itself), 5 a disk or a file failed, 6 another process is at work there, 7
        training diverged, 130 or 143 ended by SIGINT or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not is_first_process():  # it speaks for all
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        with listening():
            return _answer(words)
    except FellBackError as error:
        print(error, file=sys.stderr)
        if arguments is None:
            from tuner.oom_fallback import start_afresh

            start_afresh()
        print("type the same command again to go on", file=sys.stderr)
        return error.exit_code
    except FoamError as error:
        print("error:", in_one_line(error), file=sys.stderr)
        return error.exit_code
    except Interrupted as interrupted:
        if not is_first_process():  # whoever started it would take its code for a fault
            return 0
        print(f"{interrupted}; type the same command again to go on", file=sys.stderr)
        return interrupted.exit_code
    except Exception as error:
        broken = breakage(error)
        if broken is None:
            raise
        print(f"error: {broken}", file=sys.stderr)
        return broken.exit_code


def _answer(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(general_help())
        return 0
    if words[0] == "--version":
        print(f"foam-lightning {__version__}")
        return 0
    command, options = words[0], words[1:]
    if command in COMMANDS and ("-h" in options or "--help" in options):
        print(command_help(command))
        return 0
    check_at_once(command, options)
    default = _default_config(options)
    is_first = "tuner.config.parser" not in sys.modules
    gc.disable()  # modules live to the end: looking for garbage among them takes seconds
    from tuner.config.parser import parse

    if is_first:
        gc.freeze()  # nor is it looked for among them later
    gc.enable()
    settings = parse(command, options, default=default)
    check_launched(command, Devices.of(settings.values.trainer.as_dict()))
    _quieten()
    runner = {
        "fit": _fit,
        "plan": _plan,
        "tune": _tune,
        "validate": _validate,
        "generate": _generate,
        "export": _export,
        "compare": _compare,
    }[command]
    runner(settings)
    return 0


def _default_config(options: list[str]) -> Path | None:
    """Choose the configuration of a command that names none: its checkpoint's run, or ours."""
    if any(values_of(options, "--config")):
        return None
    for checkpoint in values_of(options, "--ckpt_path"):
        try:
            beside = Path(checkpoint).resolve().parent.parent / "config.yaml"
        except (OSError, RuntimeError, ValueError):  # a loop of links, or no path at all
            continue
        if is_file(beside):
            check_config(beside)
            return beside
    return Path(__file__).parent / "configs" / "default.yaml"


def _quieten() -> None:
    """Keep Lightning's tips off the terminal; what matters we say ourselves."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


# ---- commands


def _plan(settings: "Settings") -> None:
    from rich.console import Console

    from tuner.commands.plan import plan

    answer = plan(
        settings.job(),
        settings.memory_budget,
        uniform_level=settings.uniform_level,
        num_tensors=settings.tensors,
        picture=None if settings.picture is None else Path(settings.picture),
    )
    if settings.format == "json":
        print(answer.json)
    else:
        Console().print(answer.table)
    if answer.refusal is not None:
        raise answer.refusal


def _tune(settings: "Settings") -> None:
    from tuner.oom_fallback import fallen_to, guarded
    from tuner.pipeline import tune
    from tuner.planning.planner import Fitting
    from tuner.trials.workers import Worker

    job = settings.job()
    if settings.memory_budget is None:
        raise ConfigError("tune needs --memory-budget SIZE, such as 24GB")
    if job.devices.shards:
        raise ConfigError(
            "tune trains the whole model in one process; tune with --trainer.devices 1 and a "
            "budget that holds it, then share it: fit --fold-plan FILE"
        )
    _calibrate(job)
    fitting = Fitting(job, settings.memory_budget)
    fitting.refuse_if_infeasible()
    levers = fallen_to(_unfinished(settings))
    folder = _open_folder(settings, job)
    with guarded(fitting, folder), Worker(folder.tuning, "tune", print) as worker:
        tuned = tune(job, fitting, folder, settings.tune, worker=worker, levers=levers)
        if tuned is None:  # another worker goes on
            return
        folder.name_plan(settings.text)
    reason = tuned.outcome.reason if tuned.outcome else "not tuned"
    print(f"plan    {folder.plan}: {reason}")
    if tuned.outcome:
        print(f"report  {folder.tuning / 'report.md'}")
    print("next    the same command with fit instead of tune")


def _fit(settings: "Settings") -> None:
    from dataclasses import replace

    from foam_lightning.resume import given_plan, without_folder
    from tuner.commands.final_screen import ending
    from tuner.oom_fallback import fallen_to, guarded
    from tuner.pipeline import fit
    from tuner.planning.planner import Fitting

    unfinished = _unfinished(settings)
    starts = ([unfinished.last_checkpoint] if unfinished else []) + (
        [Path(settings.ckpt_path)] if settings.ckpt_path else []
    )
    job = without_folder(settings.job(), starts)
    _calibrate(job)
    fitting = Fitting(job, settings.memory_budget or sys.maxsize)
    plan = given_plan(job, settings.ckpt_path, settings.fold_plan)
    levers = fallen_to(unfinished)
    if plan is None and settings.memory_budget is None:
        plan = job.own_plan()
    if plan is None and job.devices.count > 1:
        raise ConfigError(
            "tune in one process first: python cli.py tune with the same options, then fit "
            "--fold-plan FILE"
        )
    if plan is None:
        fitting.refuse_if_infeasible()
    else:
        plan = replace(plan, levers=levers or plan.levers)
        fitting.check(plan)
    folder = _open_folder(settings, job)
    with guarded(fitting, folder):
        summary = fit(
            job,
            fitting,
            folder,
            settings.tune,
            plan=plan,
            levers=levers,
            settings=settings.text,
            ckpt_path=None if settings.ckpt_path is None else Path(settings.ckpt_path),
        )
    if summary is not None:
        print(ending(folder, summary))


def _validate(settings: "Settings") -> None:
    from foam_lightning.checkpoint.load import load_module
    from foam_lightning.evaluate import perplexity_text
    from foam_lightning.resume import on_checkpoint
    from foam_lightning.training import validate

    path = Path(settings.ckpt_path)
    module = load_module(path)
    job = settings.job().on_one_device()
    job = on_checkpoint(job, path, module.hparams["architecture"])
    plan = module.plan
    assert plan is not None
    data = job.new_data(plan.levers)
    trainer = job.new_trainer(plan.levers, [], logger=False, enable_checkpointing=False)
    loss, num_tokens = validate(trainer, module, data)
    num_batches = len(data.val_dataloader()) if settings.biased else None
    print(perplexity_text(loss, num_tokens, num_batches=num_batches))


def _generate(settings: "Settings") -> None:
    from foam_lightning.generate import write

    write(
        Path(settings.ckpt_path),
        settings.prompt,
        is_chat=settings.data.chat,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed_everything,
    )


def _export(settings: "Settings") -> None:
    from foam_lightning.checkpoint.load import load_module, load_tokenizer
    from foam_lightning.data.chat import end_of_turn
    from foam_lightning.model.llama import save

    path, output = Path(settings.ckpt_path), Path(settings.output)
    if exists(output) and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder; choose another")
    module = load_module(path)
    assert module.model is not None
    tokenizer = load_tokenizer(path)
    turn = end_of_turn(tokenizer) if settings.data.chat else None
    save(module.model, tokenizer, output, end_of_turn=turn)
    print(f"wrote {output}; load it with AutoModelForCausalLM.from_pretrained({str(output)!r})")


def _compare(settings: "Settings") -> None:
    from tuner.commands.compare import run_comparison
    from tuner.comparison.compare import Options

    if settings.memory_budget is not None or settings.fold_plan is not None:
        raise ConfigError(
            "compare runs every optimizer as configured; leave --memory-budget and --fold-plan out"
        )
    options = Options.of(settings.optimizers, settings.steps, settings.seeds)
    folder = Path(settings.runs) / settings.name / "compare"
    run_comparison(settings.job(), options, folder, command=settings.command)


# ---- parts of fit


def _calibrate(job: "Job") -> None:
    """Know what this machine's GPU costs, before anything is accounted."""
    from foam_lightning.memory.device import calibrate

    if job.gpu is not None:
        calibrate(job.gpu)


def _open_folder(settings: "Settings", job: "Job") -> "RunFolder":
    """Open the run folder, once nothing that the user gave can still be wrong."""
    from foam_lightning.storage.run_folder import RunFolder, write_text

    job.check_weights()
    job.new_trainer(job.levers, [], logger=False)
    job.new_data(job.levers).setup()
    folder = RunFolder.open(Path(settings.runs), settings.name, _identity(settings))
    if not folder.plan.exists():
        write_text(folder.config, settings.text)
    return folder


def _unfinished(settings: "Settings") -> "RunFolder | None":
    """Find the run that the command continues, before anything is written."""
    from foam_lightning.storage.run_folder import RunFolder

    return RunFolder.unfinished(Path(settings.runs), settings.name, _identity(settings))


def _identity(settings: "Settings") -> str:
    """Give the text that tells one run from another."""
    start = settings.values.get("ckpt_path")
    return settings.text if start is None else f"{settings.text}ckpt_path: {start}\n"


if __name__ == "__main__":
    sys.exit(main())
