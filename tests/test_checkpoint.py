import json
import pickle
import shutil

import pytest
import torch
from places import HERE, TINY
from safetensors.torch import load_file, save_file

from comfy_mminterleaved import MMInterleavedPipeline, Story, TextGenerationConfig, TextSegment
from comfy_mminterleaved.checkpoints import load as checkpoint
from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints import reference as reference_layout
from comfy_mminterleaved.checkpoints.reference import from_reference, to_reference
from comfy_mminterleaved.config import BLOCKS, Config
from comfy_mminterleaved.errors import CheckpointError, OutputError
from comfy_mminterleaved.models.build import init_modules
from comfy_mminterleaved.presets import tiny_config


@pytest.fixture
def reference(tmp_path):
    """A copy of the recorded reference checkpoint, to break."""
    folder = tmp_path / "reference"
    shutil.copytree(TINY, folder)
    (folder / "golden.safetensors").unlink()
    return folder


@pytest.fixture
def own(tmp_path, tiny_random):
    """The small model in this project's layout."""
    folder = tmp_path / "own"
    blocks = {name: block.state_dict() for name, block in init_modules(tiny_random.config).items()}
    native.save(folder, tiny_random.config, blocks, tiny_random.tokenizer)
    return folder


def text_of(model):
    sampling = TextGenerationConfig(max_new_tokens=6, do_sample=False)
    story = Story.of(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), TextSegment("", (5, 6)))
    return model.generate_text(story, sampling).tokens


def same_text(a, b):
    return text_of(a) == text_of(b)


@pytest.fixture(scope="module")
def recorded_text():
    return text_of(MMInterleavedPipeline.load(TINY, "cpu"))


def test_every_name_and_shape_of_the_full_size_model():
    """All 2,659 entries of the released checkpoint; one of them is a constant that nobody needs."""
    recorded = json.loads((HERE / "golden" / "official_13b_state_dict.json").read_text())
    assert len(recorded) == 2659
    expected = reference_layout.reference_shapes(from_reference({}))
    constants = {name for name in recorded if reference_layout._CONSTANT.match(name)}
    assert len(constants) == 1 and constants.pop().endswith("embeddings.position_ids")
    found = {name: tuple(shape) for name, shape in recorded.items() if name in expected}
    assert len(found) == 2658 and found == expected
    assert sum(torch.Size(shape).numel() for shape in recorded.values()) > 14.8e9


def test_names_go_both_ways():
    names = json.loads((HERE / "golden" / "official_13b_state_dict.json").read_text())
    for name in names:
        if not reference_layout._CONSTANT.match(name):
            assert reference_layout.reference_name(*reference_layout.native_name(name)) == name


def test_configs_go_both_ways():
    for config in (from_reference({}), tiny_config(), checkpoint.read_config(TINY)):
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for config in (from_reference({}), checkpoint.read_config(TINY)):
        files = to_reference(config)
        keys = ("config.json", "llm/config.json", "clip/config.json", "sd/unet/config.json", "sd/vae/config.json")
        parts = dict(zip(("model", "llm", "clip", "unet", "vae"), (files[k] for k in keys)))
        again = from_reference({**parts, "scheduler": files["sd/scheduler/scheduler_config.json"]})
        assert again == config


