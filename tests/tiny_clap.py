"""A tiny random CLAP in a folder, as transformers saves one."""

from pathlib import Path

import torch
from tiny_clip import WORDS


def make_clap(folder: Path) -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    old = transformers.__version__.startswith("4.")  # its processor takes one class of tokenizers only
    audio = transformers.ClapAudioConfig(
        window_size=4,
        num_mel_bins=16,
        spec_size=64,
        patch_size=4,
        patch_stride=[4, 4],
        num_classes=2,
        hidden_size=16,
        projection_dim=16,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        patch_embeds_hidden_size=8,
        enable_fusion=False,
        num_hidden_layers=2,
    )
    text = transformers.ClapTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        projection_dim=16,
        pad_token_id=0,
    )
    config = transformers.ClapConfig(
        text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=16, hidden_size=16
    )
    transformers.ClapModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    kind = getattr(transformers, "RobertaTokenizerFast" if old else "PreTrainedTokenizerFast")
    fast = kind(tokenizer_object=tokenizer, **special, model_max_length=30)
    extractor = transformers.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8000,
        hop_length=80,
        fft_window_size=256,
        max_length_s=1,
        frequency_max=4000,
        truncation="rand_trunc",
    )
    transformers.ClapProcessor(feature_extractor=extractor, tokenizer=fast).save_pretrained(folder)
    return folder
