import pytest
import torch

from comfy_mminterleaved.models.deform_attn import ms_deform_attn
from comfy_mminterleaved.models.deform_attn.bilinear import pad_levels
from comfy_mminterleaved.models.init_weights import init_weights
from comfy_mminterleaved.models.mmfs import MMFS

CENTRE = torch.full((1, 2), 0.5, dtype=torch.float64)


def make(levels=(8, 4), heads=4, points=3, width=16, query_width=12, base=4, dtype=torch.float64):
    torch.manual_seed(0)
    module = MMFS(query_width, 10, width, query_width, levels, base, heads, points, max_num_image_per_seq=12)
    init_weights(module)
    for parameter in module.parameters():  # no zeros: every path must count
        torch.nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).requires_grad_(False)


def features(pictures, levels=(8, 4), n=2, dtype=torch.float64, seed=1):
    cells = sum(side**2 for side in levels)
    return torch.randn(n, pictures, cells, 10, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_the_book(module, query, values, sizes, visible, reference):
    """MMFS as the reference writes it: the query repeated for every picture, sinks as logits of their own."""
    n, p, _, _ = values.shape
    q, levels = query.shape[1], len(sizes)
    shown = visible.expand(n, q, p).long()
    relative = (shown.sum(-1, keepdim=True) + 1 - shown.cumsum(-1)) * shown
    states = module.dynamic_offset_mask(query)[:, :, None] + module.query_relpos(relative)
    offsets = module.sampling_offsets(states).view(n, q, p, module.n_heads, 1, module.n_points, 2)
    logits = module.attention_weights(states).view(n, q, p, module.n_heads, levels, module.n_points + 1)
    logits = logits + (1 - shown.to(logits)).view(n, q, p, 1, 1, 1) * -10000
    logits[..., -1] = -torch.tensor(float(p * levels)).log()
    weights = logits.permute(0, 1, 3, 2, 4, 5).flatten(3).softmax(-1).view(n, q, module.n_heads, p, levels, -1)
    projected = module.value_proj(values).unflatten(-1, (module.n_heads, -1))
    side = torch.tensor([(w, h) for h, w in sizes], dtype=query.dtype)
    scale = torch.tensor(module.scale_ratios, dtype=query.dtype).view(-1, 1, 1)
    place = reference.view(-1, 1, 1, 1, 1, 2) + offsets.transpose(2, 3) * scale / side.view(-1, 1, 2)
    out = ms_deform_attn(
        pad_levels(projected, sizes), sizes, place * side.view(-1, 1, 2) - 0.5, weights[..., :-1], "eager"
    )
    sinks = weights[..., -1].sum((-1, -2)).unsqueeze(-1) * module.ignore_token.view(module.n_heads, -1)
    return module.output_proj(out + sinks.flatten(2))


@pytest.mark.parametrize("levels", [(8,), (8, 4), (8, 4, 2)])
@pytest.mark.parametrize("heads, points", [(1, 1), (4, 3), (2, 8)])
@pytest.mark.parametrize("pictures", [1, 3, 8])
@pytest.mark.parametrize("folded", [False, True])
def test_equals_the_definition(levels, heads, points, pictures, folded):
    module = make(levels, heads, points)
    sizes = [(side, side) for side in levels]
    values, query = features(pictures, levels), torch.randn(2, 5, 12, dtype=torch.float64)
    visible = torch.rand(2, 5, pictures, generator=torch.Generator().manual_seed(2)) < 0.6
    reference = torch.rand(5, 2, dtype=torch.float64)
    want = by_the_book(module, query, values, sizes, visible, reference)
    if folded:
        module.fuse_projections()
    found = module(query, module.project_images(values, sizes), visible, reference)
    assert torch.allclose(found, want, atol=1e-12)


def test_folding_takes_in_the_convolution_behind():
    module, sizes = make(), [(8, 8), (4, 4)]
    conv = torch.nn.Conv2d(12, 12, 1, dtype=torch.float64).requires_grad_(False)
    query, visible = torch.randn(2, 5, 12, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    prepared = module.project_images(features(3), sizes)
    want = conv(module(query, prepared, visible, CENTRE).transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    module.fuse_projections(conv)
    assert torch.allclose(module(query, prepared, visible, CENTRE), want, atol=1e-12)
    assert module.is_fused and not hasattr(module, "dynamic_offset_mask")
    module.fuse_projections(conv)  # once is enough
    assert torch.allclose(module(query, prepared, visible, CENTRE), want, atol=1e-12)


@pytest.mark.parametrize("pictures", [1, 3, 8])
@pytest.mark.parametrize("padding", [1, 3])
def test_padding_with_masked_pictures_changes_nothing(pictures, padding):
    module, sizes = make(), [(8, 8), (4, 4)]
    query = torch.randn(2, 5, 12, dtype=torch.float64)
    values = features(pictures)
    visible = torch.ones(2, pictures, dtype=torch.bool)
    alone = module(query, module.project_images(values, sizes), visible, CENTRE)
    padded = torch.cat([values, features(padding, seed=9)], 1), torch.cat([visible, torch.zeros(2, padding).bool()], 1)
    assert torch.allclose(module(query, module.project_images(padded[0], sizes), padded[1], CENTRE), alone, atol=1e-12)


def test_without_pictures_it_is_the_sink():
    module, sizes = make(), [(8, 8), (4, 4)]
    query = torch.randn(2, 5, 12, dtype=torch.float64)
    none = module(query, module.project_images(features(0), sizes), torch.zeros(2, 0).bool(), CENTRE)
    masked = module(query, module.project_images(features(2), sizes), torch.zeros(2, 2).bool(), CENTRE)
    assert torch.allclose(none, masked, atol=1e-12)
    assert torch.allclose(none[0, 0], module.output_proj(module.ignore_token.flatten()))


def test_relative_positions_count_from_the_newest_visible_picture():
    """The same two pictures, seen with a masked one before, between or behind them, are the newest and the second."""
    module, sizes, values = make(), [(8, 8), (4, 4)], features(3)
    query = torch.randn(2, 5, 12, dtype=torch.float64)
    pair = module(query, module.project_images(values[:, [0, 2]], sizes), torch.ones(2, 2).bool(), CENTRE)
    visible = torch.tensor([[True, False, True]]).expand(2, -1)
    assert torch.allclose(module(query, module.project_images(values, sizes), visible, CENTRE), pair, atol=1e-12)


def test_gradients_against_finite_differences():
    module, sizes = make(levels=(4, 2), heads=2, points=2, width=4, query_width=3), [(4, 4), (2, 2)]
    values, query = features(2, (4, 2), n=1), torch.randn(1, 2, 3, dtype=torch.float64)
    names = list(dict(module.named_parameters()))
    visible = torch.tensor([[[True, False], [True, True]]])

    class Run(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, query, values):
            return module(query, module.project_images(values, sizes), visible, CENTRE)

    def run(query, values, *parameters):
        given = {f"module.{name}": p for name, p in zip(names, parameters)}
        return torch.func.functional_call(Run(), given, (query, values))

    inputs = [t.clone().requires_grad_() for t in (query, values, *module.parameters())]
    assert torch.autograd.gradcheck(run, inputs)
