"""How all kernels, for CPUs and for GPUs, number the dtypes of weights and scales."""

import torch

FLOATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
