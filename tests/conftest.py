"""One thread: the tests' tensors are small, and spinning threads on a shared machine cost more than they bring."""

import torch
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
torch.set_num_threads(1)
