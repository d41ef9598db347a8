"""MMFS attached to diffusers' U-Net: hooks on its up blocks, while an image is generated."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from ..errors import SettingError
from ..models.unet_synchronizer import MMFSNet, UNetImageValues


@dataclass
class _Enabled:
    value: bool = True


@contextlib.contextmanager
def attach_mmfs(unet, mmfs: MMFSNet, image_values: UNetImageValues, scale: float = 1.0):
    """Adds MMFS to the U-Net's middle block and skips within a `with`; `value` of the yielded object switches it.

    Raises:
        SettingError: If the U-Net has another number of skips than there are MMFS blocks.
    """
    enabled = _Enabled()
    counts = [len(block.resnets) for block in unet.up_blocks]
    num_skips = len(mmfs.mmfs_down_blocks)
    if sum(counts) != num_skips:
        raise SettingError(f"The U-Net has {sum(counts)} skips, but the synchronizer has MMFS blocks for {num_skips}.")

    def hook(index: int, first_skip: int):
        def before_up_block(_, args, kwargs):
            if not enabled.value:
                return None
            kwargs = dict(kwargs)
            if index == 0:  # its input is the middle block's output
                kwargs["hidden_states"] = mmfs.add_residual(num_skips, kwargs["hidden_states"], image_values, scale)
            skips = enumerate(kwargs["res_hidden_states_tuple"], first_skip)
            kwargs["res_hidden_states_tuple"] = tuple(
                mmfs.add_residual(i, skip, image_values, scale) for i, skip in skips
            )
            return args, kwargs

        return before_up_block

    handles, remaining = [], num_skips
    for index, (block, count) in enumerate(zip(unet.up_blocks, counts)):
        remaining -= count
        handles.append(block.register_forward_pre_hook(hook(index, remaining), with_kwargs=True))
    try:
        yield enabled
    finally:
        for handle in handles:
            handle.remove()
