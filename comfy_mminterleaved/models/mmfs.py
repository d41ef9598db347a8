"""MMFS, the multi-image multi-scale feature synchronizer (paper 3.2; the reference's `MMFS`).

Deformable attention from a query to the feature maps of several pictures. Whatever depends on the pictures alone is
made once by `prepare`; the call then costs what depends on the query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .deform_attn import attend, bordered


@dataclass(frozen=True)
class PreparedPictures:
    """Pictures as one synchronizer reads them.

    values: (N, P, H, S', D), with borders (`sampling.bordered`). sizes: the levels' (h, w), without.
    """

    values: torch.Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return self.values.shape[1]


class Synchronizer(nn.Module):
    """MMFS, in one of two forms that compute the same.

    As in checkpoints: a projection of the query plus a relative position, and offsets and logits linear in their sum.
    To run it, `fold` makes one small matrix of all that is linear in the query, and a table of what positions add.

    Args:
        query_width, feature_width, out_width: channels of the query, the features and the result.
        value_width: channels of the values, all heads together.
        levels: nominal side of each level's map; with `base` it scales the offsets of that level.
        base: the side at which an offset of 1 is one cell.
        max_pictures: rows of the table of relative positions; row 0 stands for 'not visible'.
    """

    def __init__(
        self,
        query_width,
        feature_width,
        value_width,
        out_width,
        levels,
        base,
        heads=16,
        points=8,
        max_pictures=50,
        operations=nn,
    ):
        super().__init__()
        self.heads, self.points, self.operations = heads, points, operations
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

    @torch.no_grad()
    def fold(self, after: nn.Conv2d | None = None) -> None:
        """Takes, for good, the form for running; `after` is a 1 x 1 convolution that follows, and is taken in too."""
        if self.folded:
            return
        weight, bias, tables = self._linear_in_query()
        self.from_query = _linear(self.operations, weight, bias)
        self.tables = nn.Parameter(tables, requires_grad=False)
        del self.query_proj, self.relative_position, self.offsets, self.logits
        if after is not None:
            precise = torch.promote_types(after.weight.dtype, torch.float32)
            last = after.weight.to(precise).flatten(1)  # (C, C)
            bias = last @ self.out_proj.bias.to(precise) + after.bias.to(precise)
            weight = last @ self.out_proj.weight.to(precise)
            self.out_proj = _linear(self.operations, weight.to(after.weight), bias.to(after.weight))

    @property
    def folded(self) -> bool:
        return hasattr(self, "from_query")

    def _linear_in_query(self):
        """(E, query_width), (E,), (max_pictures, E): offsets and logits of a query, and what each position adds."""
        dtype = self.offsets.weight.dtype
        precise = torch.promote_types(dtype, torch.float32)
        # Of each level's points + 1 logits the last is never used.
        logits = (self.logits.weight, self.logits.bias)
        used = [t.unflatten(0, (-1, self.points + 1))[:, :-1].flatten(0, 1) for t in logits]
        heads = torch.cat([self.offsets.weight, used[0]]).to(precise)
        bias = torch.cat([self.offsets.bias, used[1]]).to(precise)
        bias = bias + heads @ self.query_proj.bias.to(precise)
        tables = self.relative_position.weight.to(precise) @ heads.T
        return (heads @ self.query_proj.weight.to(precise)).to(dtype), bias.to(dtype), tables.to(dtype)

    def prepare(self, features: torch.Tensor, sizes) -> PreparedPictures:
        """Projects the values of pictures, once for all queries.

        Args:
            features: (N, P, S, feature_width), normed; the levels' cells one after the other.
            sizes: the levels' (h, w).
        """
        values = self.value_proj(features).unflatten(-1, (self.heads, -1))
        return PreparedPictures(bordered(values, sizes), tuple(map(tuple, sizes)))

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
        sink = self.sink.to(query).view(self.heads, -1)
        if not pictures.count:  # the sinks have all the weight
            return self.out_proj(sink.flatten()).expand(n, q, -1)
        if self.folded:
            said, tables = self.from_query(query), self.tables.to(query)
        else:
            weight, bias, tables = self._linear_in_query()
            said = nn.functional.linear(query, weight, bias)
        visible = visible.unsqueeze(1) if visible.ndim == 2 else visible  # (N, 1 or Q, P)
        shown = visible.long()
        newest_first = (shown.sum(-1, keepdim=True) + 1 - shown.cumsum(-1)) * shown  # 1 is the newest, 0 not visible
        found = attend(pictures.values, pictures.sizes, self.scales, said, tables, newest_first, reference, sink)
        return self.out_proj(found)


def fold(block: nn.Module) -> nn.Module:
    """Brings all synchronizers of a block into their form for running, in place; returns the block."""
    for part in list(block.modules()):
        if hasattr(part, "fold"):
            part.fold()
    return block


def _linear(operations, weight, bias) -> nn.Linear:
    layer = operations.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
