"""A tiny random CLIP in a folder, as transformers saves one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<pad>", "<unk>", "<bos>", "<eos>", "a", "red", "green", "blue", "kite", "fox", "mia", "waves", ".", "is"]


def make_clip(folder: Path, kind: str = "clip", width: int = 16) -> Path:
    """Writes a CLIPModel or a SiglipModel of `width`, its tokenizer and its image processor."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "eos_token_id": 3,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    extra = {"projection_dim": width} if kind == "clip" else {}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **extra)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=16,
    )
    size = {"height": 32, "width": 32}
    processor = getattr(transformers, f"{name}ImageProcessor")(size=size, crop_size=size)
    getattr(transformers, f"{name}Processor")(image_processor=processor, tokenizer=fast).save_pretrained(folder)
    return folder
