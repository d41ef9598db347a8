import pytest
import torch

from comfy_mminterleaved.config import PerceiverConfig
from comfy_mminterleaved.models import perceiver as resampler
from comfy_mminterleaved.models.init_weights import init_weights


@pytest.mark.parametrize("qk_norm", [False, True])
def test_packed_contexts_give_what_padded_ones_give(monkeypatch, qk_norm):
    """The packing itself; that xFormers serves it can only be seen on a card (`benchmarks/gpu.py`)."""
    torch.manual_seed(0)
    block = resampler.PerceiverResampler(PerceiverConfig(5, 16, 12, 3, 4, 32, 2, qk_normalization=qk_norm)).double()
    init_weights(block, std=0.3)
    context, lengths = torch.randn(3, 7, 12, dtype=torch.float64), [7, 2, 5]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        padded = block(context, mask)
        monkeypatch.setattr(resampler, "supports_varlen", lambda x: True)
        packed = block(context, mask)
        alone = torch.cat([block(context[i : i + 1, :n]) for i, n in enumerate(lengths)])
    assert torch.allclose(packed, padded, atol=1e-12) and torch.allclose(packed, alone, atol=1e-12)
