"""The same as Triton kernels: nothing but what is found is written to memory. For CUDA; without gradients.

One program finds what one head of one query finds. A picture's samples are read level by level, corner by corner, and
the softmax goes over pictures as it goes along.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(values) -> bool:
    """Whether the kernels can run on these values."""
    return values.is_cuda and _installed() and values.dtype in (torch.float16, torch.bfloat16, torch.float32)


def gather(values, sizes, points, weights):
    """`sampling.gather`."""
    from . import triton_kernels as kernels

    return kernels.gather(values, sizes, points, weights)


def attend(values, sizes, scales, said, tables, order, reference, sink):
    """`sampling.attend`."""
    from . import triton_kernels as kernels

    return kernels.attend(values, sizes, scales, said, tables, order, reference, sink)
