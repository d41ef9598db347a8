"""A thin AutoencoderTiny: trained at a sixth of the cost, widened to the stock layout without a change of its values.

TAESD's layout has 64 channels and three blocks at every resolution, and most of the arithmetic is spent on the largest
two. A net of fewer channels there is the same function as the stock one with the other channels zero, and a missing
residual block the same as one whose weights are zero (what enters it has been through a ReLU).
"""

from __future__ import annotations

import torch
from torch import nn

# Widths and numbers of residual blocks by resolution, from the picture's down to the latents'. The decoder is wider:
# with 16 and 32 channels at the largest two no latents at all gave a face its features.
ENCODER_WIDTHS, ENCODER_BLOCKS = (16, 32, 64, 64), (1, 1, 2, 3)
DECODER_WIDTHS, DECODER_BLOCKS = (32, 48, 64, 64), (1, 3, 3, 3)


def slim_autoencoder(stock: nn.Module) -> nn.Module:
    """Makes a stock AutoencoderTiny thin, in place, with fresh weights; its methods and its layers' numbers stay."""
    _thin(stock.encoder.layers, ENCODER_WIDTHS, ENCODER_BLOCKS)
    _thin(stock.decoder.layers, DECODER_WIDTHS[::-1], DECODER_BLOCKS[::-1])
    return stock


def pad_to_stock(stock: nn.Module, thin: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of the stock AutoencoderTiny that computes what the thin one does."""
    wide = {name: torch.zeros_like(tensor) for name, tensor in stock.state_dict().items()}
    for name, tensor in thin.items():
        wide[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    return wide


def crop_to_slim(thin: nn.Module, stock: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a thin autoencoder, from that of the stock one that it was `pad_to_stock` to."""
    own = thin.state_dict().items()
    return {name: stock[name][tuple(slice(0, size) for size in tensor.shape)].contiguous() for name, tensor in own}


def _thin(layers: nn.Sequential, widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    convolutions = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    # What enters and leaves each convolution; between one and the next are the blocks of one resolution.
    channels = [layers[convolutions[0]].in_channels, *widths, layers[convolutions[-1]].out_channels]
    for number, at in enumerate(convolutions):
        layers[at] = _convolution(layers[at], channels[number], channels[number + 1])
    for number, (first, last) in enumerate(zip(convolutions, convolutions[1:])):
        residual = [i for i in range(first + 1, last) if not isinstance(layers[i], (nn.ReLU, nn.Upsample))]
        for count, at in enumerate(residual):
            if count < blocks[number]:
                _thin_block(layers[at], widths[number])
            else:
                layers[at] = nn.Identity()


def _thin_block(block: nn.Module, width: int) -> None:
    for at, layer in enumerate(block.conv):
        if isinstance(layer, nn.Conv2d):
            block.conv[at] = _convolution(layer, width, width)
    nn.init.zeros_(block.conv[-1].weight)  # it starts as the identity, and a deep net without norms learns at once


def _convolution(stock: nn.Conv2d, channels: int, out: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, out, 3, stride=stock.stride, padding=1, bias=stock.bias is not None)
    nn.init.kaiming_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
