"""Programs in processes of their own, which import this checkout and its tests from wherever they run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**changed):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **changed}


def python(*arguments, env=None, **options):
    """Run Python with these arguments; what it writes is captured as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=environment(**(env or {})),
        **options,
    )


def started(*arguments):
    """Python with these arguments, to talk to while it runs."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
