"""Every backend of MMFS against the eager one; Triton interpreted, and compiled for CUDA; which is selected."""

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch

from comfy_mminterleaved.models import deform_attn

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it has no build for every system
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the triton package is not there")
SIZES = ((8, 6), (4, 4), (3, 2))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(n=2, q=5, heads=2, pictures=3, k=3, depth=5, levels=3, per_query=True, dtype=torch.float32):
    """Arguments of `attend`, some pictures hidden from some queries."""
    sizes = SIZES[:levels]
    cells = sum(h * w for h, w in sizes)
    values = deform_attn.pad_levels(rand(n, pictures, cells, heads, depth), sizes)
    e = heads * k * (2 + levels)
    order = torch.zeros(n, q if per_query else 1, pictures, dtype=torch.long)
    for row, shown in zip(order.flatten(0, 1), rand(order.shape[0] * order.shape[1], pictures, seed=7) < 0.5):
        row[shown] = torch.arange(int(shown.sum()), 0, -1)
    reference = rand(q, 2, seed=4).sigmoid() if per_query else torch.full((1, 2), 0.5)
    said, tables, sink = rand(n, q, e, seed=1) * 2, rand(pictures + 1, e, seed=2), rand(heads, depth, seed=3)
    scales = [2.0, 1.0, 0.5][:levels]
    halves = [t.to(dtype) for t in (values, said, tables, sink)]
    return halves[0], sizes, scales, halves[1], halves[2], order, reference, halves[3]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine runs the kernels themselves: benchmarks/gpu.py")
class TestInTheInterpreter:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("pictures", [1, 3])
    @pytest.mark.parametrize("levels, k, depth", [(1, 1, 4), (3, 3, 5), (2, 8, 16)])
    @pytest.mark.parametrize("per_query", [False, True])
    def test_attend(self, dtype, pictures, levels, k, depth, per_query):
        full = make(pictures=pictures, levels=levels, k=k, depth=depth, per_query=per_query)
        want = deform_attn.mmfs_attention(*full, backend="eager")
        given = make(pictures=pictures, levels=levels, k=k, depth=depth, per_query=per_query, dtype=dtype)
        found = deform_attn.mmfs_attention(*given, backend="triton")
        assert found.dtype == dtype and found.shape == want.shape
        assert (found.float() - want).abs().max() < TOLERANCE[dtype] * want.abs().max() * (1 + 2 * (levels > 1))

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_gather(self, dtype):
        values, sizes = make()[:2]
        points, weights = rand(2, 5, 2, 3, 3, 4, 2, seed=5) * 5 + 2, rand(2, 5, 2, 3, 3, 4, seed=6)
        want = deform_attn.ms_deform_attn(values, sizes, points, weights, "eager")
        found = deform_attn.ms_deform_attn(values.to(dtype), sizes, points, weights.to(dtype), "triton")
        assert found.dtype == dtype
        assert (found.float() - want).abs().max() < TOLERANCE[dtype] * want.abs().max()

    def test_queries_that_see_nothing_find_the_sink(self):
        arguments = list(make())
        arguments[5] = torch.zeros_like(arguments[5])
        found = deform_attn.mmfs_attention(*arguments, backend="triton")
        assert torch.allclose(found, arguments[7].flatten().expand_as(found))


@needs_triton
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


@pytest.mark.parametrize("backend", [b for b in deform_attn.BACKENDS if b != "triton"])
@pytest.mark.parametrize("per_query", [False, True])
def test_every_way_to_attend_is_the_same(backend, per_query, monkeypatch):
    arguments = make(q=7, per_query=per_query)
    want = deform_attn.mmfs_attention(*arguments, backend="eager")
    assert torch.allclose(deform_attn.mmfs_attention(*arguments, backend=backend), want, atol=1e-5)
    monkeypatch.setattr(deform_attn, "CHUNK_SIZE", 40)  # a query or two at a time
    with torch.no_grad():
        assert torch.allclose(deform_attn.mmfs_attention(*arguments, backend=backend), want, atol=1e-5)


