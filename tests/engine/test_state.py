"""Models whose layers keep a state: every cache, chunks and speculation give stock's text; what cannot is refused."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    NemotronHConfig,
    OpenAIGPTConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from autotune.config import Configuration, LoadGroup
from autotune.engine import runner as runner_module
from autotune.engine.cache import copy_states, go_back_to, make_cache, states_of, stored_bytes
from autotune.engine.decode import Engine
from autotune.engine.graph import StepRunner
from autotune.engine.net import check_steps
from autotune.engine.runner import AGAIN
from autotune.engine.support import Unsupported
from tests.tiny_models import VOCABULARY, draft_of, tokens

_SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "pad_token_id": 0, "eos_token_id": None}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "delta net": Qwen3NextConfig(
        **_SIZE,
        **_HEADS,
        **_DELTA,
        **_EXPERTS,
        head_dim=16,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
    "convolution": Lfm2Config(**_SIZE, **_HEADS, layer_types=["conv", "full_attention"] * 2, block_multiple_of=16),
    "both in a layer": FalconH1Config(**_SIZE, **_HEADS, **_MAMBA, mamba_d_ssm=64, head_dim=8),
    "positions from zero": BambaConfig(**_SIZE, **_HEADS, **_MAMBA, attn_layer_indices=[1, 3]),
    "no attention": Mamba2Config(**_SIZE, num_heads=4, head_dim=16, n_groups=1, state_size=8, chunk_size=16),
    "layers of experts alone": NemotronHConfig(
        **{name: size for name, size in _SIZE.items() if name != "num_hidden_layers"},
        **_HEADS,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=16,
        head_dim=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    "one token at a time": JambaConfig(
        **_SIZE,
        **_HEADS,
        **_EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
}
SINGLY = ("one token at a time", "layers of experts alone")  # what they say for several at once is apart
CHOICES = [
    {},
    {"cache": "static"},
    {"cache": "quantized-8", "prefill_chunk": 16},
    {"prefill_chunk": 7},
    {"draft": "prompt-lookup", "depth": 3},
    {"draft": "prompt-lookup", "depth": 3, "cache": "static"},
    {"draft": "a model", "depth": 3, "draft_weights": "fp32"},
]
GROUP = LoadGroup(weights="fp32", lm_head="fp32")
NEW = 16


def spread_out(model: torch.nn.Module) -> None:
    """So that texts neither settle on one token nor hardly depend on what came before."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    with torch.no_grad():
        torch.manual_seed(0)
        made = (
            AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).eval().requires_grad_(False)
        )
        spread_out(made)
    made.generation_config.eos_token_id = None
    made.fed_singly = not check_steps(made, "cpu", "device")
    assert made.fed_singly == (request.param in SINGLY)
    return made


@pytest.fixture(scope="module")
def stock(model):
    asked = torch.tensor([tokens(40)])
    said = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW, do_sample=False)
    return said[0, asked.shape[1] :].tolist()


@pytest.mark.parametrize("words", CHOICES, ids=lambda words: " ".join(map(str, words.values())) or "dynamic")
def test_the_text_is_that_of_stock_decoding_without_speculation(model, stock, words):
    draft = None
    if words.get("draft") == "a model":
        draft = draft_of(model, 0.05)
        draft.fed_singly = model.fed_singly
    configuration = Configuration(weights="fp32", lm_head="fp32", **words)
    done = Engine(model, draft, GROUP, "cpu").generate(tokens(40), configuration, NEW)
    assert done.tokens == stock
    if draft is not None:
        assert 0 < done.accepted < done.proposed  # what was rejected has been rolled back


def test_a_conversation_goes_on_from_the_last_kept_state_and_no_other(model):
    configuration = Configuration(weights="fp32", lm_head="fp32")
    engine = Engine(model, None, GROUP, "cpu")
    first = tokens(40)
    said = engine.generate(first, configuration, 8, keep=200).tokens
    for prompt, cached in (
        (first + said + tokens(9, 1), len(first) + len(said) - 1),  # behind all that was fed
        (first + tokens(9, 2), 0),  # the state of a moment that was not kept
        (first + tokens(9, 3), len(first)),
    ):
        done = engine.generate(prompt, configuration, 8, keep=200)
        fresh = Engine(model, None, GROUP, "cpu").generate(prompt, configuration, 8)
        assert done.tokens == fresh.tokens
        assert done.cached_tokens <= cached