def test_convert_there_and_back(reference, tmp_path):
    config, blocks = checkpoint.read_state_dicts(reference)
    native.save(tmp_path / "own", config, blocks)
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == sorted(
        ["config.json", *(f"{name}.safetensors" for name in BLOCKS)]
    )
    config, blocks = checkpoint.read_state_dicts(tmp_path / "own")
    reference_layout.save_reference(tmp_path / "back", config, blocks)
    old, new = (load_file(folder / "model.safetensors") for folder in (reference, tmp_path / "back"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    models = [MMInterleavedPipeline.load(folder, "cpu") for folder in (reference, tmp_path / "own", tmp_path / "back")]
    assert same_text(models[0], models[1]) and same_text(models[0], models[2])


def test_a_large_model_is_written_in_shards(reference, tmp_path, recorded_text):
    config, blocks = checkpoint.read_state_dicts(reference)
    reference_layout.save_reference(tmp_path / "sharded", config, blocks, max_shard_size=200_000)
    written = {path.name: load_file(path) for path in (tmp_path / "sharded").glob("*.safetensors")}
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(written) > 2 and index["weight_map"] == {key: name for name, part in written.items() for key in part}
    assert text_of(MMInterleavedPipeline.load(tmp_path / "sharded", "cpu")) == recorded_text


def test_shards_of_pickles(reference, recorded_text):
    tensors = load_file(reference / "model.safetensors")
    names = sorted(tensors)
    for i in range(3):
        torch.save({n: tensors[n] for n in names[i::3]}, reference / f"pytorch_model-{i}.bin")
    (reference / "model.safetensors").unlink()
    assert text_of(MMInterleavedPipeline.load(reference, "cpu")) == recorded_text


def test_constants_of_older_checkpoints_are_passed_over(reference):
    tensors = load_file(reference / "model.safetensors")
    tensors["visual_tokenizer.encoder.vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    tensors["mm_decoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, reference / "model.safetensors")
    assert MMInterleavedPipeline.load(reference, "cpu")


def test_own_layout_with_tokenizer_and_dtype(own, tiny_random):
    model = MMInterleavedPipeline.load(own, "cpu")
    assert model.tokenizer.encode("Zoë, 猫") == tiny_random.tokenizer.encode("Zoë, 猫")
    as_in_the_file = {name: block.eval() for name, block in init_modules(tiny_random.config).items()}
    assert same_text(model, MMInterleavedPipeline(tiny_random.config, as_in_the_file, tiny_random.tokenizer))
    half = MMInterleavedPipeline.load(own, "cpu", torch.bfloat16)
    assert half.llm.soi_token.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert not any(p.is_meta or p.requires_grad for b in (half.llm, half.unet, half.vae) for p in b.parameters())


def test_all_faults_in_one_error(reference):
    tensors = load_file(reference / "model.safetensors")
    del tensors["soi_token"], tensors["mm_decoder.norm.weight"]
    tensors["extra.weight"] = torch.ones(1)
    tensors["context_feat_proj.bias"] = torch.ones(7)
    save_file(tensors, reference / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        MMInterleavedPipeline.load(reference, "cpu")
    for line in (
        "in 4 entries",
        "missing: soi_token",
        "missing: mm_decoder.norm.weight",
        "unexpected: extra.weight",
        "wrong shape: context_feat_proj.bias is (7,), must be (32,)",
    ):
        assert line in str(error.value)


def test_faults_of_the_own_layout(own):
    tensors = load_file(own / "llm.safetensors")
    tensors["soi_token"] = torch.ones(3)
    save_file(tensors, own / "llm.safetensors")
    with pytest.raises(
        CheckpointError, match=r"llm.safetensors' does not fit its config in 1 entries.\s+wrong shape: soi_token is"
    ):
        MMInterleavedPipeline.load(own, "cpu")
    (own / "llm.safetensors").unlink()
    (own / "vae.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks llm.safetensors, vae.safetensors"):
        MMInterleavedPipeline.load(own, "cpu")


def test_a_missing_shard_is_named(reference):
    index = {"weight_map": {"soi_token": "model-00002-of-00002.safetensors", "x": "model.safetensors"}}
    (reference / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks 1 shard: model-00002-of-00002.safetensors"):
        MMInterleavedPipeline.load(reference, "cpu")


@pytest.mark.parametrize("keep", [0, 7, 1000, -100])
def test_a_truncated_file(reference, keep):
    path = reference / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors' cannot be read, it may be cut short"):
        MMInterleavedPipeline.load(reference, "cpu")


def test_a_truncated_pickle(reference):
    torch.save(load_file(reference / "model.safetensors"), reference / "pytorch_model.bin")
    (reference / "model.safetensors").unlink()
    data = (reference / "pytorch_model.bin").read_bytes()
    (reference / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="pytorch_model.bin' (cannot be read|is refused)"):
        MMInterleavedPipeline.load(reference, "cpu")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(reference, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (reference / "model.safetensors").unlink()
    torch.save({"soi_token": Evil()}, reference / "evil.bin")
    with pytest.raises(CheckpointError, match="evil.bin' is refused: it holds more than tensors"):
        MMInterleavedPipeline.load(reference, "cpu")
    (reference / "evil.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        MMInterleavedPipeline.load(reference, "cpu")
    assert not (tmp_path / "ran").exists()


def shards(folder, suffix="safetensors", stem="model"):
    """The recorded tensors in two shards with their index, instead of one file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        part = {name: tensors[name] for name in part}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("suffix, stem", [("safetensors", "model"), ("bin", "pytorch_model")])
def test_what_trainers_leave_beside_the_weights_is_left_alone(reference, suffix, stem, recorded_text):
    """Case 8: a folder as transformers' Trainer, accelerate and DeepSpeed write it."""
    shards(reference, suffix, stem)
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin", "random_states_0.bin", "rng_state_0.pth"):
        torch.save({"lr": 1}, reference / name)
    for name in ("adapter_model.safetensors", "model_lora.safetensors"):
        save_file({"x": torch.zeros(1)}, reference / name)
    assert text_of(MMInterleavedPipeline.load(reference, "cpu")) == recorded_text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrappers_prefix_is_taken_off_and_said(reference, prefix, caplog, recorded_text):
    tensors = load_file(reference / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, reference / "model.safetensors")
    assert text_of(MMInterleavedPipeline.load(reference, "cpu")) == recorded_text
    assert f"all begin with '{prefix}', which is left out" in caplog.text


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_of_every_kind(reference, wrapped, zipped, recorded_text):
    tensors = load_file(reference / "model.safetensors")
    (reference / "model.safetensors").unlink()
    path = reference / "pytorch_model.bin"
    torch.save({"module": tensors} if wrapped else tensors, path, _use_new_zipfile_serialization=zipped)
    assert text_of(MMInterleavedPipeline.load(reference, "cpu")) == recorded_text


def test_a_single_file_of_any_name(reference, recorded_text):
    (reference / "model.safetensors").rename(reference / "mm_interleaved.safetensors")
    assert text_of(MMInterleavedPipeline.load(reference, "cpu")) == recorded_text


def test_an_error_lists_twenty_names_and_the_count(reference):
    tensors = load_file(reference / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, reference / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        MMInterleavedPipeline.load(reference, "cpu")
    lines = str(error.value).splitlines()
    assert f"in {2 * len(tensors)} entries" in lines[0] and lines[-1] == f"  ... and {2 * len(tensors) - 20} more"
    assert len(lines) == 22 and sum("unexpected:" in line for line in lines) == 10


def test_byte_order_marks_are_no_fault(reference, own):
    for path in (reference / "config.json", reference / "llm" / "config.json", own / "config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert MMInterleavedPipeline.load(reference, "cpu") and MMInterleavedPipeline.load(own, "cpu")


def test_a_git_lfs_pointer_is_called_one(reference, own):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    for folder, name in ((reference, "model.safetensors"), (own, "llm.safetensors")):
        (folder / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=f"{name}' is a Git LFS pointer.*git lfs pull"):
            MMInterleavedPipeline.load(folder, "cpu")


@pytest.mark.parametrize("place", ["llm", "."])
def test_a_sentencepiece_model_is_found(reference, place, monkeypatch):
    """Vicuna's folder has tokenizer.model; what converts it is transformers' affair."""
    (reference / place / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(CheckpointError, match="tokenizer.model' cannot be converted; install sentencepiece"):
        MMInterleavedPipeline.load(reference, "cpu")


def test_the_wrong_model(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        MMInterleavedPipeline.load(folder, "cpu")
    with pytest.raises(CheckpointError, match="There is no checkpoint folder"):
        MMInterleavedPipeline.load(tmp_path / "none", "cpu")
    save_file({"model.embed_tokens.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="unexpected: model.embed_tokens.weight"):
        MMInterleavedPipeline.load(folder, "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 3}, "has version 3; this release reads version 2"),
        ({"version": 1}, "was written before the first release .* convert it again"),
        ({"surprise": 1}, "does not know: surprise"),
        ({"llm": {"num_img_token": 4, "colour": 1}}, "config.json, llm has entries .* does not know: colour"),
        ({"llm": {}}, "incomplete"),
        ({"encoder": 5}, "config.json, encoder must hold an object, not 5"),
        ({"unet": {"_class_name": "UNet2DConditionModel", "in_channels": "a"}}, "describes no model that can be built"),
        ({"unet": {"_class_name": "UNet2DConditionModel", "block_out_channels": 7}}, "describes no model"),
        ({"unet": {"_class_name": "os.system"}}, "class 'os.system' must be UNet2DConditionModel"),
    ],
)
def test_bad_configs(own, change, message):
    data = json.loads((own / "config.json").read_text()) | change
    (own / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        MMInterleavedPipeline.load(own, "cpu")


def test_a_config_that_is_not_json(own):
    (own / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json' cannot be read as JSON"):
        MMInterleavedPipeline.load(own, "cpu")


def test_a_broken_tokenizer(own):
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json' cannot be read"):
        MMInterleavedPipeline.load(own, "cpu")


def test_saving_never_overwrites_and_leaves_nothing_behind(own, tiny_random, tmp_path):
    with pytest.raises(OutputError, match="already exists; choose a new name"):
        native.save(own, tiny_random.config, {})
    with pytest.raises(AttributeError):
        native.save(tmp_path / "new", tiny_random.config, {"llm": {"soi_token": "no tensor"}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_what_the_references_layout_cannot_say_is_refused(tiny_random, tmp_path):
    with pytest.raises(CheckpointError, match="has no field for some of its settings"):
        reference_layout.save_reference(tmp_path / "new", tiny_random.config, {})
    assert not (tmp_path / "new").exists()


def test_tensors_that_share_memory_are_written(reference, tmp_path):
    config, blocks = checkpoint.read_state_dicts(reference)
    blocks["llm"]["layers.1.mlp.up_proj.weight"] = blocks["llm"]["layers.1.mlp.gate_proj.weight"]
    native.save(tmp_path / "own", config, blocks)
    assert MMInterleavedPipeline.load(tmp_path / "own", "cpu")


def test_a_file_that_is_larger_than_the_memory_is_mapped_read_only(reference, monkeypatch):
    """As of 30 GB on a computer of 16 GB: the system refuses to map it as memory that could be written."""
    import safetensors.torch

    from comfy_mminterleaved.checkpoints import tensors

    def refuse(path):
        raise RuntimeError("unable to mmap 29826123582 bytes: Cannot allocate memory (12)")

    expected = tensors.read_tensors(reference / "model.safetensors")
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    with pytest.raises(CheckpointError, match="Cannot allocate memory"):
        tensors.read_tensors(reference / "model.safetensors")
    monkeypatch.setattr(tensors, "MAPPED_READ_ONLY", 0)
    found = tensors.read_tensors(reference / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_the_references_assets_are_found(reference, recorded_text):
    """As its README and `download_hf_models.py` leave them: OUTPUT/ beside assets/, CLIP's settings inside others."""
    root = reference.parent
    published = root / "OUTPUT" / "mm_interleaved_pretrain"
    published.parent.mkdir()
    reference.rename(published)
    expected = checkpoint.read_config(published)
    for part, name in (("llm", "lmsys/vicuna-13b-v1.3"), ("clip", "openai/clip-vit-large-patch14")):
        (root / "assets" / name).parent.mkdir(parents=True)
        (published / part).rename(root / "assets" / name)
    (root / "assets" / "stabilityai").mkdir()
    (published / "sd").rename(root / "assets" / "stabilityai" / "stable-diffusion-2-1-base")
    clip = root / "assets" / "openai" / "clip-vit-large-patch14" / "config.json"
    clip.write_text(json.dumps({"model_type": "clip", "vision_config": json.loads(clip.read_text())}))
    assert checkpoint.read_config(published) == expected
