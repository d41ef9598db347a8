"""MMInterleavedPipeline: the blocks of one model together. Stories in, text and images out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from .author import Author
from .checkpoints.tensors import read_tensors
from .config import BLOCKS, Config
from .drawing import DrawingMixin
from .errors import SettingError
from .generation.config import (
    CANDIDATE_STEP,
    GeneratedText,
    GenerationConfig,
    ImageGenerationConfig,
    OnStep,
    RankedOption,
    TextGenerationConfig,
    check_conditioner_name,
)
from .generation.embedders import FeatureEmbedder
from .generation.image import ImageGenerator
from .generation.placement import Placement, choose_batch_size
from .generation.prior import ImagePrior
from .generation.ranking import RankedImage, check_rankable, panel_text, rank_images
from .generation.refine import ImageRefiner, check_size
from .generation.systems import Systems
from .generation.text import TextGenerator
from .loading import load_model, resolve_device, tiny_random_blocks
from .models.gmail_adapter import encode_image, features_id
from .models.image_processor import preprocess_image
from .models.lora import LoRA, read_kohya
from .models.mmfs import fuse_mmfs
from .models.visual_tokenizer import ImageFeatures
from .stories.story import ImageSegment, Story
from .stories.storyboard import panel_seeds, plan_panels
from .storyteller import run_plan, run_plans


class MMInterleavedPipeline(DrawingMixin):
    """A whole model: `load` one, then `generate_story`, `generate_text`, `generate_image`, `answer`, `caption`, `rank`.

    The LLM's cache of the most recent story is kept, so that extending it costs only what is new; `clear_cache` frees
    it. `text` and `image` are the generators that do the work.
    """

    def __init__(
        self,
        config: Config,
        modules: dict[str, torch.nn.Module],
        tokenizer=None,
        known_words: frozenset[str] | None = None,
        generation_config: GenerationConfig = GenerationConfig(),
        folder: Path | None = None,
    ):
        self.config = config
        self.encoder, self.llm, self.synchronizer, self.unet, self.vae = (modules[name] for name in BLOCKS)
        self.text = TextGenerator(self.llm, config, tokenizer, known_words, generation_config)
        self.image = ImageGenerator(config, self.synchronizer, self.unet, self.vae)
        self.placement: Placement | None = None
        self.folder = folder
        self.drawn_adapter: LoRA | None = None
        self._lora_handles: list = []

    @classmethod
    def load(
        cls,
        source: str | Path = "starter",
        device: str = "auto",
        dtype: torch.dtype | None = None,
        compile: bool = False,
        memory: int | str | None = None,
        cache_dtype: torch.dtype | None = None,
        quantize: str | None = None,
        image_size: tuple[int, int] | None = None,
        lora: str | Path | None = None,
    ) -> MMInterleavedPipeline:
        """Loads a checkpoint folder of either layout, or a model that comes with the package.

        Args:
            source: A folder; "starter", the small model that ships with the package and knows one picture-book world;
                or "tiny-random", a tiny model with random weights, for tests.
            device: "auto" takes CUDA if there is one.
            dtype: Of what is computed; None for float16 on CUDA and float32 on the CPU, where a large model is computed
                in bfloat16 if the processor has units for it.
            compile: Compile the U-Net's blocks and the LLM's token step with `torch.compile`. The first image and the
                first text wait for it, so it pays for many; it needs a compiler (Triton on CUDA, C++ on the CPU).
            memory: Of the card that may be used, in bytes or like "12GB": blocks that do not fit together take turns,
                and an LLM that does not fit alone is copied in parts (`generation.placement`). None for what is free.
                The CPU can stand in for a card, for tests: it then holds copies.
            image_size: `(width, height)` of the images that `memory` is planned for; None for the model's own.
            cache_dtype: Of the LLM's cache, like `torch.float8_e4m3fn`; None for `dtype`.
            quantize: "fp8" or "int8" to quantize the LLM's attention and MLP while it loads, with torchao; the
                computer's memory must hold the model as it is. `convert --quantize` does it once for all.
            lora: A file for `load_lora`.

        Raises:
            SettingError: If the model does not fit `memory`, however it is placed.
            CheckpointError: If the device cannot be used, or tensors are missing, unexpected or of the wrong shape; the
                error lists them.
        """
        target = resolve_device(device)
        model = load_model(source, target, dtype, compile, memory, cache_dtype, quantize, image_size)
        pipeline = cls(
            model.config, model.modules, model.tokenizer, model.known_words, model.generation_config, model.folder
        )
        if model.plan is not None:
            pipeline.placement = Placement(model.plan, model.modules, target)
        pipeline.llm.cache_dtype = cache_dtype
        if lora is not None:
            pipeline.load_lora(lora)
        return pipeline.compile() if compile else pipeline

    def compile(self, **options) -> MMInterleavedPipeline:
        """This pipeline with `torch.compile` (and its `options`) on the U-Net's blocks and the LLM's token step."""
        self.unet.compile_repeated_blocks(**options)
        self.llm.compile_decode_step(**options)
        return self

    @property
    def tokenizer(self):
        return self.text.tokenizer

    @property
    def generation_config(self) -> GenerationConfig:
        return self.text.generation_config

    @property
    def known_words(self) -> frozenset[str] | None:
        return self.text.known_words

    @property
    def device(self) -> torch.device:
        return self.llm.device

    def _place(self, phase: str) -> None:
        if self.placement is not None:
            self.placement.place(phase)

    def placed_text_generator(self) -> TextGenerator:
        """`text`, with the LLM where it computes."""
        self._place("text")
        return self.text

    @cached_property
    def systems(self) -> Systems:
        """What stands beside the blocks. It holds the pipeline, so it is made when it is first used."""
        return Systems(
            self.folder, self.config, self.llm, self._encode_all, lambda: (self.device, self.llm.soi_token.dtype)
        )

    def clear_cache(self) -> None:
        """Frees the LLM's cache of the most recent story."""
        self.text.clear_cache()

    def find_unknown_words(self, story: Story) -> list[str]:
        """Words of a story that the model was not taught, each once; none for a model of open vocabulary."""
        return self.text.find_unknown_words(story)

    # ---- encoding ----

    @torch.no_grad()
    def encode_images(self, story: Story, encoded: dict[tuple[str, str], ImageFeatures] | None = None) -> Story:
        """Returns the story with this encoder's features on every image; features that it already has are kept.

        Args:
            encoded: Features by the images' `features_key`, to look up and to fill.
        """
        encoder_id, size = self.encoder.encoder_id, self.config.encoder.image_size
        encoded = {} if encoded is None else encoded

        def encode(image: ImageSegment) -> ImageSegment:
            expected = features_id(encoder_id, image.origin, self.drawn_adapter)
            if image.features is not None and image.features.encoder_id == expected:
                return image
            key = image.features_key
            if key not in encoded:  # one at a time, so memory and result depend on it alone
                self._place("encode")
                pixels = preprocess_image(image.pixels, size).unsqueeze(0).to(self.device, self.llm.soi_token.dtype)
                encoded[key] = encode_image(self.encoder, pixels, image.origin, self.drawn_adapter)
            return image.with_features(encoded[key])

        return story.map_images(encode)

    def _encode_all(self, images: Sequence[ImageSegment]) -> Sequence[ImageSegment]:
        return self.encode_images(Story.of(*images)).images

    def load_lora(self, path: str | Path, scale: float = 1.0) -> MMInterleavedPipeline:
        """Adds a LoRA file of `finetune` to the LLM and the U-Net, in place of one that was added before.

        The weights stay as they are.

        Raises:
            CheckpointError: If the file is no LoRA, or one for another model.
        """
        path = Path(path)
        loras = read_kohya(read_tensors(path), {"llm": self.llm, "unet": self.unet}, repr(path.name))
        self.unload_lora()
        for block, lora in loras.items():
            module, weight = getattr(self, block), next(getattr(self, block).parameters())
            self._lora_handles += lora.to(self.device, weight.dtype).attach(module, scale)
        torch.compiler.reset()  # compiled code does not see new hooks
        return self

    @property
    def has_lora(self) -> bool:
        return bool(self._lora_handles)

    def unload_lora(self) -> None:
        """Takes away what `load_lora` added."""
        for handle in self._lora_handles:
            handle.remove()
        self._lora_handles = []
        self.clear_cache()

    def adapt_to_drawings(self, is_on: bool = True) -> None:
        """Has drawn images go through the encoder with the model's adapter for them (GMAIL), or no longer.

        Raises:
            CheckpointError: If the model has none, or one of another encoder.
        """
        self.drawn_adapter = self.systems.load_drawn_adapter(self.encoder) if is_on else None

    @property
    def embedder(self) -> FeatureEmbedder:
        """The model's own contrastive model (`Systems.embedder`)."""
        return self.systems.embedder

    @property
    def refiner(self) -> ImageRefiner:
        """The model's refiner (`Systems.refiner`)."""
        return self.systems.refiner

    @property
    def prior(self) -> ImagePrior:
        """The model's prior of image embeddings (`Systems.prior`)."""
        return self.systems.prior

    def refine_image(self, image: ImageSegment, story: Story = Story()) -> ImageSegment:
        """An image with a refined form of twice its size.

        Args:
            story: What it was drawn from, if it was: everything before it.
        """
        (prompt_embeds,) = self.prompt_embeds([story]) if story.segments else (None,)
        return self._refined(image, story, prompt_embeds)

    def _refined(self, image: ImageSegment, story: Story, prompt_embeds: torch.Tensor | None) -> ImageSegment:
        return replace(image, refined=self.refiner.refine(image.pixels, panel_text(story), prompt_embeds))

    def check_refine(self, config: ImageGenerationConfig) -> None:
        """Raises before anything is drawn if images could not be refined."""
        if config.refine:
            _ = self.refiner
            check_size(*self.image.check_image_size(config.size))

    def check_conditioner(self, config: ImageGenerationConfig) -> None:
        """Raises before anything is drawn if the model has no such conditioner."""
        if config.conditioner == "dream":
            _ = self.systems.dream

    def rank_images(self, story: Story, images: Sequence[ImageSegment]) -> list[RankedImage]:
        """Candidates for the image that comes next in a story, the best first (`ranking.rank_images`)."""
        return rank_images(self.embedder, story, self._encode_all(images))

    def prefill(self, story: Story, on_progress: Callable[[int, int], object] | None = None) -> None:
        """Encodes a story and runs the LLM on it ahead of its use (`TextGenerator.prefill`)."""
        story = self.encode_images(story)
        self._place("text")
        self.text.prefill(story, on_progress)

    def context_features(self, stories: Sequence[Story]) -> list[torch.Tensor]:
        """LLM hidden states of each story (`TextGenerator.context_features`)."""
        stories = [self.encode_images(story) for story in stories]
        self._place("text")
        return self.text.context_features(stories)

    @torch.no_grad()
    def prompt_embeds(self, stories: Sequence[Story], conditioner: str = "perceiver") -> torch.Tensor:
        """What the U-Net is conditioned on to draw the image that comes next in each story, `(N, num_queries, C)`.

        Args:
            conditioner: "perceiver", or "dream" for the model's dream queries.

        Raises:
            SettingError: For another conditioner.
        """
        check_conditioner_name(conditioner)
        stories = [self.encode_images(story) for story in stories]
        self._place("text")
        if conditioner == "dream":
            return self.systems.dream.prompt_embeds(self.text, stories)
        context = self.text.context_features(stories)
        self._place("draw")
        return self.synchronizer.conditioner.prompt_embeds(context)

    # ---- text ----

    def _encoded(self, story: Story, function: Callable, *args):
        """`function` of the encoded story, with the LLM in place."""
        story = self.encode_images(story)
        self._place("text")
        return function(story, *args)

    def generate_text(
        self, story: Story, config: TextGenerationConfig | None = None, on_token=None, drop_oldest: bool = False
    ) -> GeneratedText:
        """Continues a story with text, up to where the model ends it or requests an image.

        Args:
            config: None for the model's own (`generation_config`).
            on_token: Called with the text so far; a true result ends the text.
        """
        return self._encoded(story, self.text.generate_text, config, on_token, drop_oldest)

    def generate_texts(
        self,
        stories: Sequence[Story],
        config: TextGenerationConfig | None = None,
        num_outputs: int = 1,
        on_token=None,
        drop_oldest: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> list[list[GeneratedText]]:
        """Generates `num_outputs` texts for each story, independent of the other stories (`TextGenerator.generate`)."""
        stories = [self.encode_images(story) for story in stories]
        self._place("text")
        return self.text.generate(stories, config, num_outputs, on_token, drop_oldest, seeds)

    def answer(self, story: Story, question: str, config=None, prompt: str | None = None, on_token=None):
        """Answers a question about a story's images (`TextGenerator.answer`)."""
        return self._encoded(story, self.text.answer, question, config, prompt, on_token)

    def caption(self, image, config=None, num_outputs: int = 1, prompt: str | None = None) -> list[GeneratedText]:
        """Writes `num_outputs` captions of an image, or of a story's last image (`TextGenerator.caption`)."""
        story = image if isinstance(image, Story) else Story.of(ImageSegment.of(image))
        return self._encoded(story, self.text.caption, config, num_outputs, prompt)

    def score(self, story: Story, options: Sequence[str | list[int]]) -> list[float]:
        """Summed log-probability of each option after a story, in the order given."""
        return self._encoded(story, self.text.score, options)

    def rank(self, story: Story, options: Sequence[str], question: str = "", prompt=None) -> list[RankedOption]:
        """Ranks options, likeliest first (`TextGenerator.rank`)."""
        return self._encoded(story, self.text.rank, options, question, prompt)

    # ---- images ----

    def generate_image(
        self,
        story: Story,
        config: ImageGenerationConfig | None = None,
        init_image: ImageSegment | None = None,
        on_step: OnStep | None = None,
        drop_oldest: bool = False,
    ) -> ImageSegment:
        """Draws the image that comes next in a story.

        Args:
            config: None for the model's own (`generation_config`); with `best_of`, that many are drawn, and the best of
                them is kept.
            init_image: An image to start from (image to image), with `config.denoise`.
            on_step: Called with the step (from 1), their number, and a function that returns a preview `(1, 3, h, w)`.
        """
        return self.generate_images([story], config, 1, init_image and [init_image], on_step, drop_oldest)[0][0]

    def generate_images(
        self,
        stories: Sequence[Story],
        config: ImageGenerationConfig | None = None,
        num_outputs: int = 1,
        init_images: Sequence[ImageSegment] | None = None,
        on_step: OnStep | None = None,
        drop_oldest: bool = False,
        batch_size: int = 8,
        seeds: Sequence[int] | None = None,
    ) -> list[list[ImageSegment]]:
        """Draws `num_outputs` images for each story, independent of the other stories (`ImageGenerator.generate`)."""
        config = config or self.generation_config.image
        if num_outputs < 1:
            raise SettingError(f"The number of images must be at least 1, not {num_outputs}.")
        if seeds is not None and len(seeds) != len(stories):
            raise SettingError(f"Each of {len(stories)} stories needs a seed; there are {len(seeds)} seeds.")
        self.image.check(config)
        if config.best_of > 1:
            self.check_best_of(stories)
        self.check_refine(config)
        self.check_conditioner(config)
        full = stories
        stories = [self.text.truncate_to_context(story, 1, drop_oldest) for story in stories]
        stories = [self.encode_images(story) for story in stories]
        prompt_embeds = self.prompt_embeds(stories, config.conditioner)
        has_guidance = config.conditioner == "dream" and config.guidance_scale > 1
        negative = self.systems.dream.negative_prompt_embeds(self.text) if has_guidance else None
        self._place("draw")
        batch_size = 1 if self.placement is not None else batch_size
        if config.best_of == 1:
            outputs = self.image.generate(
                stories, None, config, num_outputs, init_images, on_step, batch_size, seeds, prompt_embeds, negative
            )
            return self._refine_outputs(outputs, full, prompt_embeds, config)
        # The first candidate has the noise of a single drawing; the others' is none that a panel uses.
        seeds = [config.seed] * len(stories) if seeds is None else seeds
        jobs = [(i, k, n) for i in range(len(stories)) for k in range(num_outputs) for n in range(config.best_of)]
        drawn = self.image.generate(
            [stories[i] for i, _, _ in jobs],
            None,
            config,
            1,
            [init_images[i] for i, _, _ in jobs] if init_images else None,
            on_step,
            batch_size,
            [(seeds[i] + k + n * CANDIDATE_STEP) % 2**63 for i, k, n in jobs],
            prompt_embeds[[i for i, _, _ in jobs]],
            negative,
        )
        candidates: dict[tuple[int, int], list[ImageSegment]] = {}
        for (i, k, _), (image,) in zip(jobs, drawn):
            candidates.setdefault((i, k), []).append(image)
        outputs = [
            [self.rank_images(story, candidates[i, k])[0].image for k in range(num_outputs)]
            for i, story in enumerate(full)
        ]
        return self._refine_outputs(outputs, full, prompt_embeds, config)

    @torch.no_grad()
    def _refine_outputs(self, outputs, stories, prompt_embeds, config) -> list[list[ImageSegment]]:
        if not config.refine:
            return outputs
        rows = zip(outputs, stories, prompt_embeds)
        return [[self._refined(image, *row) for image in images] for images, *row in rows]

    def check_best_of(self, stories: Sequence[Story]) -> None:
        """Raises before anything is drawn if candidates could not be ranked."""
        for story in stories:
            check_rankable(story)
        _ = self.embedder

    # ---- stories ----

    def generate_story(
        self,
        story: Story = Story(),
        panels: int = 3,
        image_first: bool | None = None,
        text_config: TextGenerationConfig | None = None,
        image_config: ImageGenerationConfig | None = None,
        seeds: Sequence[int] | None = None,
        on_token=None,
        on_step: OnStep | None = None,
        on_segment: Callable[[Story], object] | None = None,
        drop_oldest: bool = False,
        introduce: bool = True,
    ) -> Story:
        """Extends a story by `panels` panels, each text and image generated in view of everything before it.

        In text-first order, text at the end of `story` is the text of the next panel. The model decides where a text
        ends, not whether an image follows.

        Args:
            panels: How many images to add.
            image_first: Whether a panel's image comes before its text; None uses the order of the story, else of the
                model (`TextGenerator.resolve_image_first`). Panels of `story` in the other order are rearranged.
            seeds: One per panel, added to the seeds of the configs; by default the number of the panel in the story,
                from 0, so that a resumed story equals one generated at once.
            on_segment: Called with the story after each text and each image.
            introduce: Whether to add a text that says who is in an opening image (`introduce`).

        Returns:
            The whole story. New texts and images are segments of their own.

        Raises:
            SettingError: For a setting out of its range.
            StoryTooLongError: If the extended story does not fit the LLM's context.
        """
        if panels < 1:
            raise SettingError(f"The number of panels must be at least 1, not {panels}.")
        if seeds is not None and len(seeds) != panels:
            raise SettingError(f"There must be one seed per panel, {panels}, not {len(seeds)}.")
        opening = story.arrange(self.text.resolve_image_first(story, image_first))
        self.validate_plan(opening, plan_panels(opening, panels), text_config, image_config, drop_oldest)
        if introduce:
            opening = self.introduce(opening)
            if on_segment is not None and opening.text != story.text:
                on_segment(opening)
        plan = plan_panels(opening, panels)
        if seeds is not None:
            seeds = [*panel_seeds(opening, plan)[: len(plan) - panels], *seeds]
        return self.run_plan(
            opening, plan, text_config, image_config, seeds, on_token, on_step, on_segment, drop_oldest
        )

    def introduce(self, story: Story) -> Story:
        """Returns the story with a text that says who is in its only image, unless it has one (`vqa.introduce`)."""
        return self._encoded(story, self.text.introduce) if len(story.images) == 1 else self.text.introduce(story)

    def run_plan(
        self,
        story: Story,
        plan,
        text_config: TextGenerationConfig | None = None,
        image_config: ImageGenerationConfig | None = None,
        seeds: Sequence[int] | None = None,
        on_token=None,
        on_step: OnStep | None = None,
        on_segment: Callable[[Story], object] | None = None,
        drop_oldest: bool = False,
    ) -> Story:
        """`generate_story` with the steps of each panel spelled out (`storyteller.run_plan`)."""
        text_config = text_config or self.generation_config.text
        image_config = image_config or self.generation_config.image
        self.validate_plan(story, plan, text_config, image_config, drop_oldest)
        author = Author(self, text_config, image_config, on_token, on_step, drop_oldest)
        story = run_plan(author.encode(story), plan, author, author, seeds=seeds, on_segment=on_segment)
        return author.attach_features(story)

    def iterate_plans(
        self,
        stories: Sequence[Story],
        plans: Sequence,
        text_config: TextGenerationConfig | None = None,
        image_config: ImageGenerationConfig | None = None,
        seeds: Sequence[Sequence[int]] | None = None,
        on_token=None,
        on_step: OnStep | None = None,
        drop_oldest: bool = False,
    ) -> Iterator[dict[int, Story]]:
        """Extends several stories in step, so that they share passes of LLM and U-Net (`storyteller.run_plans`).

        A single story comes out as from `run_plan`. In a batch it can differ in the last bits of its states, so now and
        then in a pixel's last bit or in a word that was nearly as likely as another.

        Args:
            on_token: Called with the text so far of the first story that is not finished.
            seeds: Of each story, one per entry of its plan, added to the seeds of the configs.
        """
        author = Author(self, text_config, image_config, on_token, on_step, drop_oldest)
        stories = [author.encode(story) for story in stories]
        for grown in run_plans(stories, plans, author.write_all, author.illustrate_all, seeds=seeds):
            yield {i: author.attach_features(story) for i, story in grown.items()}

    def choose_batch_size(self, image_config: ImageGenerationConfig | None = None) -> int:
        """How many stories `iterate_plans` can extend in step with the memory that is free; 1 if blocks take turns."""
        if self.placement is not None:
            return 1
        size = (image_config or self.generation_config.image).size
        return choose_batch_size(self.config, self.device, self.llm.soi_token.dtype, size, self.llm.cache_dtype)

    def validate_plan(
        self,
        story: Story,
        plan,
        text_config: TextGenerationConfig | None = None,
        image_config: ImageGenerationConfig | None = None,
        drop_oldest: bool = False,
    ) -> None:
        """Raises SettingError for settings, and StoryTooLongError for a story, that `run_plan` cannot use."""
        text_config = text_config or self.generation_config.text
        image_config = image_config or self.generation_config.image
        seed = max(text_config.seed, image_config.seed)
        if seed + len(story) + len(plan) >= 2**63:
            raise SettingError(f"The seed {seed} is too large for {len(plan)} panels.")
        self.image.check(image_config)
        if image_config.best_of > 1:
            self.check_best_of([])
        self.check_refine(image_config)
        self.check_conditioner(image_config)
        self.text.check_context_length(story, plan, text_config, drop_oldest)


def tiny_random_pipeline(seed: int = 0) -> MMInterleavedPipeline:
    """A tiny model with random weights and a byte-level vocabulary; it runs all code, and its output is meaningless."""
    config, modules, tokenizer = tiny_random_blocks(seed)
    return MMInterleavedPipeline(config, {name: fuse_mmfs(block) for name, block in modules.items()}, tokenizer)
