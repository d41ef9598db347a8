import os

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, one program after the other
torch.set_num_threads(1)  # models this small lose more to waiting threads than they gain


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests that take long")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; run by `dev.py test --long`")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long; run with --long"))


@pytest.fixture(scope="session")
def tiny_random():
    """The tiny random pipeline; whoever measures its cache clears it."""
    from comfy_mminterleaved.pipeline import MMInterleavedPipeline

    model = MMInterleavedPipeline.load("tiny-random", "cpu")
    with torch.no_grad():  # gates, gammas and last convolutions start at zero: open them, or nothing can be seen
        generator = torch.Generator().manual_seed(1)
        for block in (model.encoder, model.llm, model.synchronizer):
            for name, parameter in block.named_parameters():
                if name.endswith(("gate", "gamma")) or ("mmfs_module" in name and name.endswith("output_proj.weight")):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture
def pictures():
    """Eight different pictures of 128 x 128 px."""
    from comfy_mminterleaved.stories.story import ImageSegment

    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(8)]
    return [ImageSegment.of(image.resize((128, 128), Image.Resampling.BICUBIC)) for image in small]


@pytest.fixture
def photo(tmp_path):
    """A real photograph (Chelsea, CC0, from scikit-image) as a JPEG of 451 x 300 px."""
    data = pytest.importorskip("skimage.data")
    path = tmp_path / "photo.jpg"
    Image.fromarray(data.chelsea()).save(path, quality=92)
    return path