def operator(query, key, value, attn_bias):
    """What xFormers' memory_efficient_attention computes, and what it asks of its arguments on CUDA."""
    rows, _, _, depth = query.shape
    assert rows < 2**16 and query.is_contiguous() and key.shape == value.shape == (rows, attn_bias.shape[-1], 1, depth)
    assert attn_bias.dtype == query.dtype and attn_bias.shape[:3] == (rows, 1, 1)
    assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1]) and attn_bias.stride(-1) == 1
    logits = (query @ key.permute(0, 2, 3, 1) / depth**0.5).float() + attn_bias.float()
    return (logits.softmax(-1) @ value.transpose(1, 2).float()).to(query.dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("per_query", [False, True])
def test_xformers_is_called_as_it_can_be(monkeypatch, dtype, per_query):
    monkeypatch.setattr(deform_attn.xformers, "_memory_efficient_attention", lambda: operator)
    expected = deform_attn.mmfs_attention(*make(q=7, per_query=per_query), backend="eager")
    for max_rows in (2**16 - 1, 9):
        monkeypatch.setattr(deform_attn.xformers, "MAX_ROWS", max_rows)
        with torch.no_grad():
            arguments = make(q=7, per_query=per_query, dtype=dtype)
            out = deform_attn.mmfs_attention(*arguments, backend="xformers")
        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() < 2 * TOLERANCE[dtype] * expected.abs().max()


class Cuda:
    """A tensor on a card, as far as the choice of a backend looks at it."""

    device, requires_grad, shape = torch.device("cuda", 0), False, (1, 1, 16, 64, 64)

    def __init__(self, dtype=torch.float16):
        self.dtype = dtype


@pytest.fixture
def card(monkeypatch):
    """Fakes what a machine has: installed packages, and the backends that run on its card for a dtype."""
    for probe in (deform_attn._triton_runs, deform_attn._xformers_runs):
        probe.cache_clear()
    tried = []

    def has(installed=(), runs=()):
        def attempt(label, run, function, device, dtype, head_dim):
            tried.append(label)
            return (label, dtype) in runs

        monkeypatch.setattr(deform_attn.importlib.util, "find_spec", lambda name: name in installed or None)
        monkeypatch.setattr(deform_attn, "_try", attempt)
        return tried

    yield has
    for probe in (deform_attn._triton_runs, deform_attn._xformers_runs):
        probe.cache_clear()


HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.parametrize(
    "installed, runs, selected",
    [
        (("triton", "xformers"), {("Triton", HALF), ("xFormers", HALF)}, "triton"),
        (("triton", "xformers"), {("xFormers", HALF)}, "xformers"),  # an old card, or no compiler
        (("xformers",), {("xFormers", HALF)}, "xformers"),  # Windows
        (("xformers",), set(), "eager"),  # xFormers of another build
        (("triton",), {("Triton", SINGLE)}, "eager"),  # a dtype that the card does not have
        ((), {("Triton", HALF), ("xFormers", HALF)}, "eager"),
    ],
)
def test_the_backend_on_a_card(card, installed, runs, selected):
    tried = card(installed, runs)
    with torch.no_grad():
        assert deform_attn.select_backend(Cuda(), Cuda()) == selected
        count = len(tried)
        assert deform_attn.select_backend(Cuda(), Cuda()) == selected and len(tried) == count  # tried once


def test_the_backend_otherwise(card, monkeypatch):
    card(("triton", "xformers"), {("Triton", HALF)})
    learning = Cuda()
    learning.requires_grad = True
    assert deform_attn.select_backend(learning, Cuda()) == "eager"
    cpu = torch.zeros(1)
    with torch.no_grad():
        assert deform_attn.select_backend(cpu, cpu) == "embedding_bag"
    assert deform_attn.select_backend(cpu.clone().requires_grad_(), cpu) == "dense"
    monkeypatch.setenv("MMI_MMFS_BACKEND", "eager")
    assert deform_attn.select_backend(Cuda(), Cuda()) == deform_attn.select_backend(cpu, cpu) == "eager"


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_backend_that_fails_is_named_in_one_line(caplog, fault):
    def run(*args):
        if fault == "raises":
            raise RuntimeError("no compiler\nand more lines")
        return torch.zeros(1, 1, 4)

    with caplog.at_level(logging.WARNING):
        assert not deform_attn._try("Triton", run, "ms_deform_attn", torch.device("cpu"), torch.float32, 4)
    (record,) = caplog.records
    assert "Triton is not used for torch.float32 on cpu: " in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("name", [b for b in deform_attn.BACKENDS if b != "triton"])
def test_what_is_tried_passes_where_it_is_right(name):
    run = deform_attn.BACKENDS[name]
    assert deform_attn._try(name, run, "ms_deform_attn", torch.device("cpu"), torch.float32, 4)
