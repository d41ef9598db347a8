"""Text to token ids and back, through the `tokenizers` library: one tokenizer.json, no transformers at run time."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from .config import SpecialTokens
from .errors import CheckpointError


class Tokenizer:
    """Encodes text to ids that are never special tokens; the name of a special token is encoded as plain text.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        special: ids that no text may encode to.
        vocab_size: number of ids that may have text; the start-of-image and image tokens follow.
    """

    def __init__(self, tokenizer, special: SpecialTokens, vocab_size: int):
        tokenizer.encode_special_tokens = True
        self.tokenizer, self.special, self.vocab_size = tokenizer, special, vocab_size
        # A sentencepiece vocabulary puts a space before every text by itself, a byte-level one does not.
        self.adds_space = "▁" in tokenizer.get_vocab()

    @classmethod
    def load(cls, path: str | Path, special: SpecialTokens, vocab_size: int) -> Tokenizer:
        """Reads a tokenizer.json; raises CheckpointError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"The tokenizer {str(path)!r} cannot be read: {error}.") from None
        return cls.of_text(text, special, vocab_size, str(path))

    @classmethod
    def of_text(cls, text: str, special: SpecialTokens, vocab_size: int, path: str = "") -> Tokenizer:
        """Reads the text of a tokenizer.json; raises CheckpointError."""
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"The tokenizer {path!r} cannot be read: {error}.") from None
        return cls(backend, special, vocab_size)

    def to_text(self) -> str:
        return self.tokenizer.to_str()

    def encode(self, text: str, after_text: bool = False) -> list[int]:
        """Ids of a stretch of text; `after_text` separates it by a space from text before it."""
        if after_text and text and not self.adds_space:
            text = " " + text
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        # A vocabulary may list a special token as ordinary text; it then becomes the unknown id, 0.
        forbidden = self.special.all()
        return [0 if i in forbidden or i >= self.vocab_size else i for i in ids]

    def decode(self, ids) -> str:
        """Text of ids; special tokens have none, and control characters are left out."""
        forbidden = self.special.all()
        text = self.tokenizer.decode([i for i in ids if i not in forbidden], skip_special_tokens=False)
        return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")

    def save(self, path: str | Path) -> None:
        self.tokenizer.save(str(path))


def byte_level(vocab_size_below: int) -> object:
    """A byte-level tokenizer for models that were not trained.

    Ids 0, 1 and 2 are the unknown, bos and eos tokens, bytes start at 3. Raises CheckpointError if `vocab_size_below`
    is under 259.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    if vocab_size_below < 259:
        raise CheckpointError(f"A byte-level vocabulary needs 259 ids, not {vocab_size_below}.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {symbol: i + 3 for i, symbol in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
