"""Runs inside ComfyUI: LLMs stored in fewer bits, whole and partly loaded, against the library."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from in_comfyui import package


def checks() -> dict:
    import comfy.model_management
    import comfy.model_patcher
    import torch

    package()
    from mmi.comfy_mminterleaved.models.quantization import FORMATS
    from mmi.comfy_mminterleaved.pipeline import MMInterleavedPipeline
    from mmi.comfy_mminterleaved.stories.story import Story
    from mmi.nodes.load import LoadMMInterleaved, model_folder, models
    from mmi.nodes.quantization import core_has

    story = Story.of("Mia is a fox in a red coat with a crown. Mia is on the beach.")
    result = {"a name from a link": LoadMMInterleaved.validate_inputs(model=None)}  # core knows it only later
    with torch.inference_mode():
        for name in models():
            if not name.startswith("starter-"):
                continue
            library = MMInterleavedPipeline.load(model_folder(name), "cpu", torch.float32)
            llm = LoadMMInterleaved.execute(name).result[1]
            expected = library.context_features([story])[0]
            llm.prepare(story, 1)
            found = llm.generator.context_features([story])[0]
            llm.generator.clear_cache()
            stored = sum(t.nbytes for t in llm.module.state_dict().values())
            ids = torch.tensor([llm.generator.tokenize(story).input_ids])

            def run(module, ids=ids):
                return module(module.embed_inputs(ids).float())

            whole = run(llm.module)
            patcher = comfy.model_patcher.ModelPatcher(llm.module, llm.device, torch.device("cpu"))
            patcher.patch_model(llm.device, lowvram_model_memory=1)
            result[name] = {
                "library": float((found - expected).abs().max() / expected.abs().max()),
                "partly loaded": float((run(llm.module) - whole).abs().max()),
                "announced": llm.patcher.model_size() / stored,
                "core reads it": core_has(FORMATS[name.split("-")[1]]),
            }
            patcher.unpatch_model()
    return result
