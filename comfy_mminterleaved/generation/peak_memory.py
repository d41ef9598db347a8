"""The most bytes of tensors that a block of code holds at once, on any device."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts storages that operations make while it is entered: `peak`, and `now` those that still live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if (
                isinstance(tensor, torch.Tensor)
                and not tensor.is_meta
                and (key := _key(tensor)) not in known | self._live
            ):
                storage = tensor.untyped_storage()
                self._live.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
