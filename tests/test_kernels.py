"""The Triton kernels against the plain gather: run by Triton's interpreter on the CPU, and compiled for CUDA."""

import subprocess
import sys

import pytest
import torch

from comfy_mminterleaved.models import deform_attn as sampling

pytest.importorskip("triton", reason="the triton package is not there; it has no build for this system")
SIZES = ((8, 6), (4, 4), (3, 2))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(n=2, q=5, heads=2, pictures=3, k=3, depth=5, levels=3, per_query=True, dtype=torch.float32):
    """Arguments of `attend`, some pictures hidden from some queries."""
    sizes = SIZES[:levels]
    cells = sum(h * w for h, w in sizes)
    values = sampling.pad_levels(rand(n, pictures, cells, heads, depth), sizes)
    e = heads * k * (2 + levels)
    order = torch.zeros(n, q if per_query else 1, pictures, dtype=torch.long)
    for row, shown in zip(order.flatten(0, 1), rand(order.shape[0] * order.shape[1], pictures, seed=7) < 0.5):
        row[shown] = torch.arange(int(shown.sum()), 0, -1)
    reference = rand(q, 2, seed=4).sigmoid() if per_query else torch.full((1, 2), 0.5)
    said, tables, sink = rand(n, q, e, seed=1) * 2, rand(pictures + 1, e, seed=2), rand(heads, depth, seed=3)
    scales = [2.0, 1.0, 0.5][:levels]
    halves = [t.to(dtype) for t in (values, said, tables, sink)]
    return halves[0], sizes, scales, halves[1], halves[2], order, reference, halves[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine runs the kernels themselves: benchmarks/gpu.py")
class TestInTheInterpreter:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("pictures", [1, 3])
    @pytest.mark.parametrize("levels, k, depth", [(1, 1, 4), (3, 3, 5), (2, 8, 16)])
    @pytest.mark.parametrize("per_query", [False, True])
    def test_attend(self, dtype, pictures, levels, k, depth, per_query):
        full = make(pictures=pictures, levels=levels, k=k, depth=depth, per_query=per_query)
        want = sampling.mmfs_attention(*full, backend="eager")
        given = make(pictures=pictures, levels=levels, k=k, depth=depth, per_query=per_query, dtype=dtype)
        found = sampling.mmfs_attention(*given, backend="triton")
        assert found.dtype == dtype and found.shape == want.shape
        assert (found.float() - want).abs().max() < TOLERANCE[dtype] * want.abs().max() * (1 + 2 * (levels > 1))

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_gather(self, dtype):
        values, sizes = make()[:2]
        points, weights = rand(2, 5, 2, 3, 3, 4, 2, seed=5) * 5 + 2, rand(2, 5, 2, 3, 3, 4, seed=6)
        want = sampling.ms_deform_attn(values, sizes, points, weights, "eager")
        found = sampling.ms_deform_attn(values.to(dtype), sizes, points, weights.to(dtype), "triton")
        assert found.dtype == dtype
        assert (found.float() - want).abs().max() < TOLERANCE[dtype] * want.abs().max()

    def test_queries_that_see_nothing_find_the_sink(self):
        arguments = list(make())
        arguments[5] = torch.zeros_like(arguments[5])
        found = sampling.mmfs_attention(*arguments, backend="triton")
        assert torch.allclose(found, arguments[7].flatten().expand_as(found))


@pytest.mark.parametrize("capability, dtype", [(80, "fp32"), (90, "fp16")])
def test_they_compile_for_cuda(capability, dtype):
    """Down to the card's machine code, which needs no card."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from comfy_mminterleaved.models.deform_attn import triton_kernels as kernels
shared = dict(H=16, L=4, K=8, D=64, BLOCK_M=32, BLOCK_D=64)
for kernel, integers in (
    (kernels._mmfs_kernel, "Q P n_stride p_stride h_stride cell_stride order_n order_q reference_q"),
    (kernels._gather_kernel, "Q P n_stride p_stride h_stride cell_stride"),
):
    types = dict.fromkeys(shared, "constexpr") | dict.fromkeys(integers.split(), "i32")
    types |= {{"image_relpos": "*i64", "reference_points": "*fp32", "levels": "*fp32", "sampling_locations": "*fp32"}}
    signature = {{name: types.get(name, "*{dtype}") for name in kernel.arg_names}}
    constants = {{(kernel.arg_names.index(name),): value for name, value in shared.items()}}
    source = ASTSource(kernel, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", {capability}, 32), options={{"num_warps": 4}})
    assert len(made.asm["cubin"]) > 1000
"""
    import os

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("backend", [b for b in sampling.BACKENDS if b != "triton"])
@pytest.mark.parametrize("per_query", [False, True])
def test_every_way_to_attend_is_the_same(backend, per_query, monkeypatch):
    arguments = make(q=7, per_query=per_query)
    want = sampling.mmfs_attention(*arguments, backend="eager")
    assert torch.allclose(sampling.mmfs_attention(*arguments, backend=backend), want, atol=1e-5)
    monkeypatch.setattr(sampling, "CHUNK_SIZE", 40)  # a query or two at a time
    with torch.no_grad():
        assert torch.allclose(sampling.mmfs_attention(*arguments, backend=backend), want, atol=1e-5)
