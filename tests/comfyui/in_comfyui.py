"""Runs inside ComfyUI: the nodes against the library's own loop, and MODELs that do not fit."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


def package():
    """This project as ComfyUI imports it: a package under a name of ComfyUI's choice."""
    spec = importlib.util.spec_from_file_location("mmi", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["mmi"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def drawn(llm, synchronizer, unet, story, change=None, steps=3, strength=1.0):
    """Latents of a fixed noise by the native route; `change` may replace the conditionings."""
    import comfy.sample
    import comfy.samplers
    import torch
    from mmi.nodes.synchronize import ApplySynchronizer

    model, positive, negative = ApplySynchronizer.execute(llm, synchronizer, unet, strength, 0.0, 1.0, 2, story).result
    if change is not None:
        positive, negative = change(positive, negative)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    channels = model.model.latent_format.latent_channels
    noise = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(5))
    return comfy.sample.sample_custom(
        model,
        noise,
        3.0,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
    )


def passes(synchronizer, llm, unet, story) -> float:
    """How far guidance in two passes, as ComfyUI makes it when memory is short, is from one pass."""
    together = drawn(llm, synchronizer, unet, story)
    needed, sizes = unet.model.memory_required, []

    def short_of_memory(shape, *args, **kwargs):
        sizes.append(shape[0])
        return needed(shape, *args, **kwargs) if shape[0] == 1 else 1e15

    unet.model.memory_required = short_of_memory
    try:
        apart = drawn(llm, synchronizer, unet, story)
    finally:
        del unet.model.memory_required
    assert max(sizes) == 2
    return float((together - apart).abs().max())


def controlled(llm, synchronizer, unet, story) -> float:
    """How much a ControlNet of the U-Net's size, on the conditioning of Synchronize, changes the picture."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    import torch

    import nodes

    settings = {
        k: v
        for k, v in unet.model.model_config.unet_config.items()
        if k not in ("out_channels", "transformer_depth_output", "disable_unet_model_creation")
    }
    torch.manual_seed(3)
    net = comfy.cldm.cldm.ControlNet(**settings, hint_channels=3, operations=comfy.ops.disable_weight_init).eval()
    for parameter in net.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.05)
    control = comfy.controlnet.ControlNet(net, load_device=unet.load_device)
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    found = drawn(llm, synchronizer, unet, story, lambda p, n: apply(p, n, control, hint, 1.0, 0.0, 1.0))
    return float((found - drawn(llm, synchronizer, unet, story)).abs().max())


def mixtures(encoder, llm, synchronizer, unet, story) -> dict[str, str]:
    """What is said of an LLM of another width with this encoder and this synchronizer."""
    from dataclasses import replace

    from mmi.comfy_mminterleaved.models.build import init_modules
    from mmi.nodes.blocks import PatchedLLM
    from mmi.nodes.segments import encode_story
    from mmi.nodes.synchronize import ApplySynchronizer

    config = llm.config
    narrow = replace(
        config,
        llm=replace(config.llm, hidden_size=96),
        encoder=replace(config.encoder, llm_hidden_size=96),
        synchronizer=replace(
            config.synchronizer,
            llm_hidden_size=96,
            perceiver=replace(config.synchronizer.perceiver, encoder_hidden_size=96),
        ),
    )
    other = PatchedLLM(narrow, init_modules(narrow)["llm"].state_dict(), "other", None)
    found = {}
    for name, check in {
        "other LLM": lambda: ApplySynchronizer.execute(other, synchronizer, unet, 1.0, 0.0, 1.0, 1, story),
        "other encoder": lambda: other.check(encode_story(encoder, story)),
        "no encoder": lambda: llm.check(story),
    }.items():
        try:
            check()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def reused_tokens(encoder, llm, story) -> list[int]:
    """How many tokens each of four growing stories takes over from the one before, with loads by ComfyUI between."""
    from mmi.nodes.segments import encode_story

    lengths, reused = [], []
    forward = llm.module.forward

    def counted(x, *args, **kwargs):
        lengths.append(x.shape[1])
        return forward(x, *args, **kwargs)

    llm.module.forward = counted
    try:
        llm.generator.clear_cache()
        for _ in range(4):
            lengths.clear()
            llm.prepare(story)
            reused.append(len(llm.generator.tokenize(story)) - sum(lengths))
            story = encode_story(encoder, story.add(story.images[0].pixels, "She waves."))
    finally:
        del llm.module.forward
    return reused


def released(llm, story) -> dict[str, bool]:
    """Whether the LLM's cache counts as its memory, and goes when ComfyUI needs the memory."""
    import comfy.model_management as management

    def prefilled() -> int:
        llm.prepare(story)
        return llm.generator.cache.nbytes

    result, patcher = {}, llm.patcher
    weights = patcher.loaded_size() if llm.generator.cache is None else patcher.loaded_size() - patcher.cache_size()
    size = prefilled()
    result["counted"] = patcher.loaded_size() - weights == size > 0 == patcher.model_size() - weights - size
    result["kept at a load"] = not management.load_models_gpu([patcher]) and llm.generator.cache is not None
    result["first of all"] = patcher.partially_unload(llm.device, size // 2) == size and llm.generator.cache is None
    prefilled()
    result["then weights"] = patcher.partially_unload(llm.device, size + 1) > size and llm.generator.cache is None
    prefilled()
    management.unload_all_models()
    result["unloaded"] = llm.generator.cache is None
    prefilled()
    return result


def asked_for(llm, synchronizer, unet, story) -> dict[str, float]:
    """Memory that ComfyUI was asked for when it loaded the U-Net, beyond what it asks for without earlier images."""
    import comfy.model_management as management
    from mmi.comfy_mminterleaved.generation.memory import sampling_bytes

    load, asked = management.load_models_gpu, []

    def recorded(models, memory_required=0, *args, **kwargs):
        asked.append(memory_required)
        return load(models, memory_required, *args, **kwargs)

    management.load_models_gpu = recorded
    try:
        drawn(llm, synchronizer, unet, story, strength=1.0)
        with_images = asked[-1]
        drawn(llm, synchronizer, unet, story, strength=0.0)
    finally:
        management.load_models_gpu = load
    c = synchronizer.config.synchronizer
    return {"extra": with_images - asked[-1], "announced": sampling_bytes(c, 2, 2, (16, 16), 4)}


def precisions(llm, synchronizer, unet, story) -> dict[str, float]:
    """How far a drawing with each mixture of precisions of U-Net and synchronizer is from that in float32."""
    import torch

    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    net, block = unet.model.diffusion_model, synchronizer.module
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    blocks = {key: value.clone() for key, value in block.state_dict().items()}
    expected, result = drawn(llm, synchronizer, unet, story, steps=2), {}
    try:
        for unet_name, unet_dtype in names.items():
            net.to(unet_dtype).dtype = unet_dtype
            for name, dtype in names.items():
                block.to(dtype)
                synchronizer.dtype = dtype
                latents = drawn(llm, synchronizer, unet, story, steps=2).float()
                result[f"{unet_name}, {name}"] = float((latents - expected).abs().mean() / expected.abs().mean())
    finally:
        net.to(torch.float32).dtype = torch.float32
        block.to(torch.float32)
        synchronizer.dtype = torch.float32
        net.load_state_dict(weights)
        block.load_state_dict(blocks)
    return result


def partly_loaded(encoder, llm, synchronizer, story) -> dict[str, float]:
    """Blocks whose weights stay where they are (one byte of room) in a dtype of their own: each layer must cast.

    The largest difference to the whole block, and the share of weights that no layer of ComfyUI's holds.
    """
    import copy

    import comfy.model_patcher
    import torch

    maps = [level.unsqueeze(0).unsqueeze(0) for level in story.images[0].features.feature_maps]
    pixels = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    states = torch.randn(7, llm.config.llm.hidden_size, generator=torch.Generator().manual_seed(3))

    def run_llm(module):
        values = module.project_images(maps)
        x = module.embed_inputs(torch.tensor([[1, 5, 6, 768]])).to(states)
        mask = torch.ones(1, 4, 1, dtype=torch.bool)
        return module.logits(module(x, values, mask))

    def run_synchronizer(module):
        net = module.mmfs_module
        values = net.project_images(maps, torch.ones(1, 1, dtype=torch.bool), torch.float32)
        channels = synchronizer.config.synchronizer.block_channels
        h = torch.ones(1, channels[0], 16, 16)
        return net.add_residual(0, h, values, 1.0).flatten()[:1000] + module.conditioner.prompt_embeds([states]).mean()

    from mmi.comfy_mminterleaved.presets import STARTER_DIR
    from mmi.nodes.image_tokens import PatchedImageTokens

    tokens = PatchedImageTokens(STARTER_DIR, "starter")
    cells = torch.randint(1024, (1, 64, 5), generator=torch.Generator().manual_seed(4))
    prompt_embeds = torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(5))

    def run_decoder(module):
        values = module.trunk.project_images(maps)
        return module(cells, module.embed_prompt(prompt_embeds), values, torch.ones(1, 1, dtype=torch.bool))

    result = {}
    for name, block, run in (
        ("encoder", encoder, lambda module: module(pixels)[0].visual_tokens),
        ("llm", llm, run_llm),
        ("synchronizer", synchronizer, run_synchronizer),
        (
            "decoder of image tokens",
            SimpleNamespace(module=tokens.sampler.model, device=tokens.sampler.device),
            run_decoder,
        ),
    ):
        expected = run(block.module).float()
        module = copy.deepcopy(block.module).half()
        patcher = comfy.model_patcher.ModelPatcher(module, block.device, torch.device("cpu"))
        patcher.patch_model(block.device, lowvram_model_memory=1)
        result[name] = float((run(module).float() - expected).abs().max() / expected.abs().max())
        leaves = [m for m in module.modules() if hasattr(m, "comfy_cast_weights")]
        held = {id(p) for m in leaves for p in m.parameters(recurse=False)}
        loose = sum(p.numel() for p in (*module.parameters(), *module.buffers()) if id(p) not in held)
        result[f"{name}, loose"] = loose / sum(p.numel() for p in module.parameters())
    return result


def checks() -> dict:
    import comfy.sample
    import comfy.samplers
    import diffusers
    import torch

    package()
    from mmi.comfy_mminterleaved.generation.config import ImageGenerationConfig
    from mmi.comfy_mminterleaved.generation.image import denoise
    from mmi.comfy_mminterleaved.pipeline import MMInterleavedPipeline
    from mmi.comfy_mminterleaved.presets import STARTER_DIR
    from mmi.comfy_mminterleaved.stories.story import Story
    from mmi.nodes.load import LoadMMInterleaved
    from mmi.nodes.segments import encode_story
    from mmi.nodes.synchronize import ApplySynchronizer

    result, drawn = {}, {}
    with torch.inference_mode():
        encoder, llm, synchronizer, unet, vae = LoadMMInterleaved.execute("starter").result
        library = MMInterleavedPipeline.load(STARTER_DIR, "cpu", torch.float32)
        for module in (library.synchronizer, synchronizer.module):  # whatever was trained, the blocks must count
            generator = torch.Generator().manual_seed(1)
            for block in module.mmfs_module.blocks:
                weight = block.mmfs.output_proj.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
        generator = torch.Generator().manual_seed(0)
        pictures = [
            torch.rand(3, 16, 16, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2) for _ in range(2)
        ]
        story = Story.of("Mia is on the beach.", pictures[0], "Mia is in the forest.", pictures[1], "Mia sleeps.")
        for name, steps, cfg, strength, count in (
            ("guided", 6, 4.0, 1.0, 2),
            ("one picture", 6, 4.0, 1.0, 1),
            ("unguided", 5, 1.0, 1.0, 2),
            ("stronger", 5, 3.0, 1.5, 2),
            ("off", 5, 3.0, 0.0, 2),
            ("none seen", 5, 3.0, 1.0, 0),
        ):
            ready = ApplySynchronizer.execute(
                llm, synchronizer, unet, strength, 0.0, 1.0, count, encode_story(encoder, story)
            ).result
            model, positive, negative = ready
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
            latent = torch.zeros(2, model.model.latent_format.latent_channels, 16, 16)
            generators = (torch.Generator().manual_seed(seed) for seed in (7, 8))
            noise = torch.stack([torch.randn(latent.shape[1:], generator=generator) for generator in generators])
            found = comfy.sample.sample_custom(
                model,
                noise,
                cfg,
                comfy.samplers.sampler_object("euler"),
                sigmas,
                positive,
                negative,
                latent,
                disable_pbar=True,
            )
            native = vae.decode(found).movedim(-1, 1)

            class Fixed(diffusers.EulerDiscreteScheduler):
                def set_timesteps(self, count, device=None, sigmas=sigmas):
                    super().set_timesteps(sigmas=sigmas.tolist(), device=device)

            encoded = library.encode_images(story)
            context = library.text.context_features([encoded]) * 2
            states = library.synchronizer.conditioner.prompt_embeds(context)
            maps, image_mask = library.image.context_feature_maps([encoded] * 2, count)
            prepared = library.synchronizer.mmfs_module.project_images(maps, image_mask)
            own = denoise(
                library.unet,
                library.vae,
                Fixed.from_config(library.config.scheduler),
                library.synchronizer,
                states,
                prepared,
                ImageGenerationConfig(num_inference_steps=steps, guidance_scale=cfg, mmfs_scale=strength),
                [7, 8],
                (128, 128),
            )
            result[name] = float((native - own).abs().max() * 255)
            drawn[name] = native
        result["looking changes it"] = float((drawn["stronger"] - drawn["off"]).abs().max() * 255)
        result |= {
            "reused tokens": reused_tokens(encoder, llm, encode_story(encoder, story)),
            "precisions": precisions(llm, synchronizer, unet, encode_story(encoder, story)),
            "asked for": asked_for(llm, synchronizer, unet, encode_story(encoder, story)),
            "released": released(llm, encode_story(encoder, story)),
            "partly loaded": partly_loaded(encoder, llm, synchronizer, encode_story(encoder, story)),
            "two passes": passes(synchronizer, llm, unet, encode_story(encoder, story)),
            "a ControlNet": controlled(llm, synchronizer, unet, encode_story(encoder, story)),
            **mixtures(encoder, llm, synchronizer, unet, story),
        }
        clone = model.clone()
        result["a clone keeps the patch"] = clone.model_options["transformer_options"].get(
            "patches"
        ) == model.model_options["transformer_options"].get("patches")

        # MODELs that do not belong to the synchronizer, at toy widths.
        import comfy.model_base
        import comfy.supported_models

        settings = dict(unet.model.model_config.unet_config)

        class Other:
            def __init__(self, name, config, net):
                self.model = type(
                    name, (), {"model_config": type("C", (), {"unet_config": config})(), "diffusion_model": net}
                )()

        for name, other in {
            "wider": Other(
                "SDXL", {**settings, "model_channels": 320, "context_dim": 2048}, unet.model.diffusion_model
            ),
            "no unet": Other("Flux", {"image_model": "flux"}, torch.nn.Linear(1, 1)),
        }.items():
            try:
                ApplySynchronizer.execute(llm, synchronizer, other, 1.0, 0.0, 1.0, 1, story)
            except Exception as error:
                result[name] = f"{type(error).__name__}: {error}"
    return result
