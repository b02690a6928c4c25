"""Make the indexes by which `revwire convert` knows an architecture by its tensors.

    python -m benchmarks.make_index timm torchvision

Every model of the installed library is built twice on the meta device. Run it when the library has new models; timm
takes about ten minutes, torchvision two.
"""

from __future__ import annotations

import gc
import time
import warnings
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import timm
import typer
from rich.progress import track

from revwire.checkpoint.fingerprint import index_name, packed
from revwire.errors import RevwireError
from revwire.libraries import INDEXED, Architecture, torchvision_models, variants

if TYPE_CHECKING:
    from revwire.libraries.comparison import Shapes


def main(
    libraries: Annotated[list[str] | None, typer.Argument(help="Which; all if none is named.")] = None,
) -> None:
    """Build every model and write the indexes into the package.

    Example: python -m benchmarks.make_index torchvision
    """
    if unknown := set(libraries or ()) - set(INDEXED):
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(INDEXED)}")
    warnings.simplefilter("ignore")
    for library in libraries or INDEXED:
        start = time.perf_counter()
        found: dict[str, tuple[Shapes, set[str]]] = {}
        for name in track(timm.list_models() if library == "timm" else torchvision_models.names(), library):
            others = variants(Architecture(name, {}, library))
            try:
                found[name] = others.shapes, others.flexible
            except RevwireError as error:
                print(f"left out: {error}"[:200])
            gc.collect()
        content = packed(import_module(library).__version__.partition("+")[0], found)
        Path(str(files("revwire.checkpoint").joinpath(index_name(library)))).write_bytes(content)
        print(
            f"{library}: {len(found)} architectures, {len(content)} bytes, {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    typer.run(main)
