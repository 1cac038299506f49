"""Loading: the same numbers as transformers' own loader, each weight stored as asked, and nothing held twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BloomConfig,
    CTRLConfig,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    JambaConfig,
    LlavaConfig,
    MptConfig,
    PreTrainedModel,
    Zamba2Config,
    ZambaConfig,
)

from autotune import cli
from autotune.config import Configuration, LoadGroup, mib
from autotune.engine import support
from autotune.engine.decode import Engine
from autotune.engine.load import lacks, load_model, quantize_linear, usual_attention
from autotune.engine.load.quantize import quantized_linears
from autotune.engine.support import Unsupported
from autotune.measure.memory import module_bytes
from autotune.model.folder import PlanError
from autotune.model.shape import read_shape
from autotune.model.weights import matrix_bytes, model_bytes
from tests.tiny_models import FAMILIES, logits, tiny, tokens

# calm models: with larger weights two layers turn any rounding into another text
CALM = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
WORDS = ("bnb-nf4", "bnb-fp4", "bnb-int8", "quanto-int8")
# relative errors of one layer's output, and of the logits after two layers
LAYER_BOUND = {"bnb-nf4": 0.13, "bnb-fp4": 0.17, "bnb-int8": 0.02, "quanto-int8": 0.015}
LOGITS_BOUND = {"bnb-nf4": 0.42, "bnb-fp4": 0.58, "bnb-int8": 0.05, "quanto-int8": 0.04}
HEAD_BOUND = {"int8": 0.015, "nf4": 0.13}


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized weights compute in full precision here, whatever the processor has."""
    monkeypatch.setattr(support, "full_precision", lambda device: "fp32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        wide_heads = {"head_dim": 16} if family == "gemma3" else {}
        tiny(family, **CALM, **wide_heads).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_same_tensors(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    left = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    right = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


# ---- unquantized


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_gives_the_bits_of_from_pretrained(saved, family, attention):
    ours = load_model(saved[family], weights="fp32", lm_head="fp32", attention=attention)
    theirs = AutoModelForCausalLM.from_pretrained(
        saved[family], dtype=torch.float32, attn_implementation=attention
    ).eval()
    assert_same_tensors(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.config._attn_implementation == attention
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_keeps_in_float32_what_transformers_keeps_in_float32(saved, family):
    assert_same_tensors(load_model(saved[family], weights="bf16"), stock(saved[family], torch.bfloat16))


def test_a_bf16_checkpoint_is_widened_without_loss(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert_same_tensors(load_model(tmp_path, weights="fp32"), stock(tmp_path))


@pytest.mark.parametrize("family", ["llama", "tied-llama", "gpt-neox"])
def test_a_sharded_checkpoint_gives_the_same_bits(tmp_path, family):
    model = tiny(family, **CALM)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_tensors(load_model(tmp_path, weights="fp32"), stock(tmp_path))
    assert torch.equal(logits(load_model(tmp_path, weights="fp32")), logits(model))


def test_a_checkpoint_of_the_base_model_alone_is_found_under_its_own_names(tmp_path):
    model = tiny("tied-llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    assert_same_tensors(load_model(tmp_path, weights="fp32"), model)


def test_names_that_transformers_converts_are_converted(saved):
    stored = load_file(saved["gpt-neox"] / "model.safetensors").keys()
    ours = load_model(saved["gpt-neox"], weights="fp32")
    assert "embed_out.weight" in stored
    assert "embed_out.weight" not in dict(ours.named_parameters())
    assert torch.equal(logits(ours), logits(stock(saved["gpt-neox"])))


# ---- the embedding and the head


@pytest.mark.parametrize("family", ["tied-llama", "gemma3"])
def test_tied_embeddings_stay_one_tensor(saved, family):
    model = load_model(saved[family], weights="bnb-nf4", lm_head="fp32")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_untied_embeddings_stay_two_tensors(saved):
    model = load_model(saved["llama"], weights="fp32", lm_head="fp32")
    assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("head", ["int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_head_leaves_the_embedding_as_it_was(saved, family, head):
    model, reference = load_model(saved[family], weights="fp32", lm_head=head), stock(saved[family])
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, reference.get_input_embeddings().weight)
    output = model.get_output_embeddings()
    assert type(output) is not nn.Linear
    assert module_bytes(output) < 0.4 * module_bytes(reference.get_output_embeddings())
    assert 1e-4 < relative(logits(model), logits(reference)) < HEAD_BOUND[head]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_on_the_host_are_a_tensor_of_their_own(saved, family):
    model = load_model(saved[family], weights="fp32", lm_head="fp32", embeddings="host")
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.device.type == "cpu"
    assert embedding.data_ptr() != output.data_ptr()
    assert torch.equal(logits(model), logits(stock(saved[family])))


# ---- quantized


def check_layers(model: PreTrainedModel, reference: PreTrainedModel, word: str) -> None:
    """Every linear layer but the head is quantized, and its output is close to the original's."""
    modules, count = dict(model.named_modules()), 0
    for name, linear in reference.named_modules():
        if type(linear) is not nn.Linear or linear is reference.get_output_embeddings():
            continue
        x = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(count))
        assert type(modules[name]) is not nn.Linear, name
        if "4" in word and word.startswith("bnb"):
            assert modules[name].weight.quant_state.quant_type == word.removeprefix("bnb-")
        with torch.no_grad():  # quanto-int4 in float32 fails in inference mode
            assert 1e-4 < relative(modules[name](x), linear(x)) < LAYER_BOUND[word], name
        count += 1
    assert count >= 8


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # it says that its inputs are cast
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_quantized_within_its_error(saved, family, word):
    model, reference = load_model(saved[family], weights=word, lm_head="fp32"), stock(saved[family])
    footprint = module_bytes(model)
    check_layers(model, reference, word)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert relative(logits(model), logits(reference)) < LOGITS_BOUND[word]
    per_weight = 1.02 if "int8" in word else 0.58  # bytes, with the scales
    linear = sum(
        m.weight.numel()
        for m in reference.modules()
        if type(m) is nn.Linear and m is not reference.get_output_embeddings()
    )
    assert footprint < module_bytes(reference) - (4 - per_weight) * linear * 0.95


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("rows", "columns"), [(89, 64), (33, 128), (96, 192), (5, 320), (64, 32), (40, 100)])
def test_layers_of_any_height_and_their_biases_survive(word, rows, columns):
    linear = nn.Linear(columns, rows).requires_grad_(False)
    linear.weight.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    expected, bias = linear(x), linear.bias.clone()
    layer = quantize_linear(linear, word, "cpu").eval()
    assert torch.equal(getattr(layer, "linear", layer).bias, bias)
    with torch.inference_mode():
        assert 1e-4 < relative(layer(x) - bias, expected - bias) < LAYER_BOUND[word]


@pytest.mark.parametrize(("weights", "source"), [("quanto-int4", "cpu"), ("quanto-int8", "meta")])
def test_what_is_quantized_by_rows_is_never_whole_on_the_device(saved, monkeypatch, weights, source):
    sources = []

    def quantize(linear, word, device):
        sources.append(str(linear.weight.device))
        return linear

    monkeypatch.setattr("autotune.engine.load.model.quantize_linear", quantize)
    with pytest.raises(Unsupported, match="no tensor"):  # since what is on this device is not there
        load_model(saved["llama"], weights=weights, lm_head="int8", device="meta")
    assert sources[0] == "meta"  # the lm_head
    assert set(sources[1:]) == {source}


@pytest.mark.usefixtures("uncompiled_quanto")
def test_quanto_int4_is_quantized_within_its_error(saved, monkeypatch):
    monkeypatch.setitem(LAYER_BOUND, "quanto-int4", 0.2)
    model, reference = load_model(saved["llama"], weights="quanto-int4", lm_head="fp32"), stock(saved["llama"])
    check_layers(model, reference, "quanto-int4")
    model = load_model(saved["llama"], weights="fp32", lm_head="int4")
    with torch.no_grad():
        assert 1e-4 < relative(logits(model), logits(reference)) < 0.2


@pytest.mark.usefixtures("uncompiled_quanto")
def test_quanto_int4_goes_through_the_net_and_generates(saved):
    configuration = Configuration(weights="quanto-int4", lm_head="fp32", attention="eager")
    engine = Engine.load(str(saved["llama"]), configuration.load_group, "cpu")
    assert len(engine.generate([1, 2, 3], configuration, 4).tokens) == 4


@pytest.mark.parametrize("word", ["bnb-nf4", "bnb-fp4"])
def test_a_layer_in_4_bits_is_given_rows_that_lie_side_by_side(monkeypatch, word):
    """Zamba's are columns; bitsandbytes' kernel for AVX-512 in bfloat16 reads past them."""
    import bitsandbytes

    strides, multiply = [], bitsandbytes.matmul_4bit

    def watched(x, *args, **kwargs):
        strides.append(x.stride())
        return multiply(x, *args, **kwargs)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", watched)
    torch.manual_seed(0)
    layer = quantize_linear(nn.Linear(128, 64, bias=False).requires_grad_(False), word, "cpu").eval()
    x = torch.randn(1, 128, 5).transpose(1, 2)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.contiguous()))
    assert strides == [(640, 128, 1)] * 2


# ---- what cannot be loaded says so


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def test_a_wrong_shape_is_unsupported_by_name(folder):
    rewrite(folder, model__layers__1__mlp__up_proj__weight=torch.zeros(47, 32))
    with pytest.raises(Unsupported, match=r"model\.layers\.1\.mlp\.up_proj\.weight has shape \(47, 32\), .*\(48, 32\)"):
        load_model(folder, weights="fp32")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_missing_tensor_is_unsupported_by_name(folder, name):
    rewrite(folder, **{name: None})
    with pytest.raises(Unsupported, match=f"the checkpoint has no tensor for {name}"):
        load_model(folder, weights="fp32")


def test_a_missing_embedding_of_a_tied_model_is_unsupported_by_name(tmp_path):
    tiny("tied-llama").save_pretrained(tmp_path)
    rewrite(tmp_path, **{"model.embed_tokens.weight": None})
    with pytest.raises(Unsupported, match=r"the checkpoint has no tensor for (model\.embed_tokens|lm_head)\.weight"):
        load_model(tmp_path, weights="fp32")


def test_a_wrong_shape_under_a_converted_name_is_unsupported_by_name(tmp_path):
    tiny("gpt-neox").save_pretrained(tmp_path)
    rewrite(tmp_path, embed_out__weight=torch.zeros(7, 32))
    with pytest.raises(Unsupported, match=r"lm_head\.weight has shape \(7, 32\), the config says \(89, 32\)"):
        load_model(tmp_path, weights="fp32")


def test_a_folder_without_safetensors_is_unsupported(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"no model\.safetensors: only safetensors checkpoints are read"):
        load_model(folder, weights="fp32")


def test_a_checkpoint_that_is_already_quantized_is_unsupported_but_as_it_stands(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="already quantized: only weights = checkpoint can load it"):
        load_model(folder, weights="bnb-nf4")
    with pytest.raises(Unsupported, match="keeps its own lm_head and embeddings"):
        load_model(folder, weights="checkpoint", lm_head="nf4")
    with pytest.raises(Unsupported, match="keeps its own lm_head and embeddings"):
        load_model(folder, weights="checkpoint", embeddings="host")


def test_a_plain_checkpoint_is_not_loaded_as_a_quantized_one(folder):
    with pytest.raises(Unsupported, match="this one is not"):
        load_model(folder, weights="checkpoint")


def test_an_attention_that_is_not_installed_is_unsupported(folder):
    with pytest.raises(Unsupported, match=r"(?i)flash.?attention"):
        load_model(folder, weights="fp32", attention="flash_attention_2")


# ---- the peak while loading

PEAK = """
import ctypes, gc, json, sys
from pathlib import Path

libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 4 * 2**20)  # as measure/memory.py does
libc.mallopt(-1, 16 * 2**20)

import torch
from autotune.engine import load, support
from autotune.measure.memory import Meter, _status, module_bytes

torch.set_num_threads(1)
support.full_precision = lambda device: "fp32"
small, *loads = sys.argv[1:]
meter = Meter("cpu", None)
for item in loads:
    weights, _, folder = item.partition("=")
    load.load_model(small, weights=weights, lm_head="fp32")  # its library and code are in memory from here on
    meter.begin()
    before = _status("VmRSS")
    model = load.load_model(folder, weights=weights, lm_head="fp32")
    grown = _status("VmHWM") - before
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"grown": grown, "footprint": module_bytes(model), "largest": largest}))
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM from /proc")
def test_loading_never_holds_more_than_the_result_and_one_tensor(tmp_path, saved):
    size = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "initializer_range": 0.02}
    tiny("llama", num_hidden_layers=4, **size).save_pretrained(tmp_path / "one")
    tiny("tied-llama", num_hidden_layers=4, **size).save_pretrained(tmp_path / "sharded", max_shard_size="20MB")
    assert (tmp_path / "one" / "model.safetensors").stat().st_size > 60e6
    loads = [f"fp32={tmp_path / 'one'}", f"fp32={tmp_path / 'sharded'}"]
    loads += [f"{word}={tmp_path / 'one'}" for word in ("bnb-nf4", "quanto-int8")]
    answer = subprocess.run(
        [sys.executable, "-c", PEAK, str(saved["llama"]), *loads],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(loads)
    for seen, what in zip(lines, loads, strict=True):
        assert seen["largest"] == 4096 * 512 * 4
        slack = 4e6  # the allocator's
        if not what.startswith("fp32"):  # the quantizers' temporaries: some four copies of a layer beside the layer
            slack = max(slack, 5 * 1408 * 512 * 4 + 4e6 - seen["largest"])
        assert seen["footprint"] * 0.9 < seen["grown"] < seen["footprint"] + seen["largest"] + slack, (what, seen)


CROSSWISE = {
    "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=89, n_positions=64, n_embd=64, n_layer=2, n_head=4)),
    "falcon": FalconForCausalLM(
        FalconConfig(vocab_size=89, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    ),
}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.usefixtures("uncompiled_quanto")
@pytest.mark.parametrize("word", [*WORDS, "quanto-int4"])
@pytest.mark.parametrize("name", CROSSWISE)
def test_linear_layers_of_other_classes_are_quantized_as_plain_ones_would_be(tmp_path, name, word):
    CROSSWISE[name].save_pretrained(tmp_path)
    model = load_model(tmp_path, weights=word, lm_head="fp32")
    linears = [linear for layer in read_shape(tmp_path).layers for linear in layer.linears]
    assert len(linears) == 8
    predicted = sum(matrix_bytes(word, linear, 4) for linear in linears)
    held = [model.get_submodule(linear.name.removesuffix(".weight")) for linear in linears]
    biases = sum(layer.bias.nbytes for layer in held if layer.bias is not None)
    assert predicted + biases == pytest.approx(sum(module_bytes(layer) for layer in held), rel=0.01)
    reference, count = stock(tmp_path).requires_grad_(False), 0
    for path, module in reference.named_modules():
        if type(module).__name__ not in ("Conv1D", "FalconLinear"):
            continue
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None).requires_grad_(False)
        plain.weight.copy_(weight)
        if module.bias is not None:
            plain.bias.copy_(module.bias)
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = quantize_linear(plain, word, "cpu").eval()(x)
            assert torch.equal(model.get_submodule(path)(x), expected), path
        assert type(model.get_submodule(path)) not in (nn.Linear, type(module))
        count += 1
    assert count == 8


_SMALL = {"vocab_size": 89, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SHARING = {
    "ctrl": CTRLConfig(vocab_size=89, n_positions=64, n_embd=64, dff=96, n_layer=2, n_head=4),
    "zamba": ZambaConfig(
        **_SMALL,
        intermediate_size=96,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        n_mamba_heads=2,
        mamba_dt_rank=16,
        use_mamba_kernels=False,
        num_key_value_heads=4,
    ),
    "zamba2": Zamba2Config(
        **_SMALL,
        intermediate_size=96,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        hybrid_layer_ids=[1, 3],
        n_mamba_heads=4,
        mamba_headdim=32,
        mamba_ngroups=1,
        mamba_d_state=16,
        num_mem_blocks=1,
        use_mamba_kernels=False,
        num_key_value_heads=4,
    ),
}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_layers_that_share_their_weights_are_read_once_and_shared(tmp_path, name, merge):
    torch.manual_seed(0)
    written = AutoModelForCausalLM.from_config(SHARING[name])
    for parameter in written.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    written.save_pretrained(tmp_path)
    reference = stock(tmp_path)
    ids = torch.tensor([list(range(9))])
    model = load_model(tmp_path, weights="fp32", lm_head="fp32", merge=merge)
    expected = reference(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert module_bytes(model) == pytest.approx(module_bytes(reference), rel=0.001)
    smaller = load_model(tmp_path, weights="bnb-nf4", lm_head="fp32", merge=merge)
    assert relative(smaller(ids, use_cache=False).logits, expected) < 0.5


def test_a_layer_whose_weight_the_models_code_reads_is_not_quantized(tmp_path):
    AutoModelForCausalLM.from_config(SHARING["ctrl"]).save_pretrained(tmp_path)
    assert quantized_linears(stock(tmp_path), "fp32") == set()
    small = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2}
    jamba = JambaConfig(**small, num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False)
    names = quantized_linears(AutoModelForCausalLM.from_config(jamba), "bnb-nf4")
    assert any(name.endswith("x_proj") for name in names)
    assert not any(name.endswith("dt_proj") for name in names)


_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}
_TEXT = {**_SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "eos_token_id": 3}


def wrapper(name: str) -> PreTrainedModel:
    """A multimodal model whose text tower is tied by the whole's config, or by nothing; with two tokens to end with."""
    if name == "gemma3":  # stock loads it whole as a causal model
        text = {**_TEXT, "head_dim": 16, "bos_token_id": 1, "pad_token_id": 0}
        config = Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, eos_token_id=[3, 5])
        config.image_token_index = config.image_token_id = 88
    else:  # stock knows it as no causal model
        text = {"model_type": "llama", **_TEXT}
        config = LlavaConfig(text_config=text, vision_config={"model_type": "clip_vision_model", **_VISION})
        config.tie_word_embeddings, config.eos_token_id = name == "tied llava", [3, 5]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize("name", ["gemma3", "llava", "tied llava"])
def test_of_a_multimodal_model_the_text_tower_alone_is_loaded_and_planned(tmp_path, name):
    whole = wrapper(name)
    whole.save_pretrained(tmp_path)
    model = load_model(tmp_path, weights="fp32", lm_head="fp32")
    ids = torch.tensor([list(range(9, 29))])
    torch.testing.assert_close(model(ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not any("vision" in path for path, _ in model.named_modules())
    assert model.generation_config.eos_token_id == [3, 5]
    shape = read_shape(tmp_path)
    assert sum(model_bytes(shape, "fp32", "fp32", "device")) == parameter_bytes(model)
    assert shape.left_out_bytes == parameter_bytes(whole) - parameter_bytes(model) > 0
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    words = ["plan", "--model", str(tmp_path), "--budget", "1GB", "--device", "cpu", "--contexts", "64"]
    answer = CliRunner().invoke(cli.main, words)
    assert f"The text tower alone: {mib(shape.left_out_bytes)} of other towers" in answer.output
    quantized = load_model(tmp_path, weights="bnb-nf4", lm_head="nf4")
    assert type(quantized.get_output_embeddings()) is not nn.Linear


def parameter_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_a_type_that_no_cache_can_serve_is_refused_before_its_weights_are_looked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cpmant"}))
    with pytest.raises(Unsupported, match="cpmant puts tokens of its own before every text"):
        load_model(tmp_path, weights="fp32")
    with pytest.raises(PlanError, match="cpmant puts tokens of its own before every text"):
        read_shape(tmp_path)


def test_weights_that_are_in_no_linear_layer_are_named(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=89, n_positions=4096, n_embd=32, n_layer=2, n_head=4))
    model.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=r"quanto-int8 stores linear layers; .* in others, such as transformer\.wpe"):
        load_model(tmp_path, weights="quanto-int8", lm_head="fp32")
    assert load_model(tmp_path, weights="fp32", lm_head="fp32").config.n_embd == 32


@pytest.mark.parametrize(
    ("config", "generation", "stop"),
    [
        (5, None, {5}),
        (5, {"eos_token_id": [6, 7]}, {6, 7}),
        (5, {"eos_token_id": 6}, {6}),
        (None, {"eos_token_id": 6}, {6}),
        ([5, 6], None, {5, 6}),
        (5, {}, set()),
    ],
)
def test_stop_tokens_are_those_that_stock_ends_with(tmp_path, config, generation, stop):
    tiny("llama").save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "eos_token_id": config}))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    for weights in ("fp32", "quanto-int8"):
        engine = Engine(load_model(tmp_path, weights=weights), None, LoadGroup(), "cpu")
        assert engine.stop_tokens == stop
    assert Engine(stock(tmp_path), None, LoadGroup(), "cpu").stop_tokens == stop


