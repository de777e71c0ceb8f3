"""The door: `python cli.py fit --memory-budget 24GB`.

Heavy imports (torch, lightning, transformers) wait inside the commands, so that `--help` and a
mistyped budget are answered at once.
"""

import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foam_lightning import __version__
from foam_lightning.errors import CheckpointError, ConfigError, FoamError
from foam_lightning.units import ByteSize, in_words

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from foam_lightning.job import Job
    from foam_lightning.plan import FoldPlan
    from foam_lightning.run_folder import RunFolder
    from tuner.pipeline import Tuned

COMMANDS = {
    "fit": "plan, tune, rehearse, train, export",
    "plan": "say what fits a budget, without training and without a GPU",
    "tune": "fit, up to and including the rehearsal",
    "validate": "unbiased perplexity of a checkpoint",
    "generate": "text from a checkpoint",
    "export": "a Hugging Face folder from a checkpoint",
}

_SHARED = {
    "--config FILE": "settings as YAML, repeatable; configs/default.yaml where none is given",
    "--memory-budget SIZE": "memory of one device, such as 24GB (24e9) or 24GiB (24 * 2**30)",
    "--fold-plan FILE": "train by this fold_plan.json; nothing is tuned",
    "--seed_everything N": "seed of weights, data order and search",
    "--name NAME": "the run goes to runs/NAME/version_<n>",
    "--runs DIR": "the folder of all runs",
    "--tune.trials N": "short runs of the search",
    "--tune.steps N": "optimizer steps of a short run; under 150 misleads",
    "--trainer.max_steps N": "optimizer steps of the full run",
    "--data.files PATH": "text to train on (.txt, .jsonl, .parquet); none: Python's own library",
    "--data.dataset NAME": "a dataset on the Hugging Face Hub",
    "--data.tokenizer PATH": "a local tokenizer or one on the Hub; none trains one",
    "--model.level L": "fold level of every matrix where there is no budget",
    "--model.pretrained DIR": "start from a local Hugging Face LLaMA folder",
}
_OWN = {
    "fit": {"--ckpt_path FILE": "continue from this checkpoint"},
    "plan": {
        "--format FORMAT": "table or json",
        "--uniform-level L": "account for this level everywhere instead of choosing levels",
    },
    "tune": {},
    "validate": {"--ckpt_path FILE": "the checkpoint (required)"},
    "generate": {
        "--ckpt_path FILE": "the checkpoint (required)",
        "--prompt TEXT": "what the text begins with",
        "--max_new_tokens N": "how much to write",
        "--temperature T": "0 always takes the likeliest token",
    },
    "export": {
        "--ckpt_path FILE": "the checkpoint (required)",
        "--output DIR": "the folder to write (required)",
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; those it was started with by default.

    Returns:
        The exit code: 0 done, 2 bad usage, 3 the budget is infeasible, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _answer(words)
    except FoamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; type the same command again to go on", file=sys.stderr)
        return 130


def _answer(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_general_help())
        return 0
    if words[0] == "--version":
        print(f"foam-lightning {__version__}")
        return 0
    command, options = words[0], words[1:]
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {command!r}; there are {', '.join(COMMANDS)}")
    if "-h" in options or "--help" in options:
        print(_command_help(command))
        return 0
    _check_at_once(options)
    settings = _parse(command, options)
    _quieten()
    runner = {
        "fit": _fit,
        "plan": _plan,
        "tune": _tune,
        "validate": _validate,
        "generate": _generate,
        "export": _export,
    }[command]
    runner(settings)
    return 0


# ---- what needs no torch


def _general_help() -> str:
    rows = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return (
        "Train LLaMA inside the memory you have.\n\n"
        "usage: python cli.py COMMAND [options]\n\n"
        f"{rows}\n\n"
        "  python cli.py fit --memory-budget 24GB     the whole way, on text of this machine\n"
        "  python cli.py COMMAND --help               the options of a command\n"
        "  python cli.py COMMAND --print_config       every setting there is, with its value"
    )


def _command_help(command: str) -> str:
    options = {**_OWN[command], **_SHARED}
    rows = "\n".join(f"  {flag:<24} {text}" for flag, text in options.items())
    return (
        f"usage: python cli.py {command} [options]\n\n{COMMANDS[command]}\n\n{rows}\n\n"
        "Every setting of the configuration is an option too, in the form --model.lr 0.01;\n"
        f"`python cli.py {command} --print_config` lists them all with their values."
    )


def _check_at_once(options: list[str]) -> None:
    """Refuse a bad budget or configuration file before anything slow is imported."""
    for value in _values_of(options, "--memory-budget", "--memory_budget"):
        try:
            ByteSize(value)
        except ValueError as error:
            raise ConfigError(f"--memory-budget: {error}") from error
    for value in _values_of(options, "--config"):
        _check_config(Path(value))


def _values_of(options: list[str], *flags: str) -> Iterator[str]:
    for position, option in enumerate(options):
        flag, equals, value = option.partition("=")
        if flag in flags:
            if not equals and position + 1 == len(options):
                raise ConfigError(f"{flag} needs a value")
            yield value if equals else options[position + 1]


def _check_config(path: Path) -> None:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the configuration {path} is not YAML: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"the configuration {path} holds no settings; see configs/default.yaml for their form"
        )


# ---- parsing


def _parse(command: str, options: list[str]) -> "Namespace":
    checkpoint = next(_values_of(options, "--ckpt_path"), None)
    if not any(_values_of(options, "--config")):
        beside = Path(checkpoint).resolve().parent.parent / "config.yaml" if checkpoint else None
        if beside is None or not beside.is_file():
            beside = Path(__file__).parent / "configs" / "default.yaml"
        options = ["--config", str(beside), *options]
    try:
        parser = _parser(command)
        settings = parser.parse_args(options)
        settings.resolved = _resolved(parser, settings)
        instantiated: Namespace = parser.instantiate(settings)
        return instantiated
    except ArgumentError as error:
        raise ConfigError(_one_line(error)) from error


def _parser(command: str) -> "ArgumentParser":
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import register_type
    from lightning.pytorch import Trainer

    from foam_lightning.data.module import TextData
    from foam_lightning.module import LlamaFoam
    from tuner.run import TuneOptions

    register_type(ByteSize, serializer=str, deserializer=ByteSize, fail_already_registered=False)
    parser = ArgumentParser(prog=f"cli.py {command}", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--memory_budget", "--memory-budget", type=ByteSize, default=None)
    parser.add_argument("--fold_plan", "--fold-plan", type=str | None, default=None)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_argument("--name", type=str, default="default")
    parser.add_argument("--runs", type=str, default="runs")
    parser.add_class_arguments(TuneOptions, "tune", instantiate=False)
    parser.add_class_arguments(LlamaFoam, "model", instantiate=False, skip={"seed"})
    parser.add_class_arguments(TextData, "data", instantiate=False, skip={"seed", "vocab_size"})
    parser.add_class_arguments(
        Trainer,
        "trainer",
        instantiate=False,
        fail_untyped=False,
        skip={"logger", "default_root_dir"},
    )
    if command in ("fit", "validate", "generate", "export"):
        needed = command != "fit"
        kind = str if needed else str | None
        parser.add_argument("--ckpt_path", type=kind, required=needed)
    if command == "plan":
        parser.add_argument("--format", choices=["table", "json"], default="table")
        parser.add_argument("--uniform_level", "--uniform-level", type=int | None, default=None)
    if command == "generate":
        parser.add_argument("--prompt", type=str, default="")
        parser.add_argument("--max_new_tokens", type=int, default=200)
        parser.add_argument("--temperature", type=float, default=0.8)
    if command == "export":
        parser.add_argument("--output", type=str, required=True)
    return parser


def _resolved(parser: "ArgumentParser", settings: "Namespace") -> str:
    """Write the settings that every command shares, as YAML."""
    shared = settings.clone()
    for key in ("ckpt_path", "format", "uniform_level", "prompt", "max_new_tokens"):
        shared.pop(key, None)
    for key in ("config", "temperature", "output"):
        shared.pop(key, None)
    return str(parser.dump(shared, skip_validation=True))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _quieten() -> None:
    """Keep Lightning's tips off the terminal; what matters we say ourselves."""
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _job(settings: "Namespace") -> "Job":
    from foam_lightning.job import Job

    model = settings.model.as_dict()
    return Job(
        model=model,
        data={**settings.data.as_dict(), "vocab_size": model["vocab_size"]},
        trainer=settings.trainer.as_dict(),
        seed=settings.seed_everything,
    )


# ---- commands


def _plan(settings: "Namespace") -> None:
    from rich.console import Console

    from foam_lightning.errors import InfeasibleBudgetError
    from tuner.fitting import Fitting
    from tuner.report import plan_json, plan_table

    job, budget = _job(settings), settings.memory_budget
    if budget is None and settings.uniform_level is None:
        raise ConfigError("plan needs --memory-budget SIZE, or --uniform-level L to account for")
    fitting = Fitting(job, budget or sys.maxsize)
    refusal = None
    if settings.uniform_level is not None:
        plan = job.plan_at(settings.uniform_level)
    else:
        try:
            plan = fitting.untuned()
        except InfeasibleBudgetError as error:
            plan, refusal = fitting.minimum.plan, error
    account = fitting.accountant.account(plan)
    minimum = None if budget is None else fitting.minimum.account.peak_bytes
    if settings.format == "json":
        print(plan_json(plan, account, budget, minimum))
    else:
        Console().print(plan_table(plan, account, budget, minimum))
    if refusal is not None:
        raise refusal
    if budget is not None:
        fitting.check(plan)


def _tune(settings: "Namespace") -> None:
    job = _job(settings)
    if settings.memory_budget is None:
        raise ConfigError("tune needs --memory-budget SIZE, such as 24GB")
    folder = _open_folder(settings)
    tuned = _tuned(settings, job, folder)
    print(f"plan    {folder.plan}: {tuned.outcome.reason}")
    print(f"report  {folder.tuning / 'report.md'}")
    print("next    the same command with fit instead of tune")


def _fit(settings: "Namespace") -> None:
    from foam_lightning.plan import FoldPlan
    from foam_lightning.training import train

    job = _job(settings)
    given = None if settings.fold_plan is None else FoldPlan.load(Path(settings.fold_plan))
    if given is not None:
        job.new_module().follow(given)  # refuse another model's plan before a folder is made
    folder = _open_folder(settings)
    tuned: Tuned | None = None
    if given is None and settings.memory_budget is not None:
        tuned = _tuned(settings, job, folder)
        plan, predicted = tuned.plan, tuned.account.peak_bytes
    else:
        plan = given or job.plan_at(job.model["level"])
        predicted = _predicted(job, plan, settings.memory_budget)
        plan.save(folder.plan)
    print(f"training {job.max_steps} steps in {folder.path}, predicted peak {in_words(predicted)}")
    trained = train(
        job,
        plan,
        folder,
        predicted_bytes=predicted,
        pictures=tuned.pictures if tuned else None,
        ckpt_path=None if settings.ckpt_path is None else Path(settings.ckpt_path),
    )
    summary = _sum_up(folder, job, predicted, tuned, trained)
    print(_last_words(folder, summary))


def _validate(settings: "Namespace") -> None:
    import math

    from foam_lightning.checkpoint import folder_of, load_module
    from foam_lightning.training import validate

    path = Path(settings.ckpt_path)
    module = load_module(path)
    job = _job(settings)
    tokenizer = folder_of(path).tokenizer
    if job.data["tokenizer"] is None and tokenizer.is_dir():
        job = _with_tokenizer(job, str(tokenizer))
    plan = module.plan
    assert plan is not None
    data = job.new_data(plan.levers)
    trainer = job.new_trainer(plan.levers, [], logger=False, enable_checkpointing=False)
    loss, num_tokens = validate(trainer, module, data)
    print(f"loss {loss:.4f} nats, perplexity {math.exp(loss):.2f}, over {num_tokens} tokens")


def _generate(settings: "Namespace") -> None:
    import torch
    from transformers import TextStreamer

    from foam_lightning.checkpoint import load_module, load_tokenizer

    path = Path(settings.ckpt_path)
    module = load_module(path)
    tokenizer = load_tokenizer(path)
    torch.manual_seed(settings.seed_everything)
    # An empty prompt starts a document, which is where one ended in training.
    prompt = settings.prompt or tokenizer.eos_token
    module.eval()
    writer: Any = module.model
    writer.generate(
        **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or None,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


def _export(settings: "Namespace") -> None:
    from foam_lightning.checkpoint import load_module, load_tokenizer
    from foam_lightning.model import save

    path, output = Path(settings.ckpt_path), Path(settings.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder; choose another")
    module = load_module(path)
    assert module.model is not None
    save(module.model, load_tokenizer(path), output)
    print(f"wrote {output}; load it with AutoModelForCausalLM.from_pretrained({str(output)!r})")


# ---- parts of fit


def _open_folder(settings: "Namespace") -> "RunFolder":
    from foam_lightning.run_folder import RunFolder, write_text

    folder = RunFolder.open(Path(settings.runs), settings.name, settings.resolved)
    if settings.fold_plan is None and settings.memory_budget is None:
        resolved = settings.resolved
    else:
        resolved = settings.resolved.replace("fold_plan: null", f"fold_plan: {folder.plan}")
    write_text(folder.config, resolved)
    return folder


def _tuned(settings: "Namespace", job: "Job", folder: "RunFolder") -> "Tuned":
    from tuner.pipeline import tune
    from tuner.run import TuneOptions

    return tune(job, settings.memory_budget, folder, TuneOptions(**settings.tune.as_dict()))


def _predicted(job: "Job", plan: "FoldPlan", budget: ByteSize | None) -> int:
    from tuner.fitting import Fitting

    fitting = Fitting(job, budget or sys.maxsize)
    fitting.check(plan)
    return fitting.accountant.account(plan).peak_bytes


def _with_tokenizer(job: "Job", tokenizer: str) -> "Job":
    from dataclasses import replace

    return replace(job, data={**job.data, "tokenizer": tokenizer})


def _sum_up(
    folder: "RunFolder", job: "Job", predicted: int, tuned: "Tuned | None", trained: Any
) -> dict[str, Any]:
    from foam_lightning.run_folder import write_json
    from foam_lightning.training import versions

    outcome = tuned.outcome if tuned else None
    summary = {
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": trained.measured_peak_bytes,
        "reference_loss": outcome.loss_of("reference") if outcome else None,
        "tuned_loss": outcome.winner.run.loss if outcome else None,
        "uniform_loss": outcome.loss_of("uniform") if outcome else None,
        "final_validation_loss": trained.final_validation_loss,
        "validation_tokens": trained.validation_tokens,
        "tokens_per_second": trained.tokens_per_second,
        "versions": versions(),
        "seed": job.seed,
    }
    write_json(folder.summary, summary)
    return summary


def _last_words(folder: "RunFolder", summary: dict[str, Any]) -> str:
    import math

    loss = summary["final_validation_loss"]
    return (
        f"done: validation loss {loss:.4f} nats, perplexity {math.exp(loss):.2f}\n"
        f"  figures     {folder.summary}\n"
        f"  model       {folder.hf}\n"
        f"  curves      tensorboard --logdir {folder.path}\n"
        f"  write text  python cli.py generate --ckpt_path {folder.last_checkpoint} "
        '--prompt "def "'
    )


if __name__ == "__main__":
    sys.exit(main())
