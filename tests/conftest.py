"""One thread: the tests' tensors are small, and spinning threads on a shared machine cost more than they bring."""

import torch

torch.set_num_threads(1)