_SHAPE = {"vocab_size": 89, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
WITHOUT_SDPA = {
    "gemma2": Gemma2Config(
        **_SHAPE, **_IDS, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=48
    ),
    "bloom": BloomConfig(vocab_size=89, hidden_size=32, n_head=4, n_layer=2, **_IDS),
    "gptj": GPTJConfig(vocab_size=89, n_embd=32, n_head=4, n_layer=2, rotary_dim=4, n_positions=256, **_IDS),
    "mpt": MptConfig(vocab_size=89, d_model=32, n_heads=4, n_layers=2, max_seq_len=256, **_IDS),
}


@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_a_model_without_sdpa_runs_as_target_and_as_draft_with_what_it_has(tmp_path, name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WITHOUT_SDPA[name])
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.save_pretrained(tmp_path / "draft")
    tiny("llama").save_pretrained(tmp_path / "target")
    draft = str(tmp_path / "draft")
    assert lacks(draft, "sdpa") == f"transformers' {name} has no sdpa"
    assert not lacks(tmp_path / "target", "sdpa")
    prompt, lookup = tokens(60), Configuration(draft="prompt-lookup", depth=3)
    theirs = stock(tmp_path / "draft").generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    own = Engine.load(draft, LoadGroup("fp32", "fp32", attention=usual_attention(draft)), "cpu")
    assert own.generate(prompt, lookup, 20).tokens == theirs[0, 60:].tolist()
    group = LoadGroup("fp32", "fp32", draft=draft, draft_weights="fp32")
    drafted = Engine.load(str(tmp_path / "target"), group, "cpu")
    configuration = Configuration(draft=draft, depth=3)
    plain = drafted.generate(prompt, Configuration(), 20).tokens
    assert drafted.generate(prompt, configuration, 20).tokens == plain


@pytest.mark.parametrize("head", ["own", "equal", "alone", "none"])
@pytest.mark.parametrize("weights", ["fp32", "quanto-int8"])
def test_a_head_beside_tie_word_embeddings_is_taken_as_stock_takes_it(tmp_path, head, weights):
    model = tiny("tied-llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    if head == "alone":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    elif head != "none":
        tensors["lm_head.weight"] = embedding.flip(0) if head == "own" else embedding.clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours, theirs = load_model(tmp_path, weights=weights, lm_head="fp32"), stock(tmp_path)
    assert torch.equal(ours.get_output_embeddings().weight, theirs.get_output_embeddings().weight)
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    shared = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert shared == (head != "own") == (theirs.lm_head.weight is theirs.model.embed_tokens.weight)
    shape = read_shape(tmp_path)
    assert (shape.tied, shape.embedding_elements) == (shared, embedding.numel())
    if weights == "fp32":
        assert torch.equal(logits(ours), logits(theirs))


def test_of_two_sets_of_weights_in_a_folder_plan_and_engine_take_the_one_that_stock_takes(tmp_path):
    tiny("llama", seed=1).save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    tiny("llama", seed=2).save_pretrained(tmp_path / "both")
    for file in (tmp_path / "sharded").glob("model*"):
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    assert_same_tensors(load_model(tmp_path / "both", weights="fp32"), stock(tmp_path / "both"))
    assert not torch.equal(logits(stock(tmp_path / "both")), logits(stock(tmp_path / "sharded")))
    shard = next((tmp_path / "both").glob("model-00001*"))
    shard.write_bytes(b"")  # nobody reads it
    assert read_shape(tmp_path / "both").exact
