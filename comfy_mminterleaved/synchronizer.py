"""MMFS, the multi-image multi-scale feature synchronizer (paper 3.2; the reference's `MMFS`).

Deformable attention from a query to the feature maps of several pictures. Whatever depends on the pictures alone is
made once by `prepare`; the call then costs what depends on the query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .sampling import bordered, gather


@dataclass(frozen=True)
class PreparedPictures:
    """Pictures as one synchronizer reads them.

    values: (N, P, S', H, D), with borders (`sampling.bordered`). sizes: the levels' (h, w), without. offset_table, logit_table: what each relative position adds to
    the offsets and the logits, one row a position.
    """

    values: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    offset_table: torch.Tensor
    logit_table: torch.Tensor

    @property
    def count(self) -> int:
        return self.values.shape[1]


class Synchronizer(nn.Module):
    """MMFS.

    Args:
        query_width, feature_width, out_width: channels of the query, the features and the result.
        value_width: channels of the values, all heads together.
        levels: nominal side of each level's map; with `base` it scales the offsets of that level.
        base: the side at which an offset of 1 is one cell.
        max_pictures: rows of the table of relative positions; row 0 stands for 'not visible'.
    """

    def __init__(
        self, query_width, feature_width, value_width, out_width, levels, base, heads=16, points=8, max_pictures=50,
        operations=nn,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.points, self.max_pictures = heads, points, max_pictures
        self.scales = tuple(level / base for level in levels)
        self.query_proj = operations.Linear(query_width, query_width)
        self.relative_position = operations.Embedding(max_pictures, query_width)
        self.offsets = operations.Linear(query_width, heads * points * 2)
        # One more logit a level stands for the sink; its value is never used (see `forward`).
        self.logits = operations.Linear(query_width, heads * len(levels) * (points + 1))
        self.sink = nn.Parameter(torch.zeros(1, 1, 1, value_width))
        self.value_proj = operations.Linear(feature_width, value_width)
        self.out_proj = operations.Linear(value_width, out_width)

    def reset_parameters(self, offset_range: float = 3.0):
        """Offsets spread over +-`offset_range` cells whatever the query, biases zero (`_reset_parameters`)."""
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -offset_range, offset_range)
        nn.init.zeros_(self.logits.bias)
        nn.init.zeros_(self.query_proj.bias)
        nn.init.zeros_(self.sink)
        nn.init.trunc_normal_(self.relative_position.weight, std=0.02)
        for projection in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def prepare(self, features: torch.Tensor, sizes) -> PreparedPictures:
        """Projects the values of pictures, once for all queries.

        Args:
            features: (N, P, S, feature_width), normed; the levels' cells one after the other.
            sizes: the levels' (h, w).
        """
        values = self.value_proj(features).unflatten(-1, (self.heads, -1))
        table = self.relative_position(torch.arange(self.max_pictures, device=features.device)).to(features)
        # Both heads are linear: that of query + position is the sum of theirs, and the positions' part is known here.
        tables = (nn.functional.linear(table, head.weight.to(table)) for head in (self.offsets, self.logits))
        return PreparedPictures(bordered(values, sizes), tuple(map(tuple, sizes)), *tables)

    def forward(self, query, pictures: PreparedPictures, visible, reference) -> torch.Tensor:
        """What the query finds in the pictures it may see.

        Args:
            query: (N, Q, query_width), normed.
            pictures: from `prepare`, oldest first.
            visible: bool (N, P) or (N, Q, P).
            reference: (Q, 2) or (1, 2), x and y in [0, 1], where the offsets start.

        Returns:
            (N, Q, out_width).
        """
        n, q, _ = query.shape
        heads, points, levels = self.heads, self.points, len(self.scales)
        visible = visible.unsqueeze(1) if visible.ndim == 2 else visible  # (N, 1 or Q, P)
        p = visible.shape[-1]
        sink = self.sink.to(query).view(heads, -1)
        if not p:  # the sinks have all the weight
            return self.out_proj(sink.flatten()).expand(n, q, -1)

        shown = visible.long()
        newest_first = (shown.sum(-1, keepdim=True) + 1 - shown.cumsum(-1)) * shown  # 1 is the newest, 0 not visible
        projected = self.query_proj(query)
        offsets = self.offsets(projected).unsqueeze(2) + pictures.offset_table[newest_first]  # (N, Q, P, H * K * 2)
        logits = self.logits(projected).unsqueeze(2) + pictures.logit_table[newest_first]
        offsets = offsets.view(n, q, p, heads, 1, points, 2).transpose(2, 3)  # (N, Q, H, P, 1, K, 2)
        logits = logits.view(n, q, p, heads, levels, points + 1)[..., :points].transpose(2, 3)  # (N, Q, H, P, L, K)
        logits = logits.masked_fill(~visible[:, :, None, :, None, None], float("-inf"))

        # The sinks have the constant logit -log(P * L) each: together they weigh like one with logit 0.
        logits = torch.cat([logits.flatten(3), logits.new_zeros(n, q, heads, 1)], dim=-1)
        precise = torch.promote_types(query.dtype, torch.float32)  # half precision is too coarse for positions
        weights = logits.to(precise).softmax(-1).to(query.dtype)
        weights, sink_weight = weights[..., :-1].view(n, q, heads, p, levels, points), weights[..., -1:]

        side = torch.tensor([(w, h) for h, w in pictures.sizes], device=query.device, dtype=precise).view(-1, 1, 2)
        scale = torch.tensor(self.scales, device=query.device, dtype=precise).view(-1, 1, 1)
        centre = reference.to(precise).view(-1, 1, 1, 1, 1, 2) * side - 0.5  # (1 or Q, 1, 1, L, 1, 2), in cells
        found = gather(pictures.values, pictures.sizes, centre + offsets.to(precise) * scale, weights)
        return self.out_proj(found + (sink_weight * sink).flatten(2))
