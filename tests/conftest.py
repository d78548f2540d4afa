"""One thread: the models are tiny, and contention between threads costs more than it gives."""

import torch

torch.set_num_threads(1)
