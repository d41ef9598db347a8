"""The templates for other image models, and the files that each expects, for the page to offer if they are missing."""

from __future__ import annotations

HUB = "https://huggingface.co"
FILES = {  # folder in models/, and where a file comes from
    "flux1-dev-kontext_fp8_scaled.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/",
    ),
    "clip_l.safetensors": ("text_encoders", f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/"),
    "t5xxl_fp8_e4m3fn_scaled.safetensors": ("text_encoders", f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/"),
    "ae.safetensors": ("vae", f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/"),
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files/diffusion_models/",
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/text_encoders/",
    ),
    "qwen_image_vae.safetensors": ("vae", f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/"),
    "sd_xl_base_1.0.safetensors": ("checkpoints", f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"),
    "v1-5-pruned-emaonly-fp16.safetensors": (
        "checkpoints",
        f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/",
    ),
    "clip_vision_h.safetensors": (
        "clip_vision",
        f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/clip_vision/",
    ),
}
SDXL, SD15 = "sd_xl_base_1.0.safetensors", "v1-5-pruned-emaonly-fp16.safetensors"
BLUE, GREEN, PURPLE, BROWN = "#3f789e", "#8A8", "#a1309b", "#b58b2a"

SCRIPT = """Mia, a small red fox in a blue coat, finds an old map in the snow.

Mia, the red fox in the blue coat, follows the map over a wooden bridge.

Mia, the red fox in the blue coat, digs below a tall oak in the evening.

Mia, the red fox in the blue coat, lifts a golden lantern out of the hole and smiles."""
STYLE = "A picture book illustration in watercolour, soft light."
NEGATIVE = "text, letters, frame, blurry, several foxes"
TELL, TELL_ROOM = (460, 900), 1500
STORY = ("script", "style", "seed", "seeds")  # what app mode shows of Tell Story (any model)


def missing(values) -> list[dict]:
    """Files that a node names, as the page's list of missing models wants them."""
    names = [value for value in values if value in FILES]
    return [{"name": name, "url": FILES[name][1] + name, "directory": FILES[name][0]} for name in names]


def checkpoint(w, name: str):
    node = w.add("CheckpointLoaderSimple", 0, 0, (320, 140), ckpt_name=name)
    return node, (node[0], node[1], node[2])


def tell(w, x: int, parts, **inputs):
    model, clip, vae = parts
    settings = {"script": SCRIPT, "style": STYLE, **inputs}
    return w.add("MMInterleavedTellAnyModel", x, 0, TELL, room=TELL_ROOM, model=model, clip=clip, vae=vae, **settings)


def save(w, story, x: int, **inputs):
    """Save Story, collapsed: what is before it shows the panels already."""
    node = w.add("MMInterleavedSaveStory", x, 0, (360, 300), story=story, title="Mia and the map", **inputs)
    node.is_collapsed = True
    return node


def as_app(w, node, *widgets: str, outputs) -> None:
    w.app_inputs += [[node.id, widget] for widget in widgets]
    w.app_outputs += [each.id for each in outputs]


def finish(w, loaders, told, pages, title="1. Models") -> None:
    w.group(title, BLUE, *loaders)
    w.group("2. The story", PURPLE, told)
    w.group("3. Its pages", GREEN, pages)


def flux_kontext(w) -> None:
    w.note(0, -400, (820, 260), "9 Any model, Flux Kontext")
    unet = w.add("UNETLoader", 0, 0, (320, 120), unet_name="flux1-dev-kontext_fp8_scaled.safetensors")
    clip = w.add(
        "DualCLIPLoader",
        0,
        220,
        (320, 170),
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp8_e4m3fn_scaled.safetensors",
        type="flux",
    )
    vae = w.add("VAELoader", 0, 490, (320, 90), vae_name="ae.safetensors")
    told = tell(w, 440, (unet[0], clip[0], vae[0]), seed=1, cfg=1.0, steps=20, guidance=2.5)
    pages = save(w, told[0], 980)
    finish(w, (unet, clip, vae), told, pages)
    as_app(w, told, *STORY, outputs=[pages])


def qwen_image_edit(w) -> None:
    w.note(0, -400, (820, 260), "9 Any model, Qwen-Image-Edit")
    unet = w.add("UNETLoader", 0, 0, (320, 120), unet_name="qwen_image_edit_2509_fp8_e4m3fn.safetensors")
    shifted = w.add("ModelSamplingAuraFlow", 0, 220, (320, 90), model=unet[0], shift=3.0)
    clip = w.add("CLIPLoader", 0, 410, (320, 140), clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image")
    vae = w.add("VAELoader", 0, 650, (320, 90), vae_name="qwen_image_vae.safetensors")
    told = tell(w, 440, (shifted[0], clip[0], vae[0]), seed=1, cfg=2.5, steps=20)
    pages = save(w, told[0], 980)
    w.bend_below(shifted, "model", unet)
    finish(w, (unet, shifted, clip, vae), told, pages)
    as_app(w, told, *STORY, outputs=[pages])


SDXL_SETTINGS = {"cfg": 6.0, "steps": 28, "sampler_name": "dpmpp_2m", "scheduler": "karras", "negative": NEGATIVE}


def sdxl(w) -> None:
    w.note(0, -400, (820, 260), "9 Any model, SDXL")
    loader, parts = checkpoint(w, SDXL)
    told = tell(w, 440, parts, seed=1, strength=0.8, end=0.8, **SDXL_SETTINGS)
    comic = w.add(
        "MMInterleavedComposePages", 980, 0, (360, 480), story=told[0], layout="4 panels", captions="box", fit="crop"
    )
    shown = w.add("PreviewImage", 1420, 0, (420, 560), images=comic[0])
    pages = w.add(
        "MMInterleavedSaveStory",
        980,
        600,
        (360, 300),
        story=told[0],
        layout=comic[1],
        title="Mia and the map",
        pdf=True,
    )
    w.group("1. Models", BLUE, loader)
    w.group("2. The story", PURPLE, told)
    w.group("3. A comic page, and its PDF", GREEN, comic, shown, pages)
    w.bend(pages, "story", (940, -20), (940, 560))
    w.bend_below(pages, "layout", comic)
    as_app(w, told, *STORY, outputs=[shown, pages])


def sd15(w) -> None:
    w.note(0, -400, (820, 260), "9 Any model, SD 1.5")
    w.note(980, 160, (480, 420), "9 IPAdapter")
    loader, parts = checkpoint(w, SD15)
    settings = {**SDXL_SETTINGS, "cfg": 7.0, "width": 512, "height": 512, "megapixels": 0.25}
    told = tell(w, 440, parts, seed=1, strength=0.8, end=0.8, **settings)
    pages = save(w, told[0], 980)
    finish(w, (loader,), told, pages)
    as_app(w, told, *STORY, outputs=[pages])


def writer(w) -> None:
    w.note(0, -400, (820, 260), "9 Any model, a writer that sees")
    loader, parts = checkpoint(w, SDXL)
    llm = w.add("MMInterleavedLoadWriter", 0, 250, (320, 130), model="Qwen2.5-VL-3B-Instruct")
    told = tell(
        w,
        440,
        parts,
        writer=llm[0],
        script="",
        idea="Mia, a small red fox in a blue coat, finds an old map and looks for what it shows. For children of five.",
        panels=4,
        seed=1,
        strength=0.8,
        end=0.8,
        **SDXL_SETTINGS,
    )
    pages = save(w, told[0], 980)
    finish(w, (loader, llm), told, pages)
    as_app(w, told, "idea", "panels", "style", "seed", outputs=[pages])


def best_of_four(w) -> None:
    w.note(0, -400, (820, 260), "9 Any model, the best of four")
    loader, parts = checkpoint(w, SDXL)
    vision = w.add("CLIPVisionLoader", 0, 250, (320, 90), clip_name="clip_vision_h.safetensors")
    told = tell(w, 440, parts, clip_vision=vision[0], best_of=4, seed=1, strength=0.8, end=0.8, **SDXL_SETTINGS)
    pages = save(w, told[0], 980)
    finish(w, (loader, vision), told, pages)
    as_app(w, told, *STORY, outputs=[pages])


def saved_panel(w) -> None:
    w.note(0, -400, (820, 260), "9 Any model, a saved panel anew")
    loader, (model, clip, vae) = checkpoint(w, SDXL)
    book = w.add("MMInterleavedLoadStory", 0, 250, (320, 360), folder="(no saved story yet)")
    number = w.add("PrimitiveInt", 0, 720, (320, 110), "Number of the panel", value=3)
    panel = w.add("MMInterleavedStoryPanel", 440, 0, (320, 140), story=book[0], number=number[0])
    chosen = w.add("MMInterleavedSelectContext", 440, 250, (320, 180), story=panel[2])
    begun = w.add("MMInterleavedStoryText", 440, 540, (320, 140), story=chosen[0], text=panel[0])
    ready = w.add(
        "MMInterleavedReferences",
        860,
        0,
        (340, 460),
        model=model,
        clip=clip,
        vae=vae,
        story=begun[0],
        style=STYLE,
        negative=NEGATIVE,
        strength=0.8,
        end=0.8,
    )
    latent = w.add("EmptyLatentImage", 860, 560, (340, 150), width=1024, height=1024)
    drawn = w.add(
        "KSampler",
        1300,
        0,
        (320, 540),
        model=ready[0],
        positive=ready[1],
        negative=ready[2],
        latent_image=latent[0],
        seed=42,
        steps=28,
        cfg=6.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    )
    image = w.add("VAEDecode", 1300, 640, (320, 80), samples=drawn[0], vae=vae)
    changed = w.add(
        "MMInterleavedSetPanel", 1720, 0, (400, 560), story=book[0], number=number[0], image=image[0], text=""
    )
    pages = save(w, changed[0], 2200)
    w.group("1. The saved story", BLUE, loader, book, number)
    w.group("2. What it refers to", BROWN, panel, chosen, begun)
    w.group("3. A new seed", PURPLE, ready, latent, drawn, image)
    w.group("4. The story with it", GREEN, changed, pages)
    w.bend_below(chosen, "story", panel)
    w.bend_below(begun, "story", chosen)
    w.bend(changed, "story", (370, -100), (1680, -100))
    w.bend(changed, "number", (380, 860), (1670, 860))
    w.bend(image, "vae", (390, 790), (1260, 790))
    as_app(w, book, "folder", outputs=[pages])
    as_app(w, number, "value", outputs=[])
    as_app(w, drawn, "seed", outputs=[])


TEMPLATES = {
    "9 Any model, Flux Kontext": flux_kontext,
    "9 Any model, Qwen-Image-Edit": qwen_image_edit,
    "9 Any model, SDXL": sdxl,
    "9 Any model, SD 1.5": sd15,
    "9 Any model, a writer that sees": writer,
    "9 Any model, the best of four": best_of_four,
    "9 Any model, a saved panel anew": saved_panel,
}
