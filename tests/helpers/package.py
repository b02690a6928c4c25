"""The package as it is published."""

from tests.helpers.programs import python

PATTERNS = {"wheel": "*.whl", "sdist": "*.tar.gz"}


def built(kind, folder):
    """The wheel or the sdist of a copy of the checkout, by the build backend alone: nothing is downloaded."""
    call = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    done = python("-c", call, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Deprecat" not in done.stderr
    (file,) = (folder / "dist").glob(PATTERNS[kind])
    return file
