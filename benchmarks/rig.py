"""Write a target and a draft of real shapes with synthetic weights, in which acceptance is planted.

The memory that a model takes and the time of its decode step depend on its shapes, not on what it has learnt, so
random weights measure both. What random weights cannot give is a draft that agrees with its target: that is planted
here. In the target, the greedy next token is a function of the current token alone, and iterating it walks through the
whole vocabulary in one long cycle; the draft has the same function but for a chosen fraction of the tokens, picked at
random. Along any greedy text the draft's guesses are then accepted at that rate, independently of each other.

How it is planted:

- Token embeddings E are random normal numbers, so any two are nearly orthogonal (cosine about 1/sqrt(hidden size)). A
  residual stream that still points roughly along E[t] says which token t it is, whatever else was added to it.
- Every layer is random. Projections that read the stream keep unit variance; `o_proj` and `down_proj` are scaled by
  1/sqrt(layers), so that all attention and all MLPs together add `PERTURBATION` times the embedding's variance each,
  in a model of any depth. Attention scores have the standard deviation `SHARPNESS`, so that a long context is not
  averaged away and a quantized KV cache shows in the logits.
- An untied head takes E[t] as the row of t's successor: the logits peak there.
- A tied head is E itself, and <E[t], E[u]> is symmetric in t and u, so the step from t to its successor has to be
  taken inside the network. There E[t] = [a(t), a(successor of t)] in two halves, and the last MLP copies the second
  half onto the first: with a random frame U in both `gate_proj` and `up_proj` and U^T in `down_proj` it computes
  U^T f(U x) with f(z) = silu(z) z, which points along x (Stein's lemma) where U has several times more rows than x has
  entries. It is added `COPY_GAIN` times larger than what was there, and the final norm's weight hides the second half.
- Hybrids of Qwen3.5's kind have gated delta nets in three of four layers. What these put out is normalized before it is
  gated, so that `out_proj` is scaled as `down_proj` is; their decays are those that transformers begins with.

Nothing is sparse and every matrix is normally distributed, so quantizers meet the values that they are made for. A
successor's logit leads by 10 (tiny) to 40 (8b) standard deviations of the others, so that they change no greedy choice.

The successor's probability is about `CONFIDENCE` at a text's first token and somewhat more later, as attention averages
its values: perplexity and divergence have something to measure, on text that the model would write. The build adds such
a text. On any other, perplexity is a few times the vocabulary size and even falls where quantization makes the model
less sure of itself. Under sampling, acceptance is lower than planted, because both models spread the rest over all
tokens.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

# Chosen, and tests/benchmarks/test_rig.py checks what they are for: greedy text follows what is planted, in 4 bits too.
PERTURBATION = 0.25  # variance that all attention adds, and all MLPs, where the embedding's is 1
SPREAD = math.sqrt(1 + 2 * PERTURBATION)  # root mean square of the residual stream, where the embedding's is 1
SHARPNESS = 3.0  # standard deviation of attention scores
COPY_GAIN = 8.0  # times the stream that a tied model's last MLP adds to it
CONFIDENCE = 0.6  # probability of the successor at a text's first token


def _normal_mean(function: Callable[[torch.Tensor], torch.Tensor]) -> float:
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2)
    return float((function(z) * density).sum() / density.sum())


# Of a standard normal z: what an ordinary MLP puts out, and what the copy's f(z) = silu(z) z keeps of z and adds to it.
SILU_POWER = _normal_mean(lambda z: (z * z.sigmoid()) ** 2)
COPY_KEEPS = _normal_mean(lambda z: z**3 * z.sigmoid())
COPY_POWER = _normal_mean(lambda z: (z * z * z.sigmoid()) ** 2)
GATE_POWER = _normal_mean(lambda z: z.sigmoid() ** 2)  # what a gate leaves of an attention's output

SHARD_BYTES = 4_000_000_000  # of one file at most: chosen, since host memory holds one at a time
MAX_POSITIONS = 131_072  # tokens, of Llama 3.1 and 3.2
Shape = dict[str, Any]
Draw = Callable[..., torch.Tensor]  # (key, *shape) -> standard normal numbers, always the same for a key


def _shape(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, head: int, *, tied: bool) -> Shape:
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head}
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return sizes | attention | {"tie_word_embeddings": tied}


def _hybrid(shape: Shape, key_heads: int, value_heads: int, dim: int) -> Shape:
    """Three gated delta nets before each attention, as Qwen3.5 has them."""
    nets = {"linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads}
    nets |= {"linear_key_head_dim": dim, "linear_value_head_dim": dim}
    return shape | nets | {"model_type": "qwen3_5_text"}


TARGETS = {
    "8b": _shape(128_256, 4096, 14336, 32, 32, 8, 128, tied=False),  # Llama-3-8B
    "3b": _shape(128_256, 3072, 8192, 28, 24, 8, 128, tied=True),  # Llama-3.2-3B
    "1b": _shape(128_256, 2048, 8192, 16, 32, 8, 64, tied=True),  # Llama-3.2-1B
    "tiny": _shape(4096, 256, 2048, 4, 4, 2, 64, tied=False),
    "9b-hybrid": _hybrid(_shape(248_320, 4096, 12288, 32, 16, 4, 256, tied=False), 16, 32, 128),  # Qwen3.5-9B
    "tiny-hybrid": _hybrid(_shape(4096, 256, 2048, 4, 4, 2, 64, tied=False), 2, 4, 64),
}
DRAFTS = {
    "1b": TARGETS["1b"],
    "tiny": _shape(4096, 256, 2048, 2, 4, 2, 64, tied=True),
    "0.8b-hybrid": _hybrid(_shape(248_320, 1024, 3584, 24, 8, 2, 256, tied=True), 16, 16, 128),  # Qwen3.5-0.8B
    "tiny-hybrid": _hybrid(_shape(4096, 256, 2048, 4, 4, 2, 64, tied=True), 2, 4, 64),
}


def config(shape: Shape, max_positions: int = MAX_POSITIONS) -> PretrainedConfig:
    bos, eos = _special_ids(shape["vocab_size"])
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    if "model_type" in shape:
        rope["partial_rotary_factor"] = 0.25
    return AutoConfig.for_model(
        **{"model_type": "llama", **shape},
        max_position_embeddings=max_positions,
        rope_parameters=rope,
        rms_norm_eps=1e-5,
        bos_token_id=bos,
        eos_token_id=eos,
        dtype="bfloat16",
        architectures=["Qwen3_5ForCausalLM" if "model_type" in shape else "LlamaForCausalLM"],
    )


def successors(vocab_size: int, acceptance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy next token of every token, for the target and for the draft (int64, one entry per token).

    The target's is one cycle through all tokens but the two special ones, which are never predicted: no generation
    ends early. The draft's differs on exactly the fraction 1 - acceptance of the cycle.
    """
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(_special_ids(vocab_size))
    tokens = torch.arange(vocab_size)
    tokens = tokens[~torch.isin(tokens, special)]
    cycle = tokens[torch.randperm(len(tokens), generator=generator)]
    target = torch.empty(vocab_size, dtype=torch.long)
    target[cycle] = cycle.roll(-1)
    differing = tokens[torch.randperm(len(tokens), generator=generator)[: round((1 - acceptance) * len(tokens))]]
    draft = target.clone()
    draft[differing] = target[differing.roll(-1)]
    for table in (target, draft):
        table[special] = table[0].clone()
    return target, draft


