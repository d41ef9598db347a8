"""Deformable attention over feature maps, one file per backend.

`ms_deform_attn` sums bilinear samples whose locations and weights are given. `mmfs_attention` is MMFS between its
projections: it predicts locations and weights from the query, applies a softmax with the ignore token, and samples.
"""

import functools
import importlib.util
import logging
import os

import torch

from . import dense, eager, embedding_bag, xformers
from .bilinear import pad_levels
from .locations import locations_and_weights

__all__ = ["BACKENDS", "MMFS_BACKENDS", "mmfs_attention", "ms_deform_attn", "pad_levels", "select_backend"]

ENVIRONMENT = "MMI_MMFS_BACKEND"  # forces one of MMFS_BACKENDS, for every tensor
CHUNK_SIZE = 2**20  # sampling locations at a time on the CPU: larger tensors get fresh pages from the system each time
log = logging.getLogger(__name__)


def _triton(name: str):
    def run(*args):
        from . import triton_kernels

        return getattr(triton_kernels, name)(*args)

    return run


BACKENDS = {
    "eager": eager.ms_deform_attn,
    "embedding_bag": embedding_bag.ms_deform_attn,
    "dense": dense.ms_deform_attn,
    "triton": _triton("ms_deform_attn"),
}
MMFS_BACKENDS = (*BACKENDS, "xformers")


def ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights, backend: str | None = None):
    """Multi-scale deformable attention over several images (`MSDeformAttnFunction`).

    Computes the sum over p, l, k of `attention_weights * value[p, l]` at `sampling_locations`. Locations outside a map
    count as zero.

    Args:
        value: `(N, P, H, S', D)`, from `pad_levels`.
        spatial_shapes: `(h, w)` of each level, without borders.
        sampling_locations: `(N, Q, H, P, L, K, 2)`, x then y, in cells of the level; cell centers are whole numbers.
        attention_weights: `(N, Q, H, P, L, K)`.
        backend: A name in BACKENDS; None selects the fastest.

    Returns:
        `(N, Q, H * D)`.
    """
    backend = backend or select_backend(value, sampling_locations, BACKENDS)
    return BACKENDS[backend](value, spatial_shapes, sampling_locations, attention_weights)


def mmfs_attention(
    value,
    spatial_shapes,
    scale_ratios,
    query_terms,
    relpos_table,
    image_relpos,
    reference_points,
    ignore_token,
    backend: str | None = None,
):
    """Core of MMFS: samples every image at predicted locations and averages the samples with softmax weights.

    Args:
        value: `(N, P, H, S', D)`, from `pad_levels`.
        spatial_shapes: `(h, w)` of each level, without borders.
        scale_ratios: Cells of each level that an offset of 1 spans.
        query_terms: `(N, Q, E)`, linear in the query: H * K offsets (x, y), then H * L * K logits.
        relpos_table: `(positions, E)`, what each relative position adds to `query_terms`.
        image_relpos: int64 `(N, 1 or Q, P)`, relative position of each image: 1 the newest visible, 0 not visible.
        reference_points: `(1 or Q, 2)`, x and y in [0, 1].
        ignore_token: `(H, D)`, the value of a sample of logit 0 that belongs to no image.
        backend: A name in MMFS_BACKENDS; None selects the fastest.

    Returns:
        `(N, Q, H * D)`.
    """
    backend = backend or select_backend(value, query_terms)
    geometry = value, spatial_shapes, scale_ratios
    if backend == "triton":
        from . import triton_kernels

        return triton_kernels.mmfs_attention(
            *geometry, query_terms, relpos_table, image_relpos, reference_points, ignore_token
        )
    run = _from_gather(BACKENDS[backend]) if backend != "xformers" else xformers.mmfs_attention
    if backend == "embedding_bag" and not torch.is_grad_enabled():
        run = embedding_bag.mmfs_attention
    step = _chunk_length(value, scale_ratios, query_terms)
    if torch.is_grad_enabled() or step >= query_terms.shape[1]:
        return run(*geometry, query_terms, relpos_table, image_relpos, reference_points, ignore_token)
    chunks = []
    for start in range(0, query_terms.shape[1], step):
        part = slice(start, start + step)
        relpos = image_relpos[:, part] if image_relpos.shape[1] > 1 else image_relpos
        points = reference_points[part] if len(reference_points) > 1 else reference_points
        chunks.append(run(*geometry, query_terms[:, part], relpos_table, relpos, points, ignore_token))
    return torch.cat(chunks, dim=1)


