"""Story -> token ids: bos, then texts and images in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import StoryError
from ..stories.story import ImageSegment, Story, TextSegment, join_texts

if TYPE_CHECKING:
    from ..config import LlamaMMFSConfig


@dataclass(frozen=True)
class StoryTokens:
    """A story as the LLM sees it: token ids, and the images of its image tokens in order.

    An image is one start-of-image token and `num_img_token` image tokens, in some models then an end-of-image token;
    one that has no pixels yet is None.

    Args:
        image_ends: Where the image tokens of each image end.
        segment_ends: Where the tokens of each segment end; texts that are joined end together.
    """

    input_ids: tuple[int, ...]
    images: tuple[ImageSegment | None, ...]
    image_ends: tuple[int, ...]
    segment_ends: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def of(cls, ids, images, c: LlamaMMFSConfig, segment_ends=()) -> StoryTokens:
        """From ids with their image tokens in place; raises StoryError if these and the images disagree."""
        ids, images = tuple(int(i) for i in ids), tuple(images)
        starts = [
            i for i, token in enumerate(ids) if token == c.special_tokens.image and ids[i - 1] == c.special_tokens.soi
        ]
        is_valid = all(ids[i : i + c.num_img_token] == (c.special_tokens.image,) * c.num_img_token for i in starts)
        if (
            not is_valid
            or ids.count(c.special_tokens.image) != len(starts) * c.num_img_token
            or len(starts) != len(images)
        ):
            raise StoryError(
                f"These token ids hold {ids.count(c.special_tokens.image)} image tokens for {len(images)} images; each "
                f"image is one start-of-image token and {c.num_img_token} image tokens."
            )
        return cls(ids, images, tuple(i + c.num_img_token for i in starts), tuple(segment_ends))

    def prefix(self, length: int, num_img_token: int) -> StoryTokens:
        """The first `length` tokens, with the images of which they hold a token."""
        count = sum(end - num_img_token < length for end in self.image_ends)
        return StoryTokens(self.input_ids[:length], self.images[:count], self.image_ends[:count])

    def image_mask(self, c: LlamaMMFSConfig, start: int = 0, end: int | None = None) -> torch.Tensor:
        """The images that positions start to end may attend to: bool `(end - start, images)`.

        These are the images whose first image token is at or before the position and after its nearest bos.
        """
        ids = torch.tensor(self.input_ids)
        end = len(ids) if end is None else end
        position = torch.arange(len(ids))
        nearest_bos = torch.where(ids == c.special_tokens.bos, position, -1).cummax(0).values[start:end, None]
        first_token = torch.tensor(self.image_ends, dtype=torch.long) - c.num_img_token
        return (first_token > nearest_bos) & (first_token <= position[start:end, None])


def tokenize_story(story: Story, tokenizer, c: LlamaMMFSConfig) -> StoryTokens:
    """Tokenizes a story: bos, then texts and images in order.

    Adjacent texts are joined by one space; white space next to an image is dropped, as in the reference.
    """
    ids, images, ends = [c.special_tokens.bos], [], []
    segments = list(story.segments)
    i = 0
    while i < len(segments):
        segment, first = segments[i], i
        i += 1
        if isinstance(segment, ImageSegment):
            ids += [c.special_tokens.soi] + [c.special_tokens.image] * c.num_img_token
            ids += [] if c.special_tokens.eoi is None else [c.special_tokens.eoi]
            images.append(segment)
        elif segment.token_ids is not None:
            ids += segment.token_ids
        else:
            text = segment.text
            while i < len(segments) and isinstance(segments[i], TextSegment) and segments[i].token_ids is None:
                text = join_texts(text, segments[i].text)
                i += 1
            after_text = len(ids) > 1 and ids[-1] not in (c.special_tokens.image, c.special_tokens.eoi)
            ids += require_tokenizer(tokenizer).encode(text.strip(), after_text=after_text)
        ends += [len(ids)] * (i - first)
    return StoryTokens.of(ids, images, c, ends)


def require_tokenizer(tokenizer):
    """The tokenizer, or a StoryError if the checkpoint came without one."""
    if tokenizer is None:
        raise StoryError(
            "This checkpoint has no tokenizer, so text cannot be tokenized; put its tokenizer.json beside it."
        )
    return tokenizer