def build(
    out: Path,
    size: str,
    draft: str | None,
    acceptance: float,
    device: str = "cuda",
    seed: int = 0,
    max_positions: int = MAX_POSITIONS,
) -> dict[str, Any]:
    """Write out/target and, with a draft, out/draft as Hugging Face folders; neither may exist yet.

    Beside them, out/text.txt is the target's greedy walk through its vocabulary, as text. Returns what was asked for,
    the text's path, the seconds taken and, for target and draft (None without one), path, parameters and bytes.
    """
    start = time.perf_counter()
    shapes = {"target": TARGETS[size]} | ({"draft": DRAFTS[draft]} if draft else {})
    vocab_size = TARGETS[size]["vocab_size"]
    if any(shape["vocab_size"] != vocab_size for shape in shapes.values()):
        raise ValueError(f"a {draft} draft has another vocabulary than a {size} target")
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is a fraction between 0 and 1, not {acceptance}")
    tables = dict(zip(("target", "draft"), successors(vocab_size, acceptance, seed), strict=True))
    tokenizer = _tokenizer(vocab_size, max_positions)
    result: dict[str, Any] = {"size": size, "acceptance": acceptance, "seed": seed, "draft": None}
    for role, shape in shapes.items():
        folder = out / role
        folder.mkdir(parents=True)
        result[role] = _write(folder, config(shape, max_positions), tables[role], device, seed, role)
        tokenizer.save_pretrained(folder)
    text = out / "text.txt"
    text.write_text(str(tokenizer.decode(_readable_walk(tables["target"]))), encoding="utf-8")
    return result | {"text": str(text), "seconds": round(time.perf_counter() - start, 2)}


