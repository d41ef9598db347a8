"""LLMs stored in 8 or 4 bits: formats, `convert --quantize`, what is read back, and what is refused."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_mminterleaved import MMInterleavedPipeline, Story
from comfy_mminterleaved.checkpoints import native
from comfy_mminterleaved.checkpoints.load import read
from comfy_mminterleaved.checkpoints.tensors import Item
from comfy_mminterleaved.cli import main
from comfy_mminterleaved.errors import CheckpointError, OutputError, SettingError
from comfy_mminterleaved.files import locked
from comfy_mminterleaved.generation.peak_memory import PeakMemory
from comfy_mminterleaved.models.quantization import FORMATS, comfy_quant, quantized_linear, quantized_linears

gguf = pytest.importorskip("gguf")
STORY = Story.of("Mia is a fox in a red coat with a crown. Mia is on the beach.")


def weight(rows=96, width=256, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


# ---- formats ----


@pytest.mark.parametrize("name, error, bits", [("fp8", 0.03, 8), ("int8", 0.01, 8), ("q4_0", 0.12, 4.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_comes_back(name, error, bits, dtype):
    format, original = FORMATS[name], weight()
    stored, scale = format.quantize(original.to(dtype))
    assert stored.dtype == format.dtype and stored.shape == format.weight_shape(*original.shape)
    assert (scale.shape if scale is not None else None) == format.scale_shape(len(original))
    back = format.dequantize(stored, scale, torch.float32)
    assert ((back - original).norm() / original.norm()) < error
    found = 8 * (stored.nbytes + (scale.nbytes if scale is not None else 0)) / original.numel()
    assert found == pytest.approx(bits, abs=0.2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_of_zeros_stays_one(name):
    stored, scale = FORMATS[name].quantize(torch.zeros(32, 64))
    assert not FORMATS[name].dequantize(stored, scale, torch.float32).any()


def test_q4_0_is_ggufs():
    stored, _ = FORMATS["q4_0"].quantize(weight())
    expected = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(FORMATS["q4_0"].dequantize(stored, None, torch.float32), torch.from_numpy(expected))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_in_the_dtype_of_its_input(name, rows, dtype):
    layer = quantized_linears(name).Linear(256, 96)
    stored, scale = FORMATS[name].quantize(weight())
    layer.weight.data = stored
    if scale is not None:
        layer.weight_scale.data = scale
    x = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ FORMATS[name].dequantize(stored, scale, torch.float64).T
    assert layer(x).dtype == dtype and layer(x).shape == (2, rows, 96)
    assert ((layer(x).double() - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_width_that_has_no_whole_blocks_is_refused():
    with pytest.raises(CheckpointError, match="multiple of 32, not 100"):
        FORMATS["q4_0"].weight_shape(4, 100)


# ---- convert ----


@pytest.fixture(scope="module")
def starter():
    return read("starter")


@pytest.fixture(scope="module")
def states():
    return MMInterleavedPipeline.load("starter", "cpu").context_features([STORY])[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    for name in FORMATS:
        assert main(["convert", "starter", str(root / name), "--quantize", name, "--quiet"]) == 0
    return root


@pytest.mark.parametrize("name, error", [("fp8", 0.1), ("int8", 0.05), ("q4_0", 0.5)])
def test_the_llm_is_near_and_smaller(folders, states, starter, name, error):
    pipeline = MMInterleavedPipeline.load(folders / name, "cpu")
    found = pipeline.context_features([STORY])[0]
    assert 0 < (found - states).norm() / states.norm() < error
    original = sum(t.nbytes for t in starter.blocks["llm"].values())
    assert sum(path.stat().st_size for path in (folders / name).glob("llm.*")) < 0.7 * original
    config = read(folders / name).config
    assert config.llm.quantization == name and config.llm.mmfs.is_fused and config.synchronizer.mmfs.is_fused


@pytest.mark.parametrize("name", FORMATS)
def test_only_attention_and_mlp_change(folders, starter, name):
    """All other weights are those that loading the unquantized model gives."""
    plain = MMInterleavedPipeline.load("starter", "cpu", torch.float32)
    found = MMInterleavedPipeline.load(folders / name, "cpu", torch.float32)
    for block in ("encoder", "synchronizer", "unet", "vae"):
        a, b = (getattr(each, block).state_dict() for each in (plain, found))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=2e-3, rtol=1e-3, msg=f"{block} {key}")
    expected = dict(plain.llm.named_parameters())
    changed = [key for key, value in found.llm.named_parameters() if value.dtype in {f.dtype for f in FORMATS.values()}]
    assert len(changed) == 7 * plain.config.llm.num_hidden_layers
    for key, value in found.llm.named_parameters():
        if key not in changed and not key.endswith("weight_scale"):
            torch.testing.assert_close(value, expected[key], atol=2e-3, rtol=1e-3, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_from_every_dtype(tmp_path, tiny_random, name, dtype):
    source, target = tmp_path / "source", tmp_path / "target"
    saved = read("tiny-random")
    native.save(source, saved.config, saved.blocks, saved.tokenizer, dtype)
    assert main(["convert", str(source), str(target), "--quantize", name, "--quiet"]) == 0
    found = read(target)
    kept = torch.float16 if dtype == torch.float32 else dtype
    assert found.blocks["llm"]["embed_tokens.weight"].dtype == kept
    assert {tensor.dtype for tensor in found.blocks["vae"].values()} == {dtype}
    assert MMInterleavedPipeline.load(target, "cpu").context_features([STORY])[0].isfinite().all()


def test_comfyui_is_told_each_layers_format(folders):
    tensors = load_file(folders / "int8" / "llm.safetensors")
    said = json.loads(bytes(tensors["layers.0.mlp.up_proj.comfy_quant"].tolist()))
    assert said == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
    assert tensors["layers.0.mlp.up_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_is_copied_as_it_is(folders, tmp_path, name):
    assert main(["convert", str(folders / name), str(tmp_path / "copy"), "--quiet"]) == 0
    for path in (folders / name).iterdir():
        if path.suffix == ".gguf":
            assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()
        if path.suffix == ".safetensors":
            a, b = load_file(path), load_file(tmp_path / "copy" / path.name)
            assert a.keys() == b.keys() and all(torch.equal(a[key].float(), b[key].float()) for key in a)


def test_no_more_than_a_layer_is_in_memory(tmp_path):
    """Of many layers: the tensors that are made at once are a few times the largest weight."""
    from comfy_mminterleaved.models.build import init_modules
    from comfy_mminterleaved.presets import tiny_config

    config = tiny_config()
    config = replace(config, llm=replace(config.llm, num_hidden_layers=40, intermediate_size=1024))
    blocks = {name: module.state_dict() for name, module in init_modules(config).items()}
    total = sum(t.nbytes for t in blocks["llm"].values())
    largest = max(t.nbytes for tensors in blocks.values() for t in tensors.values())
    with PeakMemory() as memory:
        native.save(tmp_path / "model", config, blocks, dtype=torch.bfloat16, quantization="int8")
    assert memory.peak < 4 * largest < total / 4


# ---- kills, full disks ----

CONVERT = [sys.executable, "-m", "comfy_mminterleaved", "convert", "starter"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed_after(seconds: float, target: Path, *flags: str) -> bool:
    """Whether a conversion was killed after some time, rather than having ended."""
    process = subprocess.Popen([*CONVERT, str(target), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = target.with_name(f".{target.name}.unfinished")
    while process.poll() is None and not work.exists():
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    "name, delays",
    [("int8", [0.01, 0.05]), pytest.param("q4_0", [0.005 * n for n in range(20)], marks=pytest.mark.long)],
)
def test_a_kill_leaves_nothing_half_written_and_the_next_call_goes_on(folders, tmp_path, name, delays):
    kills = 0
    for number, delay in enumerate(delays):
        target = tmp_path / f"model-{number}"
        kills += killed_after(delay, target, "--quantize", name, "--quiet")
        assert not target.exists() or contents(target) == contents(folders / name)
        if not target.exists():
            assert main(["convert", "starter", str(target), "--quantize", name, "--quiet"]) == 0
        assert contents(target) == contents(folders / name)
        assert not list(tmp_path.glob(".*.unfinished"))
    assert kills


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, starter):
    """A conversion that fails in its fourth file finds the first three when it is called again."""
    written, target, write = [], tmp_path / "model", native.write_tensors
    parts = starter.config, starter.blocks

    def no_room():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(path, items, *args, fail_in=""):
        if path.name == fail_in:
            items = [*items[:3], Item(items[3].outputs, no_room), *items[4:]]
        write(path, [Item(i.outputs, lambda i=i: written.append(path.name) or i.make()) for i in items], *args)

    monkeypatch.setattr(native, "write_tensors", functools.partial(counted, fail_in="unet.safetensors"))
    with pytest.raises(OutputError, match="No space left on device. What is done is kept in '.model.unfinished'"):
        native.save(target, *parts, quantization="int8", fingerprint="a")
    assert {"encoder.safetensors", "llm.safetensors", "synchronizer.safetensors"} < set(written) and not target.exists()
    del written[:]
    monkeypatch.setattr(native, "write_tensors", counted)
    native.save(target, *parts, quantization="int8", fingerprint="a")
    assert set(written) == {"unet.safetensors", "vae.safetensors"}


def test_another_source_begins_anew(tmp_path, starter):
    work = tmp_path / ".model.unfinished"
    work.mkdir()
    (work / ".fingerprint").write_text("another")
    (work / "encoder.safetensors").write_bytes(b"old")
    (work / "encoder.safetensors.progress").write_text("999")
    native.save(tmp_path / "model", starter.config, starter.blocks, quantization="fp8", fingerprint="this")
    assert sorted(path.name for path in (tmp_path / "model").iterdir())[0] == "config.json"
    assert read(tmp_path / "model").config.llm.quantization == "fp8"


def test_two_conversions_into_one_folder(tmp_path, starter):
    with (
        locked(tmp_path / ".model.unfinished.lock", ""),
        pytest.raises(OutputError, match="model' is being written by another process; wait for it"),
    ):
        native.save(tmp_path / "model", starter.config, starter.blocks, fingerprint="this")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_hours_of_work_are_kept_when_the_last_step_fails(tmp_path, monkeypatch, starter, error):
    """A virus scanner that holds the folder, or no memory."""
    from comfy_mminterleaved import files

    replace = files.replace_path

    def fail(source, target):
        if target.name == "model":
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace_path", fail)
        with pytest.raises((OutputError, MemoryError)):
            native.save(tmp_path / "model", starter.config, starter.blocks, fingerprint="this")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".model.unfinished").glob("*.safetensors")}
    assert len(before) == 5
    native.save(tmp_path / "model", starter.config, starter.blocks, fingerprint="this")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "model").glob("*.safetensors")} == before
    assert not [p.name for p in (tmp_path / "model").iterdir() if p.name.startswith(".") or p.suffix == ".progress"]


def test_into_the_folder_where_one_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "starter", ".", "--quiet"]) == 0
    assert read(tmp_path).config.llm.hidden_size == 192


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 17])
def test_weights_of_a_file_lie_where_the_kernels_of_the_cpu_want_them(folders, tokens):
    """PyTorch's packed int8 kernel crashes on others."""
    pipeline = MMInterleavedPipeline.load(folders / "int8", "cpu", torch.bfloat16)
    weights = [p for name, p in pipeline.llm.named_parameters() if p.dtype == torch.int8]
    assert weights and all(p.data_ptr() % 64 == 0 for p in weights)
    x = torch.randn(1, tokens, pipeline.config.llm.hidden_size).bfloat16()
    assert pipeline.llm(x).isfinite().all()
    flat = torch.empty(weights[0].numel() + 1, dtype=torch.int8)
    shifted = flat[1:].view(weights[0].shape).copy_(weights[0].data)
    scale = torch.ones(len(shifted), 1)
    rows = x[0, :, : shifted.shape[1]]
    exact = rows.float() @ shifted.float().T
    torch.testing.assert_close(
        quantized_linear(FORMATS["int8"], rows, shifted, scale).float(), exact, rtol=0.02, atol=2
    )


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, monkeypatch, starter):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(OutputError, match=r"The model takes 3\d.\d MB, but .* has 1 MB free; free 3\d"):
        native.save(tmp_path / "model", starter.config, starter.blocks, quantization="fp8", fingerprint="this")
    assert not list(tmp_path.iterdir())


