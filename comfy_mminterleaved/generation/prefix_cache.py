"""Prefill: runs the LLM on stories and caches the result, so that a shared prefix is never computed twice."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..models.llama_mmfs import KVCache, LlamaImageValues, LlamaMMFS
from .tokens import StoryTokens


@dataclass
class PrefixCache:
    """KV cache of a batch of tokenized stories, with the state needed to extend it. `extend` works in place.

    Args:
        input_ids: Cached tokens, a list per story.
        image_digests: Digest of each cached image, with the id of the encoder that made its features.
        visible_images: Images that the next token may attend to.
        hidden_states: Final hidden states `(L, hidden_size)`, a tensor per story.
        num_cached_tokens: Tokens taken over from an earlier cache.
    """

    input_ids: list[list[int]]
    image_digests: list[list[str]]
    visible_images: list[list[bool]]
    hidden_states: list[torch.Tensor]
    kv_cache: KVCache
    image_values: LlamaImageValues | None
    num_cached_tokens: int = 0

    def fork(self, rows: list[int]) -> PrefixCache:
        """A cache whose story i continues this one's story rows[i]; it keeps only the last hidden state of each.

        Forks of a single story share its keys, values and images, which must not change meanwhile.
        """
        columns = self.input_ids, self.image_digests, self.visible_images
        is_shared = len(self.input_ids) == 1 or self.kv_cache.prefix is not None
        return PrefixCache(
            *([list(column[i]) for i in rows] for column in columns),
            hidden_states=[self.hidden_states[i][-1:] for i in rows],
            kv_cache=self.kv_cache.fork(len(rows)) if len(self.input_ids) == 1 else self.kv_cache.select_rows(rows),
            image_values=self.image_values if is_shared else self.image_values.select_rows(rows),
        )

    @property
    def nbytes(self) -> int:
        """Memory that it holds, without a prefix shared with another cache."""
        images = self.image_values.nbytes if self.image_values is not None else 0
        return self.kv_cache.nbytes + images + sum(h.nbytes for h in self.hidden_states)

    def common_prefix_length(self, tokens: StoryTokens, num_img_token: int) -> int:
        """How many tokens a story shares with the cached one from the start; 0 for a batch of several."""
        if len(self.input_ids) != 1:
            return 0
        return _common_prefix(tokens, self.input_ids[0], self.image_digests[0], num_img_token)[0]

    def match(self, batch: list[StoryTokens], num_img_token: int) -> PrefixCache | None:
        """This cache with its rows in the order of the stories that begin as they do; None if a story has no row.

        So a batch goes on with what is cached when some of its stories have ended.
        """
        if len(batch) == len(self.input_ids):
            return self
        free, rows = list(range(len(self.input_ids))), []
        for tokens in batch:
            common = {
                row: _common_prefix(tokens, self.input_ids[row], self.image_digests[row], num_img_token)[0]
                for row in free
            }
            if not common:
                return None
            row = max(common, key=common.get)
            rows.append(row)
            free.remove(row)
        if self.kv_cache.prefix is not None or not self.image_values:
            return None
        return PrefixCache(
            *(
                [list(column[row]) for row in rows]
                for column in (self.input_ids, self.image_digests, self.visible_images)
            ),
            hidden_states=[self.hidden_states[row] for row in rows],
            kv_cache=self.kv_cache.select_rows(rows),
            image_values=self.image_values.select_rows(rows),
        )

    def truncate(self, length: int) -> None:
        """Limits reuse to the first `length` tokens of the one cached story."""
        self.input_ids[0] = self.input_ids[0][:length]

    def last_hidden_state(self) -> torch.Tensor:
        """`(N, hidden_size)`, of the last token of each story."""
        return torch.stack([h[-1] for h in self.hidden_states])

    @torch.no_grad()
    def extend(self, llm: LlamaMMFS, new_ids: list[list[int]]) -> list[torch.Tensor]:
        """Appends text tokens to each story; returns their hidden states `(len(new_ids[i]), hidden_size)`."""
        device, pad = llm.device, llm.config.special_tokens.pad
        longest, counts = max(map(len, new_ids)), [len(ids) for ids in new_ids]
        # Copies to a card do not wait for it: only reading a token back does (`decoding._sample`).
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in new_ids]).to(device, non_blocking=True)
        image_mask = torch.zeros(len(new_ids), self.image_values.num_images, dtype=torch.bool)
        for row, visible in zip(image_mask, self.visible_images):
            row[: len(visible)] = torch.tensor(visible, dtype=torch.bool)
        image_mask = image_mask.to(device, non_blocking=True)[:, None].expand(-1, longest, -1)
        out = llm(llm.embed_inputs(input_ids), self.image_values, image_mask, self.kv_cache, counts)
        new_states = [h[:count] for h, count in zip(out, counts)]
        for i, states in enumerate(new_states):  # states first: an interrupt in between leaves no id without its state
            self.hidden_states[i] = torch.cat([self.hidden_states[i], states])
            self.input_ids[i] += new_ids[i]
        return new_states


def _digest(image) -> str:
    """Identifies an image and its features: those of another encoder give other states."""
    return f"{image.digest} {image.features.encoder_id if image.features is not None else ''}"


def _common_prefix(tokens: StoryTokens, input_ids: list[int], digests: list[str], num_img_token: int):
    """How many tokens and images a story shares with a cached one from the start."""
    pairs = zip(tokens.input_ids, input_ids)
    length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(input_ids)))
    for i, (image, end) in enumerate(zip(tokens.images, tokens.image_ends)):
        if end - num_img_token >= length:
            return length, i
        if i >= len(digests) or _digest(image) != digests[i]:
            return min(length, end - num_img_token), i
    return length, len(tokens.images)


@torch.no_grad()
def prefill(llm: LlamaMMFS, batch: list[StoryTokens], cached: PrefixCache | None = None) -> PrefixCache:
    """Runs the LLM on stories whose images carry features.

    Args:
        batch: At least one story.
        cached: An earlier cache; prefixes shared with these stories, row by row, are reused. It becomes invalid.
    """
    c, n = llm.config, len(batch)
    device, dtype = llm.device, llm.soi_token.dtype
    if cached is None or len(cached.input_ids) != n:
        empty = [torch.zeros(0, c.hidden_size, device=device, dtype=dtype)] * n
        cached = PrefixCache([[]] * n, [[]] * n, [[]] * n, empty, KVCache(n, dtype=llm.cache_dtype), None)
    shared = [
        _common_prefix(tokens, ids, digests, c.num_img_token)
        for tokens, ids, digests in zip(batch, cached.input_ids, cached.image_digests)
    ]
    starts = [length for length, _ in shared]

    image_values = _project_images(llm, batch, cached, [images for _, images in shared])
    kv_cache = cached.kv_cache
    kv_cache.lengths = list(starts)
    hidden_states = [h[:start] for h, start in zip(cached.hidden_states, starts)]
    counts = [len(tokens) - start for tokens, start in zip(batch, starts)]
    longest = max(counts)
    if longest:
        input_ids = torch.full((n, longest), c.special_tokens.pad)
        image_mask = torch.zeros(n, longest, image_values.num_images, dtype=torch.bool)
        visual_tokens = []
        for i, (tokens, start, count) in enumerate(zip(batch, starts, counts)):
            input_ids[i, :count] = torch.tensor(tokens.input_ids[start:])
            image_mask[i, :count, : len(tokens.images)] = tokens.image_mask(c, start)
            for image, end in zip(tokens.images, tokens.image_ends):
                if end > start:  # of an image that was cached in part, the remaining tokens
                    first = max(0, start - (end - c.num_img_token))
                    visual_tokens.append(image.features.visual_tokens[first:].to(device, dtype))
        x = llm.embed_inputs(input_ids.to(device), torch.cat(visual_tokens) if visual_tokens else None)
        out = llm(x, image_values, image_mask.to(device), kv_cache, counts)
        hidden_states = [torch.cat([old, new[:count]]) for old, new, count in zip(hidden_states, out, counts)]
    return PrefixCache(
        [list(tokens.input_ids) for tokens in batch],
        [[_digest(image) for image in tokens.images] for tokens in batch],
        [tokens.image_mask(c, len(tokens) - 1)[0].tolist() for tokens in batch],
        hidden_states,
        kv_cache,
        image_values,
        sum(starts),
    )


def _project_images(llm: LlamaMMFS, batch, cached: PrefixCache, kept: list[int]) -> LlamaImageValues:
    """The stories' images, projected for every MMFS layer; the first kept[i] of each are taken from `cached`.

    Takes the images out of `cached` layer by layer, so that at most one layer is in memory twice.
    """
    old, cached.image_values = cached.image_values, None
    n, num_images = len(batch), max(len(tokens.images) for tokens in batch)
    new = [image.features.feature_maps for tokens, k in zip(batch, kept) for image in tokens.images[k:]]
    if not new and old is not None and old.num_images == num_images:
        return old
    if not new:
        new_layers = iter(llm.no_images(1).layers)
    else:
        maps = [torch.stack(level).unsqueeze(0).to(llm.device, llm.soi_token.dtype) for level in zip(*new)]
        new_layers = llm.project_images_by_layer(maps)
    old_layers, layers = list(old.layers) if old is not None else [], []
    del old
    for projected in new_layers:
        old_value = old_layers.pop(0).value if old_layers else None
        value = projected.value.new_zeros(n, num_images, *projected.value.shape[2:])
        offset = 0
        for row, (tokens, k) in enumerate(zip(batch, kept)):
            if k:
                value[row, :k] = old_value[row, :k]
            count = len(tokens.images) - k
            value[row, k : k + count] = projected.value[0, offset : offset + count]
            offset += count
        layers.append(replace(projected, value=value))
    return LlamaImageValues(tuple(layers))
