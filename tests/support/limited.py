"""The command line on a device that refuses what would go above a limit.

    python -m tests.support.limited LIMIT_BYTES FROM [--die] [--gpu] COMMAND ...

The limit holds from the moment that the file FROM exists; a run that is refused memory after its
first checkpoint has something to resume from. With --die the process is killed where it would
restart. With --gpu the limit is of what torch reserves on a real GPU, which refuses it itself.
"""

import os
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import cli


class LimitedDevice(TorchDispatchMode):
    """Count the bytes of every storage while active, and refuse one that would exceed a limit."""

    def __init__(self, limit: Callable[[], float]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0
        self._limit = limit
        self._alive: dict[int, weakref.ref[Any]] = {}  # by address

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            return
        if self.num_bytes + size > self._limit():
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has a capacity of "
                f"{self._limit()} bytes of which {self._limit() - self.num_bytes} are free."
            )

        def free(_: object) -> None:
            del self._alive[address]
            self.num_bytes -= size

        self._alive[address] = weakref.ref(storage, free)
        self.num_bytes += size


def limited(limit: Callable[[], float]) -> Any:
    """Return a context in which every `Trainer.fit` runs on such a device."""
    unlimited = Trainer.fit

    def fit(*args: Any, **kwargs: Any) -> None:
        with LimitedDevice(limit):
            unlimited(*args, **kwargs)

    return patch.object(Trainer, "fit", fit)


def limited_gpu(limit_bytes: int, start: Path) -> Any:
    """Return a context in which a GPU gives no more, from the first checkpoint on."""
    save_checkpoint = Trainer.save_checkpoint

    def limit() -> None:
        if start.exists():
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.empty_cache()  # what is cached would be used again without asking
            torch.cuda.set_per_process_memory_fraction(limit_bytes / total)

    def save_and_limit(*args: Any, **kwargs: Any) -> None:
        save_checkpoint(*args, **kwargs)
        limit()

    limit()
    return patch.object(Trainer, "save_checkpoint", save_and_limit)


def main() -> int:
    limit_bytes, start, *words = sys.argv[1:]
    flags = [word for word in words[:2] if word in ("--die", "--gpu")]
    words = words[len(flags) :]
    if "--die" in flags:
        os.execv = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    sys.argv = ["cli.py", *words]
    if "--gpu" in flags:
        context = limited_gpu(int(limit_bytes), Path(start))
    else:
        context = limited(lambda: int(limit_bytes) if Path(start).exists() else float("inf"))
    with context:
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