def _write(
    folder: Path, config: PretrainedConfig, table: torch.Tensor, device: str, seed: int, role: str
) -> dict[str, Any]:
    """Shard by shard: no more than one shard is held in memory, and on the device no more than two embeddings."""

    def draw(key: str, *shape: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {role} {key}".encode()))
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    shapes, table = parameter_shapes(config), table.to(device)
    shards = list(_shards(shapes))
    weight_map: dict[str, str] = {}
    parameters = 0
    for index, names in enumerate(shards, 1):
        tensors = {name: _weight(name, shapes[name], config, table, draw).cpu() for name in names}
        filename = f"model-{index:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, filename)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        del tensors  # before the next shard is made
    total = {"total_parameters": parameters, "total_size": 2 * parameters}
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": total, "weight_map": weight_map}, indent=1))
    config.save_pretrained(folder)
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**special, pad_token_id=config.eos_token_id, do_sample=False).save_pretrained(folder)
    return {"path": str(folder), "parameters": parameters, "bytes": 2 * parameters}


def parameter_shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor that a checkpoint of this model stores."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        if names and held + 2 * shape.numel() > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += 2 * shape.numel()
    yield names


def _weight(name: str, shape: torch.Size, config: PretrainedConfig, table: torch.Tensor, draw: Draw) -> torch.Tensor:
    kind, last = name.split(".")[-2:]
    hybrid = config.model_type != "llama"
    one = int(hybrid and ".linear_attn." not in name)  # a hybrid's norms add it to their weight
    tied, layers, half = config.tie_word_embeddings, config.num_hidden_layers, config.hidden_size // 2
    if kind == "embed_tokens":
        return _embeddings(config, table, draw)
    if kind == "lm_head":
        head = draw(name, *shape)
        head[table] = _embeddings(config, table, draw)
        return head.mul_(_peak(config) * SPREAD / config.hidden_size)
    if kind == "norm" and tied:
        weight = torch.zeros(shape, dtype=torch.bfloat16, device=table.device)
        weight[:half] = _peak(config) * SPREAD * _copied_rms(config) / (COPY_GAIN * half)
        return weight - one
    if last == "A_log":
        return torch.linspace(0.01, 16, shape[0]).log().bfloat16()
    if kind in ("q_norm", "k_norm"):
        return torch.full(shape, math.sqrt(SHARPNESS) - one, dtype=torch.bfloat16)
    if kind.endswith("norm") or last == "dt_bias":
        return torch.full(shape, 1.0 - one, dtype=torch.bfloat16)
    if tied and name.startswith(f"model.layers.{layers - 1}.mlp."):
        frame = draw("frame", config.intermediate_size, config.hidden_size)
        frame[:, :half] *= 0.1  # not read, but not zero either: a quantizer would divide by it
        if kind != "down_proj":
            return frame.mul_(half**-0.5)
        return frame.roll(half, 1).T.contiguous().mul_(COPY_GAIN * half**0.5 / (shape[1] * COPY_KEEPS))
    gain = {
        "q_proj": 1.0 if hybrid else SHARPNESS,  # whose norms do it instead
        "k_proj": 1.0 if hybrid else SHARPNESS,
        "o_proj": PERTURBATION / layers / (GATE_POWER if hybrid else 1.0),
        "down_proj": PERTURBATION / layers / SILU_POWER,
        "out_proj": PERTURBATION / layers / SILU_POWER,
    }.get(kind, 1.0)
    return draw(name, *shape).mul_(math.sqrt(gain / shape[-1]))


