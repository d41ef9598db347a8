import json
import pickle
import shutil

import pytest
import torch
from places import HERE, TINY
from safetensors.torch import load_file, save_file

from comfy_mminterleaved import MMInterleaved, Sampling, Story, Text
from comfy_mminterleaved.checkpoints import load as checkpoint
from comfy_mminterleaved.config import Config, from_reference, small, to_reference
from comfy_mminterleaved.errors import CheckpointError, OutputError
from comfy_mminterleaved.models.init_weights import new_blocks


@pytest.fixture
def reference(tmp_path):
    """A copy of the recorded reference checkpoint, to break."""
    folder = tmp_path / "reference"
    shutil.copytree(TINY, folder)
    (folder / "golden.safetensors").unlink()
    return folder


@pytest.fixture
def own(tmp_path, untrained):
    """The small model in this project's layout."""
    folder = tmp_path / "own"
    blocks = {name: block.state_dict() for name, block in new_blocks(untrained.config).items()}
    checkpoint.save(folder, untrained.config, blocks, untrained.tokenizer)
    return folder


def text_of(model):
    sampling = Sampling(max_new_tokens=6, sample=False)
    story = Story.of(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), Text("", (5, 6)))
    return model.write(story, sampling).tokens


def same_text(a, b):
    return text_of(a) == text_of(b)


@pytest.fixture(scope="module")
def recorded_text():
    return text_of(MMInterleaved.load(TINY, "cpu"))


def test_every_name_and_shape_of_the_full_size_model():
    """All 2,659 entries of the released checkpoint; one of them is a constant that nobody needs."""
    recorded = json.loads((HERE / "golden" / "official_13b_state_dict.json").read_text())
    assert len(recorded) == 2659
    expected = checkpoint.reference_shapes(from_reference({}))
    constants = {name for name in recorded if checkpoint._CONSTANT.match(name)}
    assert len(constants) == 1 and constants.pop().endswith("embeddings.position_ids")
    found = {name: tuple(shape) for name, shape in recorded.items() if name in expected}
    assert len(found) == 2658 and found == expected
    assert sum(torch.Size(shape).numel() for shape in recorded.values()) > 14.8e9


def test_names_go_both_ways():
    names = json.loads((HERE / "golden" / "official_13b_state_dict.json").read_text())
    for name in names:
        if not checkpoint._CONSTANT.match(name):
            assert checkpoint.reference_name(*checkpoint.own_name(name)) == name


def test_configs_go_both_ways():
    for config in (from_reference({}), small(), checkpoint.read_config(TINY)):
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for config in (from_reference({}), checkpoint.read_config(TINY)):
        files = to_reference(config)
        keys = ("config.json", "llm/config.json", "clip/config.json", "sd/unet/config.json", "sd/vae/config.json")
        parts = dict(zip(("model", "llm", "clip", "unet", "vae"), (files[k] for k in keys)))
        again = from_reference({**parts, "scheduler": files["sd/scheduler/scheduler_config.json"]})
        assert again == config


