"""A chat model of one's own, loaded by transformers from a folder or a GGUF file; nothing is downloaded."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import CheckpointError, SettingError
from ..generation.config import GeneratedText, TextGenerationConfig
from ..stories.images import to_pil
from ..stories.story import ImageSegment
from .prompts import Parts

IMAGE_SIDE = 768  # px: larger images cost tokens, and stories need no more


def is_model(path: Path) -> bool:
    """Whether a path is a folder of transformers, or a GGUF file."""
    if path.suffix.lower() == ".gguf":
        return path.is_file()
    return (path / "config.json").is_file() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin")))


def sees_images(config) -> bool:
    """Whether a model's configuration has a part for images."""
    return getattr(config, "vision_config", None) is not None


def load_chat_model(path: str | Path, dtype: torch.dtype = torch.float32) -> LocalChat:
    """Reads a model into memory; raises CheckpointError.

    Args:
        path: A folder with config.json, weights and tokenizer, or a .gguf file, which the `gguf` package reads.
    """
    path = Path(path)
    if not is_model(path):
        raise CheckpointError(
            f"{str(path)!r} is no language model: it must be a folder with config.json, or a .gguf file."
        )
    is_gguf = path.is_file()
    if is_gguf:
        from ..checkpoints.gguf_files import import_gguf

        import_gguf()
    import transformers

    folder = path.parent if is_gguf else path
    options = {"local_files_only": True, "trust_remote_code": False, **({"gguf_file": path.name} if is_gguf else {})}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        sees = sees_images(config) and not is_gguf
        kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
        processor = reader.from_pretrained(folder, **options)
        if sees and getattr(processor, "image_processor", None) is None:
            raise CheckpointError(f"The model {path.name!r} lacks preprocessor_config.json; copy all its files.")
        model = kind.from_pretrained(folder, config=config, dtype=dtype, **options).eval().requires_grad_(False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises what it likes for a folder that lacks something
        raise CheckpointError(f"The language model {path.name!r} cannot be loaded: {_first_sentence(error)}.") from None
    return LocalChat(model, processor, path.name)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300].split(". ")[0].rstrip(".") or type(error).__name__


