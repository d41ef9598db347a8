"""An audio encoder in the space of images and texts (sound-guided manipulation, 2112.00007)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..config import SystemConfig


@dataclass(frozen=True)
class AudioEncoderConfig(SystemConfig):
    """Sizes of an AudioEncoder.

    Args:
        embedding_dim: Of images and texts: `ContrastiveConfig.projection_dim`.
        sampling_rate: In Hz.
        window_length: What is embedded at once, in samples.
        num_mel_bins, n_fft, hop_length: Of its spectrogram.
        channels: Of the first convolution; the others have 2, 4 and 5 times as many.
    """

    embedding_dim: int = 256
    sampling_rate: int = 16_000
    window_length: int = 32_000
    num_mel_bins: int = 64
    n_fft: int = 512
    hop_length: int = 250
    channels: int = 24


class AudioEncoder(nn.Module):
    """Log-mel spectrograms to unit embeddings: four strided convolutions, each with a residual one."""

    def __init__(self, c: AudioEncoderConfig, operations=nn):
        super().__init__()
        self.config = c
        widths = [1, *(c.channels * factor for factor in (1, 2, 4, 5))]
        self.convs = nn.ModuleList(operations.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:]))
        self.residuals = nn.ModuleList(operations.Conv2d(width, width, 3, 1, 1) for width in widths[1:])
        self.norms = nn.ModuleList(operations.GroupNorm(1, width) for width in widths[1:])
        self.proj = operations.Linear(2 * widths[-1], c.embedding_dim)
        # The mean embedding of all sounds: what one says is its difference from that.
        self.register_buffer("neutral", torch.zeros(c.embedding_dim))

    def forward(self, log_mel: torch.Tensor) -> torch.Tensor:
        """`(N, num_mel_bins, frames)` -> `(N, embedding_dim)`, of unit length."""
        x = log_mel[:, None]
        for conv, residual, norm in zip(self.convs, self.residuals, self.norms):
            x = F.gelu(norm(conv(x)))
            x = x + F.gelu(residual(x))
        return F.normalize(self.proj(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)), dim=-1)


def log_mel(waveforms: torch.Tensor, c: AudioEncoderConfig) -> torch.Tensor:
    """Log-mel spectrograms `(N, num_mel_bins, frames)` of windows `(N, window_length)`, each normalized."""
    window = torch.hann_window(c.n_fft, device=waveforms.device)
    spectrum = torch.stft(waveforms.float(), c.n_fft, c.hop_length, window=window, return_complex=True)
    filters = torch.from_numpy(_mel_filters(c)).to(spectrum.real)
    x = torch.log10((filters.T @ spectrum.abs().square()).clamp(min=1e-8))
    x = torch.maximum(x, x.amax((1, 2), keepdim=True) - 6)  # 60 dB below the loudest, nothing is heard
    return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True).clamp(min=1e-4)


def _mel_filters(c: AudioEncoderConfig):
    from transformers.audio_utils import mel_filter_bank

    options = {"norm": None, "mel_scale": "htk"}
    filters = mel_filter_bank(c.n_fft // 2 + 1, c.num_mel_bins, 20.0, c.sampling_rate / 2, c.sampling_rate, **options)
    return filters.astype("float32")
