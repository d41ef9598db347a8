"""Runs inside ComfyUI: Apply Story References on toy models of its own classes, against the stock nodes."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample(model, positive, negative, channels, cfg=3.0):
    import comfy.sample
    import comfy.samplers
    import torch

    noise = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(5))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    sampler = comfy.samplers.sampler_object("euler")
    zeros = torch.zeros_like(noise)
    return comfy.sample.sample_custom(model, noise, cfg, sampler, sigmas, positive, negative, zeros, disable_pbar=True)


def once(encode):
    """`encode` that remembers what it was given: a megapixel takes seconds."""
    encoded = {}

    def encode_once(pixels):
        key = pixels.numpy().tobytes()
        if key not in encoded:
            encoded[key] = encode(pixels)
        return encoded[key]

    return encode_once


def same(one, other) -> bool:
    """Whether two conditionings are equal to the bit."""
    import torch

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return a == b

    return equal(one, other)


def controls_seen(patched, positive, negative) -> list[bool]:
    """For each pass of the U-Net that draws, whether ControlNet's output is there; core's U-Net empties its lists."""
    patched, seen = patched.clone(), []
    model = patched.model.diffusion_model
    forward = model._forward

    def counted(x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        state = (transformer_options or {}).get("mm_interleaved_references")
        if state is None or not state["is_recording"]:
            seen.append(bool(control and control["output"]))
        return forward(x, timesteps, context, y, control, transformer_options, **kwargs)

    def with_control(apply_model, arguments):
        control = {"output": [None, None], "middle": [], "input": []}
        return apply_model(arguments["input"], arguments["timestep"], **{**arguments["c"], "control": control})

    patched.set_model_unet_function_wrapper(with_control)
    model._forward = counted
    try:
        sample(patched, positive, negative, 4)
    finally:
        del model._forward
    return seen


def checks():
    import torch

    load("in_comfyui").package()
    from comfy_extras.nodes_qwen import TextEncodeQwenImageEditPlus
    from mmi.comfy_mminterleaved.stories.story import ImageSegment, Story
    from mmi.nodes.reference_attention import has_self_attention
    from mmi.nodes.references import ApplyStoryReferences, scale_to_pixels, takes_reference_latents

    import nodes

    tiny = load("tiny_models")
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 96, generator=generator), torch.rand(3, 80, 64, generator=generator)]
    story = Story.of(*(ImageSegment(image) for image in images), "Mia runs.")
    batches = [image.movedim(0, -1).unsqueeze(0) for image in images]
    result = {}

    def apply(parts, references=2, strength=1.0, megapixels=1.0, story=story, start=0.0, end=1.0, fidelity=0.5):
        settings = references, megapixels, "the model's own", 0.0, strength, fidelity, start, end
        return ApplyStoryReferences.execute(*parts, story, "A drawing of", "ugly", *settings).result

    with torch.inference_mode():
        parts = {name: make() for name, make in tiny.FAMILIES.items()}
        for name, (model, _, _) in parts.items():
            result[f"{name} takes"] = takes_reference_latents(model), has_self_attention(model)

        # Flux: the stock chain of VAE Encode and ReferenceLatent.
        model, clip, vae = parts["flux"]
        expected = nodes.CLIPTextEncode().encode(clip, "A drawing of Mia runs.")[0]
        for batch in batches:
            from comfy_extras.nodes_edit_model import ReferenceLatent

            latent = {"samples": vae.encode(scale_to_pixels(batch, 0.02 * 1024 * 1024, 8))}
            expected = ReferenceLatent.execute(expected, latent).result[0]
        patched, positive, negative, references = apply(parts["flux"], megapixels=0.02)
        result["flux equal"] = same(positive, expected)
        result["references"] = list(references.shape)
        one, other = (sample(model, each, negative, 16, 1.0) for each in (positive, expected))
        result["flux drawn equal"] = torch.equal(one, other)
        none = apply(parts["flux"], references=0)[1]
        result["flux looks"] = float((sample(model, none, negative, 16, 1.0) - one).abs().max())
        result["flux without"] = same(none, nodes.CLIPTextEncode().encode(clip, "A drawing of Mia runs.")[0])

        # Qwen-Image-Edit: the stock node for several images.
        model, clip, vae = parts["qwen"]
        vae.encode = once(vae.encode)
        expected = TextEncodeQwenImageEditPlus.execute(clip, "A drawing of Mia runs.", vae, *batches).result[0]
        positive = apply(parts["qwen"])[1]
        result["qwen equal"] = same(positive, expected)

        # U-Nets: their self-attention.
        for name in ("sd15", "sdxl"):
            model = parts[name][0]
            patched, positive, negative, _ = apply(parts[name], megapixels=0.02)
            plain = sample(model, positive, negative, 4)
            drawn = sample(patched, positive, negative, 4)
            off = apply(parts[name], megapixels=0.02, strength=0.0)[0]
            late = apply(parts[name], megapixels=0.02, start=0.9)[0]
            weak = apply(parts[name], megapixels=0.02, strength=0.1)[0]
            other = Story.of(*(ImageSegment(1 - image) for image in images), "Mia runs.")
            changed = apply(parts[name], megapixels=0.02, story=other)[0]
            result[f"{name} off"] = torch.equal(sample(off, positive, negative, 4), plain)
            result[f"{name} not yet"] = torch.equal(sample(late, positive, negative, 4), plain)
            result[f"{name} looks"] = float((drawn - plain).abs().max())
            result[f"{name} looks less"] = float((sample(weak, positive, negative, 4) - plain).abs().max())
            result[f"{name} at them"] = float((sample(changed, positive, negative, 4) - drawn).abs().max())
            needed = model.model.memory_required

            def short_of_memory(shape, *args, needed=needed, **kwargs):
                return needed(shape, *args, **kwargs) if shape[0] == 1 else 1e15

            patched.model.memory_required = short_of_memory
            result[f"{name} apart"] = float((sample(patched, positive, negative, 4) - drawn).abs().max())
            both = apply(parts[name], megapixels=0.02, fidelity=0.0)[0]
            together = sample(both, positive, negative, 4)
            swapped = sample(both, negative, positive, 4, -2.0)  # the halves of guidance the other way round
            del patched.model.memory_required
            result[f"{name} swapped"] = float((swapped - together).abs().max())
            seen = controls_seen(patched, positive, negative)
            result[f"{name} control"] = [len(set(seen)), seen.count(True)]
            # The negative half alone (guidance 0) is the plain model's at fidelity 1, halfway at 0.5.
            halves = [apply(parts[name], megapixels=0.02, fidelity=f)[0] for f in (1.0, 0.5, 0.0)]
            alone = sample(model, positive, negative, 4, 0.0)
            distances = [float((sample(each, positive, negative, 4, 0.0) - alone).abs().max()) for each in halves]
            result[f"{name} negative"] = distances
    return result
