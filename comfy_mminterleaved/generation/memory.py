"""Memory in bytes, beside the weights, that encoding, prefilling, continuing and drawing a story take.

A host that manages memory asks before it starts. `tests/test_memory.py` compares these to what the code allocates, at
several widths.
"""

from __future__ import annotations

from ..config import LlamaMMFSConfig, SynchronizerConfig, VisualTokenizerConfig
from ..models.deform_attn import CHUNK_SIZE
from ..models.llama_mmfs import CACHE_STEP
from ..models.refiner import RefinerConfig
from .decoding import MAX_OPTION_TOKENS
from .text import PIECE

_FLOAT32 = 4  # bytes; logits and attention weights are in float32 whatever the weights are


def encoding_bytes(c: VisualTokenizerConfig, itemsize: int) -> int:
    """Peak of `VisualTokenizer` on one image: its four maps, what they are summed from, and the first convolutions."""
    grid = c.grid_size
    cells = (4 * grid) ** 2 + (2 * grid) ** 2 + grid**2 + (grid // 2) ** 2
    return round((4.1 * cells * c.hidden_size + 0.8 * (8 * grid) ** 2 * c.conv_inplane) * itemsize)


def cache_bytes(
    c: LlamaMMFSConfig, num_tokens: int, num_images: int, itemsize: int, cache_itemsize: int | None = None
) -> int:
    """Of a `PrefixCache`: keys and values, hidden states, and the images projected for every MMFS layer.

    Args:
        cache_itemsize: Of keys and values; None for `itemsize`.
    """
    images = num_images * _num_mmfs_layers(c) * _value_size(c) * itemsize
    keys_and_values = _kv_bytes(c, num_tokens, cache_itemsize or itemsize)
    return keys_and_values + num_tokens * c.hidden_size * itemsize + images


def prefill_bytes(
    c: LlamaMMFSConfig,
    num_tokens: int,
    num_images: int,
    itemsize: int,
    longest_segment: int = PIECE,
    cache_itemsize: int | None = None,
) -> int:
    """Peak of `TextGenerator.prefill` on a story: its cache, and one piece or one MMFS layer's images at work."""
    piece = min(num_tokens, longest_segment, PIECE)
    samples = c.mmfs.n_heads * c.mmfs.n_points * len(c.mmfs.spatial_shapes) * num_images
    forward = piece * (c.hidden_size + 2 * c.intermediate_size) + 14 * min(piece * samples, max(CHUNK_SIZE, samples))
    cells = sum(side * side for side in c.mmfs.spatial_shapes)
    projection = (num_images + 2) * _value_size(c) + 3 * cells * c.mmfs.d_value if num_images else 0
    if cache_itemsize not in (None, itemsize):  # one layer's keys and values in the dtype that is computed in
        forward += _kv_bytes(c, num_tokens, 1) // c.num_hidden_layers
    return cache_bytes(c, num_tokens, num_images, itemsize, cache_itemsize) + max(forward, projection) * itemsize


def refining_bytes(c: RefinerConfig, height: int, width: int) -> int:
    """What refining an image takes, in float32; the most where a quarter of the channels have twice its sides."""
    per_pixel = c.hidden_size * 5 // 2 + 9
    return per_pixel * height * width * _FLOAT32


def dequantization_bytes(c: LlamaMMFSConfig, itemsize: int) -> int:
    """Peak of one quantized layer at work: its weight in the dtype that is computed in, and on the way there."""
    if c.quantization is None:
        return 0
    unpacked = c.hidden_size * c.intermediate_size if c.quantization == "q4_0" else 0  # a byte for each weight
    return c.hidden_size * c.intermediate_size * itemsize + unpacked


def continuation_bytes(
    c: LlamaMMFSConfig, num_tokens: int, new_tokens: int, num_rows: int, itemsize: int, is_given: bool = False
) -> int:
    """Peak of continuing a prefilled story of `num_tokens` by `new_tokens` in each of `num_rows`, beside its cache.

    A single row extends the cache; beams and options have rows of their own behind a shared prefix.

    Args:
        is_given: Whether the new tokens are given (options to score) rather than generated one by one (beams, whose
            rows are reordered at each token).
    """
    logits = 4 * num_rows * c.vocab_size * _FLOAT32
    if num_rows == 1:
        grown = _kv_bytes(c, num_tokens + new_tokens, itemsize) - _kv_bytes(c, num_tokens, itemsize)
        return grown + new_tokens * c.hidden_size * itemsize + logits
    length = min(new_tokens, max(1, MAX_OPTION_TOKENS // num_rows)) if is_given else 1
    weights = 3 * num_rows * length * c.num_attention_heads * (num_tokens + new_tokens) * _FLOAT32
    copies = 1 if is_given else 2
    return copies * num_rows * _kv_bytes(c, new_tokens, itemsize) + weights + logits


def sampling_bytes(
    c: SynchronizerConfig, num_images: int, num_rows: int, latent_size: tuple[int, int], itemsize: int
) -> int:
    """Peak of MMFS at the U-Net while images are drawn: the context images' values, and one block at work.

    Args:
        num_rows: Rows of the U-Net's batch; guidance doubles that of the images.
        latent_size: `(height, width)` of the latents.
    """
    side = c.block_base_shapes[0]
    sizes = [(latent_size[0] * base // side) * (latent_size[1] * base // side) for base in c.block_base_shapes]
    hidden = max(channels * size for channels, size in zip(c.block_channels, sizes)) * num_rows
    if not num_images:
        return 3 * hidden * itemsize
    values = num_images * sum((level + 2) ** 2 for level in c.mmfs.spatial_shapes) * c.mmfs.d_model
    projection = 4 * num_images * sum(level**2 for level in c.mmfs.spatial_shapes) * c.mmfs.d_value
    samples = c.mmfs.n_heads * c.mmfs.n_points * len(c.mmfs.spatial_shapes) * num_images
    positions = sum(channels * size for channels, size in zip(c.block_channels, sizes))
    step = positions + 3 * hidden + 14 * min(num_rows * sizes[0] * samples, max(CHUNK_SIZE, samples))
    return (len(c.block_channels) * values + max(projection, step)) * itemsize


def _kv_bytes(c: LlamaMMFSConfig, num_tokens: int, itemsize: int) -> int:
    width = c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    return 2 * c.num_hidden_layers * width * -(-num_tokens // CACHE_STEP) * CACHE_STEP * itemsize


def _num_mmfs_layers(c: LlamaMMFSConfig) -> int:
    return -(-c.num_hidden_layers // c.mmfs.cross_attention_frequency)


def _value_size(c: LlamaMMFSConfig) -> int:
    """Elements of one image's values in one MMFS layer, borders included (`pad_levels`)."""
    return sum((side + 2) ** 2 for side in c.mmfs.spatial_shapes) * c.mmfs.d_model
