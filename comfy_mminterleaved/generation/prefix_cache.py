"""Reading stories with the LLM: what was read is kept, and a prefix is never read twice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..models.llama_mmfs import KVCache, Pictures, StoryLLM
from ..stories.story import TokenLayout


@dataclass
class Reading:
    """What the LLM holds of a batch of stories.

    ids: the tokens read, a list a story. keys: the keys of the pictures among them. seen: which of these the next
    token sees. hidden: the final hidden states (L, width), a tensor a story. `feed` extends it in place.
    """

    ids: list[list[int]]
    keys: list[list[str]]
    seen: list[list[bool]]
    hidden: list[torch.Tensor]
    cache: KVCache
    pictures: Pictures
    reused: int = 0

    def fork(self, rows: list[int]) -> Reading:
        """An independent Reading whose story i is this one's story rows[i]."""
        return Reading(
            *([list(column[i]) for i in rows] for column in (self.ids, self.keys, self.seen)),
            hidden=[self.hidden[i] for i in rows],
            cache=self.cache.rows(rows),
            pictures=self.pictures.rows(rows),
        )

    def shared(self, layout: TokenLayout, slots: int) -> int:
        """How many tokens a layout has in common with the story read, from its start; 0 for a batch of several."""
        return _shared(layout, self.ids[0], self.keys[0], slots)[0] if len(self.ids) == 1 else 0

    def truncate(self, length: int) -> None:
        """Lets the one story read be shared up to its first `length` tokens at most."""
        self.ids[0] = self.ids[0][:length]

    def last_hidden(self) -> torch.Tensor:
        """(N, width), of the last token of each story."""
        return torch.stack([h[-1] for h in self.hidden])

    @torch.no_grad()
    def feed(self, llm: StoryLLM, tokens: list[list[int]]) -> list[torch.Tensor]:
        """Reads text tokens behind each story; returns their hidden states (len(tokens[i]), width)."""
        device = llm.device
        longest, counts = max(map(len, tokens)), [len(t) for t in tokens]
        ids = torch.tensor([t + [llm.config.tokens.pad] * (longest - len(t)) for t in tokens], device=device)
        visible = torch.zeros(len(tokens), self.pictures.count, dtype=torch.bool)
        for row, seen in zip(visible, self.seen):
            row[: len(seen)] = torch.tensor(seen, dtype=torch.bool)
        visible = visible.to(device)[:, None].expand(-1, longest, -1)
        hidden = llm(llm.embed(ids), self.pictures, visible, self.cache, counts)
        found = [h[:count] for h, count in zip(hidden, counts)]
        for i, new in enumerate(found):  # hidden first: an interrupt in between leaves no id without its state
            self.hidden[i] = torch.cat([self.hidden[i], new])
            self.ids[i] += tokens[i]
        return found


def _shared(layout: TokenLayout, ids: list[int], keys: list[str], slots: int) -> tuple[int, int]:
    """How many tokens and pictures of a layout a story read before has in common from its start."""
    tokens = next((i for i, (a, b) in enumerate(zip(layout.ids, ids)) if a != b), min(len(layout), len(ids)))
    for i, (picture, end) in enumerate(zip(layout.pictures, layout.picture_ends)):
        if end - slots >= tokens:
            return tokens, i
        if i >= len(keys) or picture.key != keys[i]:
            return min(tokens, end - slots), i
    return tokens, len(layout.pictures)


@torch.no_grad()
def read(llm: StoryLLM, layouts: list[TokenLayout], before: Reading | None = None) -> Reading:
    """Reads stories whose pictures carry features.

    Args:
        layouts: at least one.
        before: an earlier reading; what its stories share with these, row by row, is taken over. It is used up.

    Returns:
        A Reading; its `reused` counts the tokens taken over.
    """
    c, n = llm.config, len(layouts)
    device, dtype = llm.device, llm.soi.dtype
    if before is None or len(before.ids) != n:
        nothing = [torch.zeros(0, c.width, device=device, dtype=dtype)] * n
        before = Reading([[]] * n, [[]] * n, [[]] * n, nothing, KVCache(n), None)
    shared = [_shared(layout, ids, keys, c.slots) for layout, ids, keys in zip(layouts, before.ids, before.keys)]
    starts = [tokens for tokens, _ in shared]

    pictures = _pictures(llm, layouts, before.pictures, [kept for _, kept in shared])
    cache = before.cache
    cache.lengths = list(starts)
    hidden = [h[:start] for h, start in zip(before.hidden, starts)]
    counts = [len(layout) - start for layout, start in zip(layouts, starts)]
    longest = max(counts)
    if longest:
        ids = torch.full((n, longest), c.tokens.pad)
        visible = torch.zeros(n, longest, pictures.count, dtype=torch.bool)
        tokens = []
        for i, (layout, start, count) in enumerate(zip(layouts, starts, counts)):
            ids[i, :count] = torch.tensor(layout.ids[start:])
            visible[i, :count, : len(layout.pictures)] = layout.visible(c, start)
            for picture, end in zip(layout.pictures, layout.picture_ends):
                if end > start:  # of a picture read in part, the slots that are left
                    tokens.append(picture.features.tokens[max(0, start - (end - c.slots)) :].to(device, dtype))
        x = llm.embed(ids.to(device), torch.cat(tokens) if tokens else None)
        found = llm(x, pictures, visible.to(device), cache, counts)
        hidden = [torch.cat([old, new[:count]]) for old, new, count in zip(hidden, found, counts)]
    seen = [layout.visible(c, len(layout) - 1)[0].tolist() for layout in layouts]
    keys = [[picture.key for picture in layout.pictures] for layout in layouts]
    return Reading([list(layout.ids) for layout in layouts], keys, seen, hidden, cache, pictures, sum(starts))


def _pictures(llm: StoryLLM, layouts, before: Pictures | None, kept: list[int]) -> Pictures:
    """The stories' pictures for the synchronizer layers; the first kept[i] of each are taken from `before`."""
    device, dtype = llm.device, llm.soi.dtype
    n, most = len(layouts), max(len(layout.pictures) for layout in layouts)
    new = [p.features.maps for layout, k in zip(layouts, kept) for p in layout.pictures[k:]]
    if not new and before is not None and before.count == most:
        return before
    if new:
        fresh = llm.prepare([torch.stack(level).unsqueeze(0).to(device, dtype) for level in zip(*new)])
    else:
        fresh = llm.prepare_none(1)
    layers = []
    for i, layer in enumerate(fresh.layers):
        values = layer.values.new_zeros(n, most, *layer.values.shape[2:])
        taken = 0
        for row, (layout, k) in enumerate(zip(layouts, kept)):
            if k:
                values[row, :k] = before.layers[i].values[row, :k]
            count = len(layout.pictures) - k
            values[row, k : k + count] = layer.values[0, taken : taken + count]
            taken += count
        layers.append(replace(layer, values=values))
    return Pictures(tuple(layers))
