import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from benchmarks import rig

VOCABULARY = rig.TARGETS["tiny"]["vocab_size"]
STEPS = 100


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rig")
    rig.build(out, "tiny", "tiny", acceptance=0.8, device="cpu", seed=1)
    return out


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rig")
    rig.build(out, "tiny-hybrid", "tiny-hybrid", acceptance=0.8, device="cpu", seed=1)
    return out


@pytest.fixture(scope="module")
def tables() -> tuple[torch.Tensor, torch.Tensor]:
    return rig.successors(VOCABULARY, 0.8, seed=1)


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def generate(model: PreTrainedModel, count: int = 8, **options: object) -> torch.Tensor:
    """Greedy continuations of random prompts, each with its prompt's last token: (count, 1 + STEPS)."""
    prompts = torch.randint(0, 256, (count, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    return model.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=STEPS, **options)[:, 39:]


def follows(walk: torch.Tensor, table: torch.Tensor) -> float:
    assert walk.shape == (8, 1 + STEPS)
    return (table[walk[:, :-1]] == walk[:, 1:]).float().mean().item()


def agreement(model: PreTrainedModel, walk: torch.Tensor) -> float:
    with torch.no_grad():
        guesses = model(walk[:, :-1]).logits.argmax(-1)
    return (guesses == walk[:, 1:]).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("role", ["target", "draft"])
def test_greedy_text_follows_the_planted_successors(pair, tables, role, dtype):
    model = load(pair / role, dtype)
    assert model.dtype == dtype
    assert follows(generate(model), tables[role == "draft"]) == 1


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_hybrid_follows_the_planted_successors(hybrids, tables, role):
    model = load(hybrids / role)
    assert set(model.config.layer_types) == {"linear_attention", "full_attention"}
    assert follows(generate(model), tables[role == "draft"]) == 1


@pytest.mark.parametrize("acceptance", [0.5, 0.8])
def test_the_draft_agrees_with_the_target_as_often_as_chosen(tmp_path, acceptance):
    rig.build(tmp_path, "tiny", "tiny", acceptance, device="cpu", seed=3)
    walk = generate(load(tmp_path / "target"), count=16)
    assert agreement(load(tmp_path / "draft"), walk) == pytest.approx(acceptance, abs=0.06)


def test_the_walk_visits_the_whole_vocabulary_and_never_predicts_a_special_token(tables):
    target, draft = tables
    special = [VOCABULARY - 256, VOCABULARY - 255]
    token, seen = int(target[0]), set()
    while token not in seen:
        seen.add(token)
        token = int(target[token])
    assert len(seen) == VOCABULARY - 2
    assert not torch.isin(draft, torch.tensor(special)).any()
    assert (target == draft).float().mean().item() == pytest.approx(0.8, abs=0.001)


def quanto(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    from optimum.quanto import freeze, qtypes, quantize

    quantize(model, weights=qtypes[weights])
    freeze(model)
    return model


@pytest.fixture
def quanto_without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of Python in place of the extension that quanto would compile for a minute at first use."""
    from optimum.quanto.library.extensions import cpp

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
@pytest.mark.usefixtures("quanto_without_compiler")
def test_quanto_weights_keep_the_planted_choices(pair, tables, weights):
    walk = generate(quanto(load(pair / "target"), weights))
    assert follows(walk, tables[0]) >= 0.99
    assert agreement(quanto(load(pair / "draft"), weights), walk) == pytest.approx(0.8, abs=0.06)


def test_nf4_weights_with_an_nf4_head_keep_the_planted_choices(pair, tables):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["none"])
    target = load(pair / "target", quantization_config=nf4)
    assert type(target.lm_head).__name__ == "Linear4bit"
    walk = generate(target)
    assert follows(walk, tables[0]) >= 0.99
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert agreement(load(pair / "draft", quantization_config=nf4), walk) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.usefixtures("quanto_without_compiler")
def test_a_quantized_cache_keeps_the_planted_choices(pair, tables, bits):
    cache = {"backend": "quanto", "nbits": bits, "q_group_size": 64, "residual_length": 32}
    walk = generate(load(pair / "target"), cache_implementation="quantized", cache_config=cache)
    assert follows(walk, tables[0]) >= 0.99


def test_the_model_is_neither_certain_nor_lost_on_its_own_text(pair):
    tokens = AutoTokenizer.from_pretrained(pair / "target")((pair / "text.txt").read_text()).input_ids[:512]
    for role in ("target", "draft"):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            probabilities = load(pair / role)(ids).logits.softmax(-1).amax(-1)
        assert 0.5 < probabilities.mean() < 0.9


def test_a_tied_draft_stores_and_loads_one_matrix_for_embeddings_and_head(pair):
    index = json.loads((pair / "draft" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    model = load(pair / "draft")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_every_id_is_text_and_all_text_is_ids(pair):
    tokenizer = AutoTokenizer.from_pretrained(pair / "target")
    assert len(tokenizer) == VOCABULARY
    text = "Größe = f(x)\n\t# 漢字 "
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = [token for token in range(256, VOCABULARY) if token not in tokenizer.all_special_ids]
    assert tokenizer(tokenizer.decode(ids)).input_ids == ids
    assert AutoTokenizer.from_pretrained(pair / "draft").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(("size", "parameters"), [("8b", 8_030_261_248), ("3b", 3_212_749_824), ("1b", 1_235_814_400)])
def test_the_real_sizes_have_the_published_parameter_counts(size, parameters):
    config = rig.config(rig.TARGETS[size])
    assert sum(shape.numel() for shape in rig.parameter_shapes(config).values()) == parameters
    assert config.max_position_embeddings >= 16_384


def test_no_shard_is_larger_than_four_gigabytes():
    shapes = rig.parameter_shapes(rig.config(rig.TARGETS["8b"]))
    shards = list(rig._shards(shapes))
    assert [name for names in shards for name in names] == list(shapes)
    assert max(2 * sum(shapes[name].numel() for name in names) for names in shards) <= 4e9


def test_the_same_seed_writes_the_same_weights(pair, tmp_path):
    rig.build(tmp_path, "tiny", None, acceptance=0.8, device="cpu", seed=1)
    name = "model-00001-of-00001.safetensors"
    assert (tmp_path / "target" / name).read_bytes() == (pair / "target" / name).read_bytes()
    assert not (tmp_path / "draft").exists()


def test_the_command_ends_with_one_line_of_json_and_never_overwrites(tmp_path):
    arguments = [str(tmp_path), "--size", "tiny", "--draft", "none", "--device", "cpu", "--max-positions", "2048"]
    first = CliRunner().invoke(rig.main, arguments)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout.splitlines()[-1])["target"]["path"] == str(tmp_path / "target")
    assert json.loads((tmp_path / "target" / "config.json").read_text())["max_position_embeddings"] == 2048
    assert CliRunner().invoke(rig.main, arguments).exit_code == 2


def test_a_draft_of_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="another vocabulary"):
        rig.build(tmp_path, "8b", "tiny", acceptance=0.8, device="cpu")
