"""A small checkpoint as it is, and converted."""

import pytest

from tests.helpers.checkpoints import convert, saved_vit


@pytest.fixture
def weights(tmp_path):
    return saved_vit(tmp_path / "model.safetensors", dataset="digits")


@pytest.fixture(scope="session")
def rewired(tmp_path_factory):
    """Not to be changed."""
    return convert(saved_vit(tmp_path_factory.mktemp("rewired") / "model.safetensors")).out
