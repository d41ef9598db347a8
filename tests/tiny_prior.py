"""A tiny random prior in a folder, as diffusers saves Karlo's and Kandinsky 2.2's."""

from pathlib import Path

import torch


def make_prior(folder: Path, scheduler: str = "prior_scheduler", width: int = 16, length: int = 12) -> Path:
    """Writes prior, text encoder, tokenizer and scheduler; `width` of embeddings, `length` of texts in tokens."""
    from diffusers import PriorTransformer, UnCLIPScheduler
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    prior = PriorTransformer(2, 8, 1, embedding_dim=width, num_embeddings=length)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prior.save_pretrained(folder / "prior")
    UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0).save_pretrained(folder / scheduler)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=3,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", length)
    return folder


def write_tokenizer(folder: Path, length: int) -> None:
    """CLIP's own kind of tokenizer, of single letters and a few words."""
    import json

    folder.mkdir(parents=True)
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    names = ["<pad>", "<unk>", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in [*letters, "."])]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special |= {"pad_token": "<|endoftext|>"}
    about = {**special, "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
