"""Work for several processes: calls that are independent of each other, with progress and a limit on each."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress


class at_most:  # noqa: N801 - reads as a context
    """Raises TimeoutError in the block after so many seconds."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def late(*_: object) -> None:
            raise TimeoutError(f"took more than {self.seconds} s")

        signal.signal(signal.SIGALRM, late)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def _worker() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def in_workers(
    workers: int, calls: list[tuple[Callable[..., Any], tuple[Any, ...]]], progress: Progress, title: str
) -> Iterator[Any]:
    """What the calls return, as they come, from processes of one thread each; first arguments are their names."""
    task = progress.add_task(title, total=len(calls))
    context = multiprocessing.get_context("spawn")
    # not concurrent.futures: there, Python 3.11 waits for ever when a worker has done its share of tasks
    with context.Pool(workers, _worker, maxtasksperchild=50) as pool:
        for key, result in pool.imap_unordered(_called, calls):
            progress.update(task, advance=1, description=f"{title}: {key}")
            yield result


def _called(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> tuple[str, Any]:
    function, args = call
    return args[0], function(*args)
