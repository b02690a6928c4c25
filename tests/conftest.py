"""One thread: the tests' tensors are small, and spinning threads on a shared machine cost more than they bring."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start, too

import pytest
import torch
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
torch.set_num_threads(1)

TESTS = Path(__file__).parent
SLOW_ROOMS = [TESTS / "integrations", TESTS / "re2tal"]


def pytest_addoption(parser):
    parser.addoption("--default-device", help="Where tests make tensors that they put nowhere: cuda, ...")


@pytest.fixture(autouse=True)
def _default_device(request):
    if (device := request.config.getoption("--default-device")) is None:
        yield
        return
    with torch.device(device):
        yield


def pytest_ignore_collect(collection_path, config):
    """What is slow as a whole is not even imported where nothing slow is asked for."""
    return True if config.option.markexpr == "not slow" and collection_path in SLOW_ROOMS else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(room in item.path.parents for room in SLOW_ROOMS):
            item.add_marker(pytest.mark.slow)