# ---- what is refused ----


def test_a_model_is_quantized_once(folders, tmp_path, capsys):
    assert main(["convert", str(folders / "fp8"), str(tmp_path / "model"), "--quantize", "int8"]) == 2
    assert "stored as fp8 already; quantize the one that it was converted from" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_references_layout_has_no_quantized_weights(tmp_path, capsys):
    assert main(["convert", "starter", str(tmp_path / "m"), "--quantize", "fp8", "--to", "reference"]) == 2
    assert "omit --to reference" in capsys.readouterr().err


def test_q4_0_without_the_gguf_package(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for arguments in (
        ["info", str(folders / "q4_0")],
        ["convert", "starter", str(tmp_path / "m"), "--quantize", "q4_0"],
    ):
        assert main(arguments) == 2
        assert "install it with `pip install gguf`" in capsys.readouterr().err


def changed_copy(folders, tmp_path, name: str) -> Path:
    import shutil

    shutil.copytree(folders / name, tmp_path / "model")
    return tmp_path / "model"


def test_files_of_two_conversions(folders, tmp_path):
    folder = changed_copy(folders, tmp_path, "fp8")
    (folder / "llm.safetensors").write_bytes((folders / "int8" / "llm.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="stores weights as int8, but its settings say fp8; take all"):
        MMInterleavedPipeline.load(folder, "cpu")


def test_an_unknown_format(folders, tmp_path):
    folder = changed_copy(folders, tmp_path, "fp8")
    tensors = load_file(folder / "llm.safetensors")
    said = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    tensors = {key: said.clone() if key.endswith("comfy_quant") else t for key, t in tensors.items()}
    save_file(tensors, folder / "llm.safetensors")
    with pytest.raises(CheckpointError, match="stores weights as nvfp4"):
        MMInterleavedPipeline.load(folder, "cpu")
    config = json.loads((folder / "config.json").read_text())
    config["llm"]["quantization"] = "q2_k"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="stored as 'q2_k'; this release reads fp8, int8, q4_0"):
        MMInterleavedPipeline.load(folder, "cpu")


def test_a_gguf_of_another_model(folders, tmp_path):
    folder = changed_copy(folders, tmp_path, "q4_0")
    writer = gguf.GGUFWriter(folder / "llm.gguf", "llama")
    writer.add_name("Vicuna 13B")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="GGUF of the architecture 'llama', 'Vicuna 13B'; it must be an MM-Inter"):
        MMInterleavedPipeline.load(folder, "cpu")


@pytest.mark.parametrize("keep", [0, 40, 3000, -1000])
def test_a_gguf_that_is_cut_short(folders, tmp_path, keep):
    folder = changed_copy(folders, tmp_path, "q4_0")
    data = (folder / "llm.gguf").read_bytes()
    (folder / "llm.gguf").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="llm.gguf.*cut short"):
        MMInterleavedPipeline.load(folder, "cpu")


