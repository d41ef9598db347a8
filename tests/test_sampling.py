import pytest
import torch
import torch.nn.functional as F

from comfy_mminterleaved.models import deform_attn as sampling
from comfy_mminterleaved.models.deform_attn import ms_deform_attn as gather_bordered
from comfy_mminterleaved.models.deform_attn.bilinear import pad_levels

SIZES = [(5, 7), (4, 4), (1, 2)]
BACKENDS = [name for name in sampling.BACKENDS if name != "triton"]  # which has test_kernels.py


def gather(values, sizes, *rest):
    return gather_bordered(pad_levels(values, sizes), sizes, *rest)


def make(n=2, q=3, h=2, p=2, k=4, d=3, dtype=torch.float64, spread=6.0):
    generator = torch.Generator().manual_seed(0)
    cells = sum(a * b for a, b in SIZES)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    values = rand(n, p, cells, h, d)
    points = rand(n, q, h, p, len(SIZES), k, 2) * spread + 2
    return values, points, rand(n, q, h, p, len(SIZES), k)


def by_grid_sample(values, points, weights):
    """The reference's own route (`ms_deform_attn_core_pytorch`), one map at a time."""
    n, p, _, h, d = values.shape
    q = points.shape[1]
    out = torch.zeros(n, q, h, d, dtype=values.dtype)
    for i in range(p):
        start = 0
        for level, (height, width) in enumerate(SIZES):
            image = values[:, i, start : start + height * width].permute(0, 2, 3, 1).reshape(n * h, d, height, width)
            start += height * width
            at = points[:, :, :, i, level].transpose(1, 2).reshape(n * h, q, -1, 2)
            grid = (at + 0.5) / torch.tensor([width, height], dtype=at.dtype) * 2 - 1
            found = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            weight = weights[:, :, :, i, level].transpose(1, 2).reshape(n * h, 1, q, -1)
            out += (found * weight).sum(-1).view(n, h, d, q).permute(0, 3, 1, 2)
    return out.flatten(2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_the_weighted_grid_sample(backend):
    values, points, weights = make()
    found = gather(values, SIZES, points, weights, backend)
    assert torch.allclose(found, by_grid_sample(values, points, weights), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_finite_differences(backend):
    values, points, weights = make(n=1, q=2, h=2, p=2, k=2, d=2, spread=1.5)
    inputs = [t.requires_grad_() for t in (values, points, weights)]
    assert torch.autograd.gradcheck(lambda v, p, w: gather(v, SIZES, p, w, backend), inputs, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_outside_counts_as_nothing(backend):
    values, points, weights = make(dtype=torch.float32)
    for far in (1e9, -1e9, 1e30):
        assert gather(values, SIZES, torch.full_like(points, far), weights, backend).abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_and_near(backend, dtype):
    values, points, weights = make(dtype=torch.float32)
    want = gather(values, SIZES, points, weights, "eager")
    found = gather(values.to(dtype), SIZES, points, weights.to(dtype), backend)
    assert found.dtype == dtype and (found.float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("pictures", [1, 3])
@torch.no_grad()
def test_attending_in_few_passes_is_attending(dtype, bar, per_query, pictures):
    generator = torch.Generator().manual_seed(1)
    n, q, h, k, d = 2, 6, 2, 3, 4
    e = h * k * (2 + len(SIZES))
    values = pad_levels(torch.randn(n, pictures, sum(a * b for a, b in SIZES), h, d, generator=generator), SIZES)
    order = torch.arange(pictures, 0, -1).repeat(n, q if per_query else 1, 1)
    order[0, 0] = 0  # nothing is seen there
    said, tables, sink = (torch.randn(*s, generator=generator) for s in ((n, q, e), (pictures + 1, e), (h, d)))
    said = said * 4
    reference = torch.rand(q if per_query else 1, 2, generator=generator)

    def attend(dtype, way):
        halves = [t.to(dtype) for t in (values, said, tables, sink)]
        scales = [2.0, 1.0, 0.5]
        return sampling.mmfs_attention(
            halves[0], SIZES, scales, halves[1], halves[2], order, reference, halves[3], backend=way
        )

    want, found = attend(torch.float32, "eager"), attend(dtype, "embedding_bag")
    assert found.dtype == dtype and (found.float() - want).abs().max() < bar * want.abs().max()
    said[1, 2] = float("nan")
    assert attend(dtype, "embedding_bag")[0].isfinite().all()  # and the others are not harmed
