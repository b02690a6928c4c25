"""Make the index by which `revwire convert` knows an architecture by its tensors.

    python -m benchmarks.make_index

Every model of the installed timm is built twice on the meta device. Run it when timm has new models; about ten minutes.
"""

from __future__ import annotations

import gc
import pickle
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path

import timm
from rich.progress import track

from revwire.checkpoint.fingerprint import INDEX, Shapes, packed
from revwire.errors import RevwireError
from revwire.timm_variants import Variants


def main() -> None:
    """Build every model and write the index into the package."""
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    found: dict[str, tuple[Shapes, set[str]]] = {}
    for name in track(timm.list_models(), "building"):
        variants = Variants(name)
        try:
            found[name] = variants.shapes, variants.flexible
        except RevwireError as error:
            print(f"left out: {error}"[:200])
        gc.collect()
    content = packed(timm.__version__, found)
    Path(str(files("revwire.checkpoint").joinpath(INDEX))).write_bytes(content)
    print(f"{len(found)} architectures, {len(content)} bytes, {time.perf_counter() - start:.0f} s")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
