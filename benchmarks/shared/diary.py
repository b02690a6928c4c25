"""Results of a sweep as they come, one JSON object a line: what one that was stopped goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Diary:
    """The file of a sweep that is under way.

    Args:
        path: Where it is.
        fresh: Whether to begin a new one.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        if fresh:
            path.unlink(missing_ok=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was written, but for a line that was being written when the sweep was stopped."""
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def write(self, row: Any) -> None:
        """Add one row, a dataclass."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
