import pytest
import torch

from comfy_mminterleaved.config import PerceiverConfig, VisualTokenizerConfig
from comfy_mminterleaved.errors import CheckpointError
from comfy_mminterleaved.models.image_processor import preprocess_image
from comfy_mminterleaved.models.init_weights import init_weights
from comfy_mminterleaved.models.visual_tokenizer import VisualTokenizer
from comfy_mminterleaved.models.vit_adapter import NUM_INTERACTIONS
from comfy_mminterleaved.stories.images import to_bytes


def config(**changes):
    settings = {
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_inplane": 8,
    }
    return VisualTokenizerConfig(
        PerceiverConfig(6, 8, 16, 2, 2, 16, 2, True), llm_hidden_size=12, **{**settings, **changes}
    )


@pytest.mark.parametrize("layers", [1, 4, 5, 12])
@pytest.mark.parametrize("image_size, patch_size", [(64, 16), (56, 14), (64, 32)])
def test_any_depth_patch_and_size(layers, image_size, patch_size):
    c = config(num_hidden_layers=layers, image_size=image_size, patch_size=patch_size)
    encoder = VisualTokenizer(c)
    init_weights(encoder)
    features = encoder(torch.rand(2, 3, image_size, image_size))
    assert features.visual_tokens.shape == (2, 6, 12)
    assert [m.shape[1:] for m in features.feature_maps] == [(16, s, s) for s in c.feature_map_sizes]
    assert c.feature_map_sizes == (4 * c.grid_size, 2 * c.grid_size, c.grid_size, c.grid_size // 2)
    assert all(torch.isfinite(m).all() for m in features.feature_maps)


def test_every_layer_and_interaction_is_run():
    encoder = VisualTokenizer(config(num_hidden_layers=6))
    init_weights(encoder)
    torch.nn.init.ones_(encoder.vision_model.adapter_interactions[0].injector.gamma)
    calls = []
    for name, module in encoder.named_modules():
        if name.startswith("vision_model.layers.") and name.count(".") == 2 or name.endswith(("injector", "extractor")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    encoder(torch.rand(1, 3, 64, 64))
    assert [c for c in calls if c.startswith("vision_model.layers")] == [f"vision_model.layers.{i}" for i in range(6)]
    assert sum("injector" in c for c in calls) == sum("extractor" in c for c in calls) == NUM_INTERACTIONS


def test_an_odd_grid_is_refused():
    with pytest.raises(CheckpointError, match="grid of 3 patches; it must be a whole even number"):
        config(image_size=48)


@pytest.mark.parametrize("width, height", [(224, 224), (300, 225), (129, 500), (1200, 900), (20, 24)])
def test_preprocessing_takes_the_middle(width, height):
    """A picture bright only in its centre square stays bright, whatever its shape."""
    pixels = torch.zeros(3, height, width)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[:, top : top + side, left : left + side] = 1
    found = preprocess_image(pixels, 224)
    assert found.shape == (3, 224, 224)
    assert found[:, 16:-16, 16:-16].min() == 1


def test_preprocessing_at_its_own_size_changes_nothing():
    pixels = torch.rand(3, 64, 64)
    assert (to_bytes(preprocess_image(pixels, 64)) == to_bytes(pixels)).all()
