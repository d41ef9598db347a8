"""A custom node of the tests: what a ComfyUI holds in memory, and scripts that run inside it."""

import gc
import importlib.util
import json

import torch
from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.get("/probe")
async def probe(request):
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return web.json_response({"tensors": len(tensors), "bytes": sum(t.nbytes for t in tensors)})


class RunScript:
    """Runs `checks()` of a Python file in this process, and shows what it returns as JSON."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"script": ("STRING", {})}}

    def run(self, script):
        spec = importlib.util.spec_from_file_location("checks", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return {"ui": {"text": [json.dumps(module.checks())]}}


class ShowEmbedding:
    """Shows as JSON the image embeddings of a CLIP vision output, and what core's unCLIP makes of the first."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tests", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"embedding": ("CLIP_VISION_OUTPUT", {})}}

    def run(self, embedding):
        from comfy.ldm.modules.encoders.noise_aug_modules import CLIPEmbeddingNoiseAugmentation
        from comfy.model_base import unclip_adm

        schedule = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
        augmentor = CLIPEmbeddingNoiseAugmentation(
            noise_schedule_config=schedule, timestep_dim=embedding.image_embeds.shape[-1]
        )
        single = type(embedding)()
        single.image_embeds = embedding.image_embeds[:1]
        unclip = [{"clip_vision_output": single, "strength": 1.0, "noise_augmentation": 0.0}]
        shown = embedding.image_embeds, unclip_adm(unclip, "cpu", augmentor, seed=0)
        return {"ui": {"text": [json.dumps([each.tolist() for each in shown])]}}


NODE_CLASS_MAPPINGS = {"RunScript": RunScript, "ShowEmbedding": ShowEmbedding}
