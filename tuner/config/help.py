"""The help texts, made before anything slow is imported."""

from tuner.config.options import COMMANDS, options_of


def general_help() -> str:
    """List the commands."""
    rows = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    return (
        "Train LLaMA inside a GPU-memory budget.\n\n"
        "usage: python cli.py COMMAND [options]\n\n"
        f"{rows}\n\n"
        "  python cli.py fit --memory-budget 24GB     a whole run, on a small built-in text\n"
        "  python cli.py COMMAND --help               the options of a command\n"
        "  python cli.py COMMAND --print_config       every setting, with its value\n\n"
        "exit codes: 0 done, 1 an unexpected error, 2 bad usage, 3 the budget is infeasible,\n"
        "4 memory ran out, 5 disk or file error, 6 another process uses the run folder,\n"
        "7 training diverged, 130 or 143 ended by SIGINT or SIGTERM"
    )


def command_help(command: str) -> str:
    """List the options of a command."""
    flags = [
        (f"{option.flag} {option.metavar}", option.help)
        for option in options_of(command)
        if command not in option.unused_by
    ]
    width = max(len(flag) for flag, _ in flags)
    rows = "\n".join(f"  {flag:<{width}}  {text}" for flag, text in flags)
    return (
        f"usage: python cli.py {command} [options]\n\n{COMMANDS[command]}\n\n{rows}\n\n"
        "Every setting of the configuration is an option too, such as --model.lr 0.01;\n"
        f"`python cli.py {command} --print_config` lists them all with their values."
    )
