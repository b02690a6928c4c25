"""Small checkpoints, and what their tests do with them again and again."""

import json
import os
from unittest import mock

import torch
from hypothesis import HealthCheck, settings
from safetensors import safe_open
from safetensors.torch import save_file

from revwire import checkpoint
from revwire.checkpoint import conversion
from tests.helpers.vits import NAME, SMALL_VIT, small_vit

ARGS = {**SMALL_VIT, "depth": 2, "num_classes": 10}
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def vit(**args):
    return small_vit(**{**ARGS, **args})


def saved_vit(path, **more):
    """A checkpoint that says what it is, as examples/digits writes it."""
    metadata = {"format": "pt", "architecture": NAME, "model_args": json.dumps(ARGS), **more}
    save_file(vit().state_dict(), path, metadata)
    return path


def convert(path, out=None, **options):
    """Without verification and measurement, which have tests of their own and take most of the time."""
    with mock.patch.object(conversion, "_measure", return_value=None):
        return checkpoint.convert(path, out, **{"verify": False, **options})


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_bits(left, right):
    """Equal names, dtypes, shapes and bytes; NaNs and negative zeros included."""

    def of(tensor):
        return tensor.contiguous().view(-1).view(torch.uint8)

    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and of(left[k]).equal(of(right[k]))
        for k in left
    )


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