def test_a_copy_of_the_states_is_gone_back_to_in_place(model):
    cache = make_cache("dynamic", model.config, 100, "cpu")
    engine = Engine(model, None, GROUP, "cpu")
    runner, _ = engine._runner("target", Configuration(weights="fp32", lm_head="fp32"), 100, (1,))
    assert len(states_of(cache)) == len(states_of(runner.cache)) > 0
    runner.feed(torch.tensor(tokens(20)))
    before, held = copy_states(runner.cache), stored_bytes(runner.cache)
    places = [tensor.data_ptr() for layer in states_of(runner.cache) for tensor in layer._tensors().values()]
    runner.feed(torch.tensor(tokens(5, 1)))
    again = copy_states(runner.cache)
    assert any(
        not torch.equal(a.tensors[n], b.tensors[n]) for a, b in zip(before, again, strict=True) for n in a.tensors
    )
    go_back_to(runner.cache, before)
    now = copy_states(runner.cache)
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for a, b in zip(before, now, strict=True) for n in a.tensors)
    assert places == [tensor.data_ptr() for layer in states_of(runner.cache) for tensor in layer._tensors().values()]
    assert held >= sum(tensor.nbytes for copied in before for tensor in copied.tensors.values())


def test_a_state_that_saw_too_much_is_seen_by_the_net(model, monkeypatch):
    """The net fails where the rest of this file would be wrong text: when a state is not carried over."""
    monkeypatch.setattr("autotune.engine.cache.state.StateLayer.update_conv_state", lambda layer, new, *_, **__: new)
    with pytest.raises(Unsupported, match=r"through its cache than in one pass|cannot go on from a cache"):
        check_steps(model, "cpu", "device")


@pytest.mark.parametrize(
    "config",
    [
        RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2),
        RecurrentGemmaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            lru_width=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            attention_window_size=16,
        ),
    ],
    ids=["rwkv", "openai-gpt", "recurrent_gemma"],
)
def test_a_model_that_keeps_its_past_elsewhere_is_refused(config):
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    with torch.no_grad():
        spread_out(model)
    with pytest.raises(Unsupported, match=r"takes no cache, and keeps its state in another way|step by step"):
        check_steps(model, "cpu", "device")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("words", [{}, {"draft": "prompt-lookup", "depth": 3}, {"cache": "quantized-8"}], ids=str)
def test_recorded_steps_keep_the_states_that_eager_ones_do(model, words):
    if hasattr(model.config, "num_experts") or model.config.model_type == "nemotron_h":
        pytest.skip("stock's experts wait for the host, which no recording can")
    here = copy.deepcopy(model).to("cuda:0")
    here.fed_singly = model.fed_singly
    said = []
    for launch in ("eager", "graph"):
        configuration = Configuration(weights="fp32", lm_head="fp32", launch=launch, **{"cache": "static"} | words)
        engine = Engine(here, None, GROUP, "cuda:0")
        said += [engine.generate(tokens(40, seed), configuration, NEW).tokens for seed in (0, 1)]
    assert said[:2] == said[2:]


def test_a_runner_that_is_used_again_has_forgotten_its_states(model):
    """Recorded steps keep the memory of their cache from request to request; on a CPU they run as they are."""
    runner = StepRunner(model, ("static", "graph", "sdpa", 256), "cpu", "device")
    said = []
    for seed in (0, 1, 0):
        runner.start((1,))
        runner.prefill(tokens(20, seed), 0)
        said.append(torch.cat([runner.feed(torch.tensor([token])) for token in tokens(3, 2)]))
    assert torch.equal(said[0], said[2])
    assert not torch.allclose(said[0], said[1], atol=1e-2)


def test_what_stays_of_a_verification_goes_in_again_with_the_next_pass(model, monkeypatch):
    """Not in a pass of its own; the states are copied again only after they have moved on."""
    engine = Engine(model, None, GROUP, "cpu")
    words = Configuration(weights="fp32", lm_head="fp32")
    plain, runner = (engine._runner("target", words, 100, (1, 4))[0] for _ in range(2))
    if runner.singly:
        pytest.skip("each token is a pass of its own")
    text = torch.tensor(tokens(30))
    passes, copies = [], []
    forward, copy = runner._forward, runner_module.copy_states
    monkeypatch.setattr(runner, "_forward", lambda fed, keep: passes.append(len(fed)) or forward(fed, keep))
    monkeypatch.setattr(runner_module, "copy_states", lambda *args: copies.append(1) or copy(*args))
    runner.feed(text[:10], keep=1)
    runner.keep()
    runner.feed(torch.cat([text[10:12], text[:2]]))
    runner.rollback(2)
    assert (runner.tokens, passes, len(copies)) == (10, [10, 4], 1)
    runner.keep()
    said = runner.feed(torch.cat([text[12:13], text[:1]]))
    assert said.shape[0] == 2
    runner.rollback(1)
    runner.keep()
    assert len(copies) == 1
    said = runner.feed(text[13:15])
    runner.rollback(0)
    plain.feed(text[:13], keep=1)
    expected = torch.cat([plain.feed(token) for token in text[13:15].split(1)])
    torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert runner.tokens == 15
    assert sum(passes[1:]) == 4 + 4 + 5  # 2 stay of the first, 3 of the second
    for step in range(3):
        runner.keep()
        runner.feed(torch.cat([text[15 + 2 * step : 17 + 2 * step], text[:1]]))
        runner.rollback(1)
        assert len(runner._again) <= 2 + AGAIN