def test_convert_there_and_back(reference, tmp_path):
    config, blocks = checkpoint.read_blocks(reference)
    checkpoint.save(tmp_path / "own", config, blocks)
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == sorted(
        ["config.json", *(f"{name}.safetensors" for name in checkpoint.BLOCKS)]
    )
    config, blocks = checkpoint.read_blocks(tmp_path / "own")
    checkpoint.save_reference(tmp_path / "back", config, blocks)
    old, new = (load_file(folder / "model.safetensors") for folder in (reference, tmp_path / "back"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    models = [MMInterleaved.load(folder, "cpu") for folder in (reference, tmp_path / "own", tmp_path / "back")]
    assert same_text(models[0], models[1]) and same_text(models[0], models[2])


def test_shards_of_pickles(reference, recorded_text):
    tensors = load_file(reference / "model.safetensors")
    names = sorted(tensors)
    for i in range(3):
        torch.save({n: tensors[n] for n in names[i::3]}, reference / f"pytorch_model-{i}.bin")
    (reference / "model.safetensors").unlink()
    assert text_of(MMInterleaved.load(reference, "cpu")) == recorded_text


def test_constants_of_older_checkpoints_are_passed_over(reference):
    tensors = load_file(reference / "model.safetensors")
    tensors["visual_tokenizer.encoder.vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    tensors["mm_decoder.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, reference / "model.safetensors")
    assert MMInterleaved.load(reference, "cpu")


def test_own_layout_with_tokenizer_and_dtype(own, untrained):
    model = MMInterleaved.load(own, "cpu")
    assert model.tokenizer.encode("Zoë, 猫") == untrained.tokenizer.encode("Zoë, 猫")
    as_in_the_file = {name: block.eval() for name, block in new_blocks(untrained.config).items()}
    assert same_text(model, MMInterleaved(untrained.config, as_in_the_file, untrained.tokenizer))
    half = MMInterleaved.load(own, "cpu", torch.bfloat16)
    assert half.llm.soi.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert not any(p.is_meta or p.requires_grad for b in (half.llm, half.unet, half.vae) for p in b.parameters())


def test_all_faults_in_one_error(reference):
    tensors = load_file(reference / "model.safetensors")
    del tensors["soi_token"], tensors["mm_decoder.norm.weight"]
    tensors["extra.weight"] = torch.ones(1)
    tensors["context_feat_proj.bias"] = torch.ones(7)
    save_file(tensors, reference / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        MMInterleaved.load(reference, "cpu")
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
    tensors["soi"] = torch.ones(3)
    save_file(tensors, own / "llm.safetensors")
    with pytest.raises(
        CheckpointError, match=r"llm.safetensors' does not fit its config in 1 entries.\s+wrong shape: soi is"
    ):
        MMInterleaved.load(own, "cpu")
    (own / "llm.safetensors").unlink()
    (own / "vae.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks llm.safetensors, vae.safetensors"):
        MMInterleaved.load(own, "cpu")


def test_a_missing_shard_is_named(reference):
    index = {"weight_map": {"soi_token": "model-00002-of-00002.safetensors", "x": "model.safetensors"}}
    (reference / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks 1 shard: model-00002-of-00002.safetensors"):
        MMInterleaved.load(reference, "cpu")


@pytest.mark.parametrize("keep", [0, 7, 1000, -100])
def test_a_truncated_file(reference, keep):
    path = reference / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors' cannot be read, it may be cut short"):
        MMInterleaved.load(reference, "cpu")


def test_a_truncated_pickle(reference):
    torch.save(load_file(reference / "model.safetensors"), reference / "pytorch_model.bin")
    (reference / "model.safetensors").unlink()
    data = (reference / "pytorch_model.bin").read_bytes()
    (reference / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="pytorch_model.bin' (cannot be read|is refused)"):
        MMInterleaved.load(reference, "cpu")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(reference, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (reference / "model.safetensors").unlink()
    torch.save({"soi_token": Evil()}, reference / "evil.bin")
    with pytest.raises(CheckpointError, match="evil.bin' is refused: it holds more than tensors"):
        MMInterleaved.load(reference, "cpu")
    (reference / "evil.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        MMInterleaved.load(reference, "cpu")
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
    assert text_of(MMInterleaved.load(reference, "cpu")) == recorded_text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrappers_prefix_is_taken_off_and_said(reference, prefix, caplog, recorded_text):
    tensors = load_file(reference / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, reference / "model.safetensors")
    assert text_of(MMInterleaved.load(reference, "cpu")) == recorded_text
    assert f"all begin with '{prefix}', which is left out" in caplog.text


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_of_every_kind(reference, wrapped, zipped, recorded_text):
    tensors = load_file(reference / "model.safetensors")
    (reference / "model.safetensors").unlink()
    path = reference / "pytorch_model.bin"
    torch.save({"module": tensors} if wrapped else tensors, path, _use_new_zipfile_serialization=zipped)
    assert text_of(MMInterleaved.load(reference, "cpu")) == recorded_text


def test_a_single_file_of_any_name(reference, recorded_text):
    (reference / "model.safetensors").rename(reference / "mm_interleaved.safetensors")
    assert text_of(MMInterleaved.load(reference, "cpu")) == recorded_text


def test_an_error_lists_twenty_names_and_the_count(reference):
    tensors = load_file(reference / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, reference / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        MMInterleaved.load(reference, "cpu")
    lines = str(error.value).splitlines()
    assert f"in {2 * len(tensors)} entries" in lines[0] and lines[-1] == f"  ... and {2 * len(tensors) - 20} more"
    assert len(lines) == 22 and sum("unexpected:" in line for line in lines) == 10


def test_byte_order_marks_are_no_fault(reference, own):
    for path in (reference / "config.json", reference / "llm" / "config.json", own / "config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert MMInterleaved.load(reference, "cpu") and MMInterleaved.load(own, "cpu")


def test_a_git_lfs_pointer_is_called_one(reference, own):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    for folder, name in ((reference, "model.safetensors"), (own, "llm.safetensors")):
        (folder / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=f"{name}' is a Git LFS pointer.*git lfs pull"):
            MMInterleaved.load(folder, "cpu")


@pytest.mark.parametrize("place", ["llm", "."])
def test_a_sentencepiece_model_is_found(reference, place, monkeypatch):
    """Vicuna's folder has tokenizer.model; what converts it is transformers' affair."""
    (reference / place / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(CheckpointError, match="tokenizer.model' cannot be converted; install sentencepiece"):
        MMInterleaved.load(reference, "cpu")


def test_the_wrong_model(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        MMInterleaved.load(folder, "cpu")
    with pytest.raises(CheckpointError, match="There is no checkpoint folder"):
        MMInterleaved.load(tmp_path / "none", "cpu")
    save_file({"model.embed_tokens.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="unexpected: model.embed_tokens.weight"):
        MMInterleaved.load(folder, "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "has version 2; this release reads version 1"),
        ({"surprise": 1}, "does not know: surprise"),
        ({"llm": {"slots": 4, "colour": 1}}, "config.json, llm has entries that this release does not know: colour"),
        ({"llm": {}}, "incomplete"),
        ({"encoder": 5}, "config.json, encoder must hold an object, not 5"),
        ({"llm": {"slots": 4, "width": "a"}}, "describes no model that can be built"),
        ({"unet": {"_class_name": "UNet2DConditionModel", "block_out_channels": 7}}, "describes no model"),
        ({"unet": {"_class_name": "os.system"}}, "class 'os.system' must be UNet2DConditionModel"),
    ],
)
def test_bad_configs(own, change, message):
    data = json.loads((own / "config.json").read_text()) | change
    (own / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        MMInterleaved.load(own, "cpu")


def test_a_config_that_is_not_json(own):
    (own / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json' cannot be read as JSON"):
        MMInterleaved.load(own, "cpu")


def test_a_broken_tokenizer(own):
    (own / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json' cannot be read"):
        MMInterleaved.load(own, "cpu")


def test_saving_never_overwrites_and_leaves_nothing_behind(own, untrained, tmp_path):
    with pytest.raises(OutputError, match="is there already; name a new one"):
        checkpoint.save(own, untrained.config, {})
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path / "new", untrained.config, {"llm": {"soi": "no tensor"}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own"]


def test_what_the_references_layout_cannot_say_is_refused(untrained, tmp_path):
    with pytest.raises(CheckpointError, match="the reference's layout cannot say"):
        checkpoint.save_reference(tmp_path / "new", untrained.config, {})
    assert not (tmp_path / "new").exists()


def test_tensors_that_share_memory_are_written(reference, tmp_path):
    config, blocks = checkpoint.read_blocks(reference)
    blocks["llm"]["layers.1.mlp.up_proj.weight"] = blocks["llm"]["layers.1.mlp.gate_proj.weight"]
    checkpoint.save(tmp_path / "own", config, blocks)
    assert MMInterleaved.load(tmp_path / "own", "cpu")
