"""Errors a person can act on: one line with what was given, what is allowed, what to do."""

from foam_lightning.units import ByteSize, at_least, in_words

_MOST_CHARACTERS = 1200  # of an error; a name that is repeated in it may be far longer


class FoamError(Exception):
    """The base of every error that the command line prints as one line.

    Attributes:
        exit_code: What the process exits with: 2 for bad usage.
    """

    exit_code = 2


class ConfigError(FoamError):
    """A setting is missing, unknown, or contradicts another one."""


class DataError(FoamError):
    """The training text cannot be read, or is not enough."""


class PlanError(FoamError):
    """A fold plan cannot be read, or was made for another model."""


class CheckpointError(FoamError):
    """A checkpoint or model folder cannot be read or written, or does not match the run."""


class FellBackError(FoamError):
    """Memory ran out, and the run folder says what to go on with: the same command does."""

    exit_code = 4


class StorageError(FoamError):
    """A disk, a file or a process that reads one failed under a command; it can be repeated."""

    exit_code = 5


class BusyError(FoamError):
    """Another process is at work in the folder."""

    exit_code = 6


class DivergedError(FoamError):
    """Training stopped: losses or gradients are not finite, or spike, beyond the limit."""

    exit_code = 7


class InfeasibleBudgetError(FoamError):
    """No plan fits the budget, with every lever pulled, or a plan that was given does not.

    Args:
        budget_bytes: What was asked for.
        minimum_bytes: The smallest budget that would work; said rounded up, so that it works.
        binding: The largest term of the peak at that minimum, such as "gradients".
        breakdown: The terms of that minimum, in bytes.
        subject: What needs so much.
    """

    exit_code = 3

    def __init__(
        self,
        budget_bytes: int,
        minimum_bytes: int,
        binding: str,
        breakdown: dict[str, int],
        subject: str = "with every lever pulled this model",
    ) -> None:
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.binding = binding
        self.breakdown = breakdown
        terms = ", ".join(
            f"{name.replace('_', ' ')} {in_words(size)}" for name, size in breakdown.items() if size
        )
        needed = at_least(minimum_bytes)
        super().__init__(
            f"a budget of {ByteSize(budget_bytes)} is too small: {subject} needs {needed} "
            f"({terms}); the largest term is {binding.replace('_', ' ')}; lower data.batch_size, "
            f"choose a smaller model, or raise --memory-budget to at least {needed}"
        )


def first_line(error: BaseException) -> str:
    """Give what another library says, as far as it goes into a line of ours."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def in_one_line(error: BaseException) -> str:
    """Give what an error says without line breaks, which names in files may hold, nor endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."