def _embeddings(config: PretrainedConfig, table: torch.Tensor, draw: Draw) -> torch.Tensor:
    embeddings = draw("embeddings", config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        half = config.hidden_size // 2
        embeddings[:, half:] = embeddings[table, :half]
    else:  # the special tokens have token 0's successor
        embeddings[list(_special_ids(config.vocab_size))] = embeddings[0].clone()
    return embeddings


def _copied_rms(config: PretrainedConfig) -> float:
    """Root mean square of the residual stream behind the planted MLP, where the embedding's is 1."""
    half = config.hidden_size / 2
    copied = COPY_GAIN**2 * (1 + half / config.intermediate_size * COPY_POWER / COPY_KEEPS**2)
    return math.sqrt(SPREAD**2 + copied / 2)


def _peak(config: PretrainedConfig) -> float:
    """The logit at which the successor has the probability CONFIDENCE among logits around 0."""
    return math.log(config.vocab_size * CONFIDENCE / (1 - CONFIDENCE))


def _special_ids(vocab_size: int) -> tuple[int, int]:
    """Beginning and end of text, where Llama 3 has them: the first two of the last 256."""
    return vocab_size - 256, vocab_size - 255


def _readable_walk(table: torch.Tensor) -> list[int]:
    """The cycle without the single bytes, most of which are no text by themselves."""
    successor = table.tolist()
    walk = [256]
    while (token := successor[walk[-1]]) != walk[0]:
        walk.append(token)
    return [token for token in walk if token >= 256]


def _tokenizer(vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """A number after a space is the token with that id, all other text is its UTF-8 bytes, one token each."""
    special = dict(zip(_special_ids(vocab_size), ("<|begin_of_text|>", "<|end_of_text|>"), strict=True))
    texts = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"Ġ{token}" for token in range(256, vocab_size)]
    vocabulary = {special.get(token, text): token for token, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = special.values()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, model_max_length=max_positions
    )


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice(list(TARGETS)), default="8b", show_default=True)
@click.option("--draft", type=click.Choice([*DRAFTS, "none"]), default="1b", show_default=True)
@click.option("--acceptance", type=click.FloatRange(0, 1), default=0.8, show_default=True)
@click.option("--device", default=lambda: "cuda" if torch.cuda.is_available() else "cpu", show_default="cuda, else cpu")
@click.option("--seed", default=0, show_default=True)
@click.option("--max-positions", type=click.IntRange(1), default=MAX_POSITIONS, show_default=True)
def main(out: Path, size: str, draft: str, acceptance: float, device: str, seed: int, max_positions: int) -> None:
    """Write OUT/target and OUT/draft: real shapes, synthetic weights, planted acceptance.

    Example: python -m benchmarks.rig /tmp/pair --size 8b --draft 1b --acceptance 0.8
    """
    try:
        result = build(out, size, None if draft == "none" else draft, acceptance, device, seed, max_positions)
    except (FileExistsError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    for role in ("target", "draft"):
        if written := result[role]:
            click.echo("{path}: {parameters:,} parameters, {bytes:,} bytes".format(**written))
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
