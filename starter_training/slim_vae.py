"""A slim AutoencoderTiny that trains at a sixth of the cost and pads to the stock layout without changing its output.

TAESD has 64 channels and three blocks at every resolution and spends most of its arithmetic on the two largest. Fewer
channels there compute the same as the stock net with the remaining channels zero, and a missing residual block the same
as one with zero weights, because its input has been through a ReLU.
"""

from __future__ import annotations

import torch
from torch import nn

# Channels and residual blocks by resolution, from the image's down to the latents'. The decoder is wider: with 16 and
# 32 channels at the two largest no latents at all reproduced a face.
ENCODER_WIDTHS, ENCODER_BLOCKS = (16, 32, 64, 64), (1, 1, 2, 3)
DECODER_WIDTHS, DECODER_BLOCKS = (32, 48, 64, 64), (1, 3, 3, 3)


def slim_autoencoder(stock: nn.Module) -> nn.Module:
    """Slims a stock AutoencoderTiny in place, with new weights; methods and layer indices stay."""
    _slim(stock.encoder.layers, ENCODER_WIDTHS, ENCODER_BLOCKS)
    _slim(stock.decoder.layers, DECODER_WIDTHS[::-1], DECODER_BLOCKS[::-1])
    return stock


def pad_to_stock(stock: nn.Module, slim: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pads the state dict of a slim autoencoder with zeros to that of the stock one; both compute the same."""
    padded = {name: torch.zeros_like(tensor) for name, tensor in stock.state_dict().items()}
    for name, tensor in slim.items():
        padded[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


def crop_to_slim(slim: nn.Module, stock: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Crops the state dict of a stock autoencoder to that of a slim one, the inverse of `pad_to_stock`."""
    shapes = {name: tensor.shape for name, tensor in slim.state_dict().items()}
    return {name: stock[name][tuple(slice(0, size) for size in shape)].contiguous() for name, shape in shapes.items()}


def _slim(layers: nn.Sequential, widths: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    conv_indices = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    # Channels before and after each convolution; between two convolutions are the blocks of one resolution.
    channels = [layers[conv_indices[0]].in_channels, *widths, layers[conv_indices[-1]].out_channels]
    for number, index in enumerate(conv_indices):
        layers[index] = _conv(layers[index], channels[number], channels[number + 1])
    for number, (first, last) in enumerate(zip(conv_indices, conv_indices[1:])):
        residual = [i for i in range(first + 1, last) if not isinstance(layers[i], (nn.ReLU, nn.Upsample))]
        for count, index in enumerate(residual):
            if count < blocks[number]:
                _slim_block(layers[index], widths[number])
            else:
                layers[index] = nn.Identity()


def _slim_block(block: nn.Module, width: int) -> None:
    for index, layer in enumerate(block.conv):
        if isinstance(layer, nn.Conv2d):
            block.conv[index] = _conv(layer, width, width)
    nn.init.zeros_(block.conv[-1].weight)  # starts as the identity: a deep net without norms then learns at once


def _conv(stock: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, 3, stride=stock.stride, padding=1, bias=stock.bias is not None)
    nn.init.kaiming_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