def select_backend(value, query, choices=MMFS_BACKENDS) -> str:
    """The fastest backend for these tensors (`python -m benchmarks` measures them).

    On CUDA: Triton where it imports, compiles and the card supports the dtype, else xFormers where its operator accepts
    the tensors, else eager. The environment variable MMI_MMFS_BACKEND forces one.
    """
    forced = os.environ.get(ENVIRONMENT)
    if forced in choices:
        return forced
    learning = torch.is_grad_enabled() and (value.requires_grad or query.requires_grad)
    if value.device.type == "cpu":
        return "dense" if learning else "embedding_bag"
    if learning:
        return "eager"
    for name, is_usable in (("triton", _triton_runs), ("xformers", _xformers_runs)):
        if name in choices and is_usable(value.device, value.dtype, value.shape[-1]):
            return name
    return "eager"


@functools.cache
def _triton_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the Triton kernels give the eager result on a few values; tried once per device, dtype and head width."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return _try("Triton", _triton("ms_deform_attn"), "ms_deform_attn", device, dtype, head_dim)


@functools.cache
def _xformers_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether xFormers' operator accepts these tensors; tried once per device, dtype and head width."""
    if device.type != "cuda" or importlib.util.find_spec("xformers") is None:
        return False
    return _try("xFormers", xformers.mmfs_attention, "mmfs_attention", device, dtype, head_dim)


def _try(label: str, run, function: str, device, dtype, head_dim: int) -> bool:
    """Whether a backend reproduces the eager one on a tiny input; logs one line if not."""
    value = torch.ones(1, 1, 1, 16, head_dim, device=device, dtype=dtype)
    locations = torch.zeros(1, 1, 1, 1, 1, 1, 2, device=device)
    weights = torch.ones(1, 1, 1, 1, 1, 1, device=device, dtype=dtype)
    args = value, [(2, 2)], locations, weights
    if function == "mmfs_attention":
        terms, relpos = torch.zeros(1, 1, 3, device=device, dtype=dtype), torch.ones(1, 1, 1, device=device).long()
        table, points = torch.zeros(2, 3, device=device, dtype=dtype), torch.full((1, 2), 0.5, device=device)
        args = value, [(2, 2)], (1.0,), terms, table, relpos, points, value.new_ones(1, head_dim)
    try:
        out = run(*args)
        if torch.allclose(out.float(), torch.ones_like(out.float()), atol=1e-2):
            return True
        reason = "its result is wrong"
    except Exception as error:  # no compiler, an old card, a dtype it does not have: whatever its libraries raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    log.warning("%s is not used for %s on %s: %s", label, dtype, device, reason)
    return False


def _from_gather(gather):
    """`mmfs_attention` on top of one backend's `ms_deform_attn`."""

    def run(*args):
        value, spatial_shapes, *_, ignore_token = args
        locations, weights, ignore_weight = locations_and_weights(*args[1:-1], len(ignore_token))
        out = gather(value, spatial_shapes, locations, weights)
        return torch.addcmul(out.view(*ignore_weight.shape[:3], -1), ignore_weight, ignore_token).flatten(2)

    return run


def _chunk_length(value, scale_ratios, query_terms) -> int:
    """Queries to process at a time."""
    n, p = value.shape[:2]
    samples = query_terms.shape[-1] // (2 + len(scale_ratios)) * len(scale_ratios)  # of one query, one image, all heads
    if value.device.type == "cpu":
        return max(1, CHUNK_SIZE // max(1, n * p * samples))
    return max(1, eager.CHUNK_SIZE // max(1, n * p * samples * 4 * value.shape[-1]))