def test_the_description_of_a_format_is_comfyuis():
    assert json.loads(bytes(comfy_quant(FORMATS["fp8"]).tolist()))["format"] == "float8_e4m3fn"


# ---- while loading ----


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_torchao_quantizes_while_loading(states, name):
    pytest.importorskip("torchao")
    pipeline = MMInterleavedPipeline.load("starter", "cpu", quantize=name)
    found = pipeline.context_features([STORY])[0]
    assert 0 < (found - states).norm() / states.norm() < 0.1
    assert pipeline.generate_text(STORY).text


def test_without_torchao_it_is_said_what_else_would_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(CheckpointError, match="pip install torchao`, or write the model with `convert --quantize fp8`"):
        MMInterleavedPipeline.load("starter", "cpu", quantize="fp8")


def test_a_stored_format_is_not_quantized_again(folders):
    with pytest.raises(CheckpointError, match="stored as int8 already; omit --quantize"):
        MMInterleavedPipeline.load(folders / "int8", "cpu", quantize="fp8")


def test_what_quantizing_while_loading_cannot_do_is_refused():
    with pytest.raises(SettingError, match="omit --memory, or write it with `convert --quantize int8`"):
        MMInterleavedPipeline.load("starter", "cpu", quantize="int8", memory="8GB")
