"""Word Mask: where in an image a word of its text is, as a MASK to redraw just that."""

from __future__ import annotations

import re

import torch
from comfy_api.latest import io, ui

from ..comfy_mminterleaved.errors import SettingError
from ..comfy_mminterleaved.generation.word_masks import word_mask
from .blocks import progress
from .segments import images_from_batch
from .types import CATEGORY, ContrastiveSocket, advanced


class WordMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedWordMask",
            display_name="Word Mask",
            category=CATEGORY,
            description="Finds where in an image a word of its text is, by covering it piece by piece. With Set Latent Noise Mask "
            "and KSampler, only that is drawn anew.",
            is_output_node=True,
            inputs=[
                ContrastiveSocket.Input("contrastive", tooltip="Compares the image with the text."),
                io.Image.Input("image", tooltip="An image, or a batch."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="What the image shows, such as its caption.",
                ),
                io.String.Input("word", default="", tooltip="The word of the text to look for, such as 'trumpet'."),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How sure a place must be to count, relative to the surest; lower gives a larger mask.",
                ),
                io.Int.Input(
                    "grow",
                    default=4,
                    min=-256,
                    max=256,
                    tooltip="By how many pixels the mask grows on all sides; below 0 it shrinks.",
                ),
                *advanced(
                    io.String.Input(
                        "rivals",
                        default="",
                        tooltip="Words of the same kind, separated by commas, such as 'drum, kite, apple': what might be "
                        "there instead. They make the mask sharper. Empty: the word is left out.",
                    )
                ),
            ],
            outputs=[
                io.Mask.Output("mask_out", display_name="mask"),
                io.Image.Output("preview_out", display_name="preview", tooltip="The image with the mask in red."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, contrastive, image, text, word, threshold, grow, rivals) -> io.NodeOutput:
        if not text.strip():
            raise SettingError("The text is empty; write what the image shows, with the word in it.")
        names = [name.strip() for name in re.split(r"[,\n]", rivals) if name.strip()]
        segments = images_from_batch(image)
        masks = [
            word_mask(contrastive, segment, text, word, names, threshold, grow, progress(100)) for segment in segments
        ]
        mask = torch.stack(masks)
        preview = overlay(image[..., :3].float().cpu(), mask)
        return io.NodeOutput(mask, preview, ui=ui.PreviewImage(preview, cls=cls))


def overlay(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Images `(N, H, W, 3)` with a mask `(N, H, W)` in red over them."""
    alpha = 0.5 * mask[..., None]
    return images * (1 - alpha) + torch.tensor([0.95, 0.15, 0.15]) * alpha