class LocalChat:
    """A `chat.ChatModel` in this process. Every prompt is read whole, so an answer depends on it and the seed alone.

    Args:
        model: A causal language model of transformers, which may see.
        processor: Its processor if it sees, else its tokenizer.
    """

    def __init__(self, model: torch.nn.Module, processor, label: str):
        self.model, self.processor, self.label = model, processor, f"The writer {label!r}"
        self.sees_images = sees_images(model.config)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        # What its own file says of sampling does not count.
        saved = model.generation_config
        ids = {name: getattr(saved, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
        model.generation_config = type(saved)(**ids)
        self.device = torch.device("cpu")  # where prompts go; whoever moves the model sets it

    @torch.inference_mode()
    def chat(
        self,
        parts: Parts,
        config: TextGenerationConfig,
        on_text: Callable[[str], object] | None = None,
    ) -> GeneratedText:
        """The model's answer; `on_text` is called after every token, and what it raises ends the answer."""
        inputs = self.encode(parts, config.max_new_tokens)
        length, errors = inputs["input_ids"].shape[1], []
        self.reserve(length + config.max_new_tokens)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            try:
                out = self.model.generate(
                    **inputs,
                    **_generation_options(config, length),
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                    stopping_criteria=[self._criterion(length, on_text, errors)],
                )
            except (ValueError, TypeError, KeyError, IndexError) as error:
                if errors:  # the caller's own, Cancel for example
                    raise
                raise CheckpointError(f"{self.label} cannot write: {_first_sentence(error)}.") from None
        ids = out[0].tolist()
        reason = "length" if len(ids) - length >= config.max_new_tokens and not self._is_end(ids[-1]) else "eos"
        return GeneratedText(tuple(ids[length:]), reason, self._decode(ids[length:]))

    @torch.inference_mode()
    def score(
        self, parts: Parts, options: Sequence[str], on_text: Callable[[str], object] | None = None
    ) -> list[float]:
        """The log-probability of each option as the answer; a prompt without images is read once.

        Models that see place tokens by what they saw before, so theirs are read whole for each option.
        """
        inputs = self.encode(parts)
        ids = [
            self.tokenizer(option, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.device)
            for option in options
        ]
        self.reserve(inputs["input_ids"].shape[1] + max(tokens.shape[1] for tokens in ids))
        parameters = inspect.signature(self.model.forward).parameters
        keeps_logits = "logits_to_keep" in parameters
        cache_name = "cache" if "cache" in parameters else "past_key_values"  # transformers 5.24 renamed it
        first, scores = None, []
        if not self.sees_images:
            first = self.model(**inputs, use_cache=True, **({"logits_to_keep": 1} if keeps_logits else {}))
        for option, tokens in zip(options, ids):
            if on_text is not None:
                on_text(option)
            count = tokens.shape[1]
            if first is None:
                logits = self._logits_whole(inputs, tokens, keeps_logits)
            elif count == 1:
                logits = first.logits[:, -1:]
            else:
                after = self.model(input_ids=tokens[:, :-1], **{cache_name: copy.deepcopy(getattr(first, cache_name))})
                logits = torch.cat([first.logits[:, -1:], after.logits], dim=1)
            scores.append(float(logits.float().log_softmax(-1).gather(2, tokens[:, :, None]).sum()))
        return scores

    def _logits_whole(self, inputs: dict, tokens: torch.Tensor, keeps_logits: bool) -> torch.Tensor:
        """The logits of an option's tokens after a prompt, both read together."""
        count, whole = tokens.shape[1], dict(inputs)
        whole["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
            if name in inputs:
                whole[name] = torch.cat([inputs[name], torch.full_like(tokens, fill)], dim=1)
        kept = {"logits_to_keep": count + 1} if keeps_logits else {}
        return self.model(**whole, use_cache=False, **kept).logits[:, -count - 1 : -1]

    def reserve(self, num_tokens: int) -> None:
        """Called before the model runs on so many tokens; whoever moves the model loads it here."""

    def cache_bytes(self, num_tokens: int) -> int:
        """What keys and values of so many tokens take, and the logits of one."""
        c = self.model.config.get_text_config()
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        per_token = (
            2 * c.num_hidden_layers * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head_dim
        )
        return num_tokens * (per_token + 4 * c.hidden_size) * self.model.dtype.itemsize + 8 * c.vocab_size

    def encode(self, parts: Parts, reserve_tokens: int = 0) -> dict:
        """Inputs of a prompt as the model's chat template lays it out; raises SettingError if it is too long."""
        try:
            inputs = self._encode(parts)
        except SettingError:
            raise
        except Exception as error:  # templates and processors raise what they like
            raise SettingError(f"{self.label} cannot read the prompt: {_first_sentence(error)}.") from None
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)  # of tokenizers that serve several kinds of models
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1]
        if limit is not None and length + reserve_tokens > limit:
            raise SettingError(
                f"{self.label} reads {limit} tokens at most; the story so far has {length}, and {reserve_tokens} are "
                "to be written. Lower max_tokens, or tell a shorter story."
            )
        return {
            name: value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
        }

    def _encode(self, parts: Parts):
        images = [self._image(part) for part in parts if isinstance(part, ImageSegment)]
        # Older exports have it with the tokenizer alone.
        template = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if template:
            content = [
                {"type": "image"} if isinstance(part, ImageSegment) else {"type": "text", "text": part}
                for part in parts
            ]
            message = {"role": "user", "content": content if self.sees_images else "".join(parts)}
            thinking = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
            text = self.processor.apply_chat_template(
                [message], chat_template=template, add_generation_prompt=True, tokenize=False, **thinking
            )
            options = {"add_special_tokens": False}
        elif images:
            raise SettingError(f"{self.label} has no chat template, so it cannot be shown images.")
        else:
            text, options = "".join(parts) + "\n", {}
        if not self.sees_images:
            return self.processor([text], return_tensors="pt", **options)
        return self.processor(text=[text], **({"images": images} if images else {}), return_tensors="pt", **options)

    def _image(self, segment: ImageSegment):
        image = to_pil(segment.pixels)
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        return image

    def _criterion(self, length: int, on_text, errors: list):
        """Called by transformers after every token; `errors` gets what `on_text` raises."""

        def criterion(input_ids, scores, **_):
            if on_text is not None:
                try:
                    on_text(self._decode(input_ids[0, length:].tolist()))
                except BaseException as error:
                    errors.append(error)
                    raise
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        return criterion

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _is_end(self, token: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends]) or token == self.tokenizer.eos_token_id


def _generation_options(config: TextGenerationConfig, length: int) -> dict:
    """A TextGenerationConfig as arguments of transformers' `generate`; what the model's own file says is overridden."""
    options = {
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": min(config.min_new_tokens, config.max_new_tokens),
        "do_sample": config.do_sample,
        "num_beams": 1,
        "repetition_penalty": 1.0,
    }
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    if config.repetition_penalty != 1.0:
        from transformers import RepetitionPenaltyLogitsProcessor

        # Of the new text alone: names of the story are to return.
        penalty = RepetitionPenaltyLogitsProcessor(config.repetition_penalty, prompt_ignore_length=length)
        options["logits_processor"] = [penalty]
    return options
