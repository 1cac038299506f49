"""Make the bundled pair again: `collect` the text, `train` both models on a GPU, `evaluate` them anywhere.

    python -m autotune.demo.train collect --site-packages DIR --out data
    python -m autotune.demo.train train --data data --out models
    python -m autotune.demo.train evaluate --models models

Both models are small, so what limits them is how much text they see in the time given: the learning rate falls to zero
by the wall clock, not by steps. Sequences have the model's full length, so that long contexts are inside what was
trained. The draft learns from the target's probabilities as well as from the text (Hinton et al. 2015), since what
counts for a draft is to agree with its target.
"""

import copy
import json
import lzma
import math
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib.metadata import Distribution, distributions
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from autotune.demo import document, held_out_text, is_held_out, module_name, standard_library

VOCABULARY = 4096
LENGTH = 4608  # a context of 4096 tokens and 512 to come
END = "<|endoftext|>"
HEAD_DIM = 64

_PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation)\b", re.IGNORECASE)
_RECIPROCAL = re.compile(r"GPL|MPL|EPL|CDDL|EUPL|CC-BY|General Public|Mozilla|Proprietary", re.IGNORECASE)
# Bundled copies come under other licences; tests and generated tables teach little.
_SKIPPED = re.compile(
    r"(^|\.)(_?vendor(ed)?|_?extern(al|als)?|third_party|_?tests?|testing|locale|validators|graph_objs)(\.|$)"
)


class Document(NamedTuple):
    """One module or topic, and the package that it comes from."""

    package: str
    name: str
    text: str


@click.group(help=__doc__)
def main() -> None:
    pass


# --- collect -------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--site-packages", type=click.Path(exists=True, path_type=Path), multiple=True, help="Where to look.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the tokens and the tokenizer.")
@click.option("--package-bytes", default=8_000_000, show_default=True, help="Take at most this much of one package.")
def collect(site_packages: tuple[Path, ...], out: Path, package_bytes: int) -> None:
    """Gather permissively licensed source, drop copies, train the tokenizer and write the tokens."""
    out.mkdir(parents=True, exist_ok=True)
    licences = {"python": (platform.python_version(), "PSF-2.0")}
    sources = [[Document("python", name, text) for name, text in standard_library() if not is_held_out(name)]]
    for name, (package, licence) in dict(_permissive(site_packages)).items():
        licences[name] = (package.version, licence)
        sources.append(_capped(_modules(package), package_bytes))
    documents, dropped = _without_copies(member for source in sources for member in source)
    tokenizer = _train_tokenizer(documents)
    tokenizer.save(str(out / "tokenizer.json"))
    tokens = _encode(tokenizer, documents)
    _write_tokens(tokens, out)
    (out / "held_out.txt").write_text(held_out_text())
    summary = {"tokens": len(tokens), **_size(documents), "dropped": dropped}
    packages = [
        {"name": name, "version": licences[name][0], "licence": licences[name][1], **_size(list(members))}
        for name, members in groupby(documents, lambda member: member.package)
    ]
    (out / "corpus.json").write_text(json.dumps({**summary, "packages": packages}, indent=1))
    click.echo(json.dumps(summary))


def _size(documents: list[Document]) -> dict[str, int]:
    return {"documents": len(documents), "bytes": sum(len(member.text.encode()) for member in documents)}


def _permissive(folders: Iterable[Path]) -> Iterator[tuple[str, tuple[Distribution, str]]]:
    """Installed packages whose metadata names a permissive licence and no reciprocal one, by name."""
    for package in sorted(
        distributions(path=[str(folder) for folder in folders]), key=lambda package: package.name.lower()
    ):
        licence = _licence(package)
        if _PERMISSIVE.search(licence) and not _RECIPROCAL.search(licence):
            yield package.name.lower(), (package, licence)


def _licence(package: Distribution) -> str:
    metadata = package.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [c.split("::")[-1].strip() for c in metadata.get_all("Classifier") or [] if "License ::" in c]
    if classifiers or "License" not in metadata:
        return ", ".join(classifiers)
    return metadata["License"].split("\n")[0][:60]


def _modules(package: Distribution) -> Iterator[Document]:
    for path in package.files or []:
        if path.suffix != ".py" or ".." in path.parts:
            continue
        name = module_name(Path(*path.parts))
        file = Path(str(path.locate()))
        if _SKIPPED.search(name) or not file.is_file() or not 200 < file.stat().st_size < 300_000:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if _is_prose_or_code(text):
            yield Document(package.name.lower(), name, text)


def _is_prose_or_code(text: str) -> bool:
    """Lines that a person could have written: not data, not minified, mostly ASCII."""
    lines = text.splitlines()
    return max(map(len, lines)) < 1000 and len(text) / len(lines) < 80 and len(text.encode()) < 1.05 * len(text)


def _capped(documents: Iterable[Document], limit_bytes: int) -> list[Document]:
    """A stable random choice of about `limit_bytes`, in order of the names, so that neighbours stay together."""
    kept, total = [], 0
    for member in sorted(documents, key=lambda member: sha256(member.name.encode()).digest()):
        total += len(member.text)
        if total > limit_bytes:
            break
        kept.append(member)
    return sorted(kept, key=lambda member: member.name)


def _without_copies(documents: Iterable[Document]) -> tuple[list[Document], dict[str, list[str]]]:
    """Drop what resembles held-out text, then what mostly repeats earlier documents; also return the dropped names.

    Text is compared by shingles of four lines. A licence header or an idiom is shared honestly; hence the thresholds.
    """
    held_out, seen = _shingles(held_out_text()), set[int]()
    kept: list[Document] = []
    dropped: dict[str, list[str]] = {"near_held_out": [], "repeated": []}
    for member in documents:
        shingles = _shingles(member.text)
        shared = len(shingles & held_out)
        if shared > 10 or shared > 0.02 * len(shingles):
            dropped["near_held_out"].append(member.name)
        elif len(shingles & seen) > 0.5 * len(shingles):
            dropped["repeated"].append(member.name)
        else:
            kept.append(member)
            seen |= shingles
    return kept, dropped


def _shingles(text: str) -> set[int]:
    lines = [stripped for line in text.splitlines() if len(stripped := line.strip()) > 3]
    return {hash(tuple(lines[i : i + 4])) for i in range(len(lines) - 3)}


def _train_tokenizer(documents: list[Document]) -> Any:
    """Byte-level BPE, trained on every tenth document and all of the standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = (member.text for i, member in enumerate(documents) if member.package == "python" or i % 10 == 0)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def _encode(tokenizer: Any, documents: list[Document]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """All documents in a row, packages separated by the end token."""
    end = tokenizer.token_to_id(END)
    parts = []
    for _, members in groupby(documents, lambda member: member.package):
        texts = [document(member.name, member.text) for member in members]
        parts += [np.array(encoding.ids, np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]
        parts.append(np.array([end], np.uint16))
    return np.concatenate(parts)


_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 4, "lc": 0, "lp": 1, "pb": 1}]  # tuned to numbers of two bytes


def _write_tokens(tokens: np.ndarray[Any, np.dtype[np.uint16]], out: Path) -> None:
    def write(item: tuple[int, Any]) -> None:
        compressed = lzma.compress(item[1].astype("<u2").tobytes(), filters=_FILTERS)
        (out / f"tokens-{item[0]:02}.xz").write_bytes(compressed)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, enumerate(np.array_split(tokens, 16))))


def _read_tokens(data: Path) -> np.ndarray[Any, np.dtype[np.uint16]]:
    with ThreadPoolExecutor() as pool:
        shards = pool.map(lambda path: lzma.decompress(path.read_bytes()), sorted(data.glob("tokens-*.xz")))
        return np.frombuffer(b"".join(shards), "<u2")


# --- train ---------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="What collect wrote.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for target/ and draft/.")
@click.option("--target-seconds", default=250.0, show_default=True)
@click.option("--draft-seconds", default=140.0, show_default=True)
@click.option("--batch", default=12, show_default=True, help="Sequences a step.")
@click.option("--length", default=LENGTH, show_default=True, help="Tokens a sequence.")
@click.option("--compile/--no-compile", "compiled", default=True)
@click.option("--seed", default=0, show_default=True)
def train(
    data: Path,
    out: Path,
    target_seconds: float,
    draft_seconds: float,
    batch: int,
    length: int,
    compiled: bool,
    seed: int,
) -> None:
    """Train the target, then the draft, each for its time; a target that is already in the folder is kept."""
    import torch
    from transformers import AttentionInterface

    AttentionInterface.register("packed_causal", _causal_attention)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    tokens = torch.from_numpy(_read_tokens(data).astype(np.int16)).to(device)
    click.echo(f"{len(tokens)} tokens read in {time.monotonic() - started:.1f} s; {device}", err=True)

    def windows() -> Any:
        starts = torch.randint(len(tokens) - length - 1, (batch, 1), device=device)
        return tokens[starts + torch.arange(length + 1, device=device)].long()

    log = {}
    if (out / "target").exists():
        target = _load(out / "target").to(device)
        target.set_attn_implementation("packed_causal")
    else:
        target = _new_model(width=256, inner=768, layers=8, heads=4, kv_heads=2).to(device)
        log["target"] = _fit(target, windows, target_seconds, 1.5e-3, compiled)
        _save(target, data / "tokenizer.json", out / "target")
    draft = _new_model(width=128, inner=384, layers=2, heads=2, kv_heads=1).to(device)
    teacher = target.requires_grad_(False).to(torch.bfloat16)
    log["draft"] = _fit(draft, windows, draft_seconds, 3e-3, compiled, teacher)
    _save(draft, data / "tokenizer.json", out / "draft")
    log["settings"] = {"batch": batch, "length": length, "seed": seed, "corpus_tokens": len(tokens), "device": device}
    (out / "training.json").write_text(json.dumps(log, indent=1))
    click.echo(json.dumps({name: {k: v for k, v in entry.items() if k != "curve"} for name, entry in log.items()}))


def _new_model(*, width: int, inner: int, layers: int, heads: int, kv_heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    config._attn_implementation = "packed_causal"
    return LlamaForCausalLM(config)


def _causal_attention(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, None]:
    """Attention without a mask tensor: always causal, so that the compiled step uses the flash kernel."""
    from torch.nn.functional import scaled_dot_product_attention

    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).contiguous(), None


def _fit(
    model: Any, windows: Callable[[], Any], seconds: float, peak_rate: float, compiled: bool, teacher: Any = None
) -> dict[str, Any]:
    """Train for `seconds`, compilation included; the learning rate falls linearly to zero at the end of them."""
    import torch

    started = time.monotonic()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    loss_of = torch.compile(_loss, dynamic=False) if compiled else _loss
    first_step_s, steps, curve = 0.0, 0, []
    while (elapsed := time.monotonic() - started) < seconds:
        rate = peak_rate * min(1.0, (steps + 1) / 100) * (1 - (elapsed - first_step_s) / (seconds - first_step_s))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, 0.0)
        batch = windows()
        loss = loss_of(model, batch, teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps == 1 or steps % 100 == 0:
            curve.append((round(elapsed, 1), steps, round(loss.item(), 4)))
            click.echo(f"{curve[-1]}", err=True)
        elif steps % 10 == 0 and batch.is_cuda:
            torch.cuda.synchronize()  # or the queue would run ahead of the clock
        if steps == 1:
            first_step_s = time.monotonic() - started
    if not math.isfinite(loss.item()):
        raise click.ClickException(f"the loss became {loss.item()} within {steps} steps")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "first_step_s": round(first_step_s, 1),
        "steps": steps,
        "tokens_seen": steps * (batch.numel() - len(batch)),
        "final_loss": round(loss.item(), 4),
        "curve": curve,
    }


def _loss(model: Any, batch: Any, teacher: Any) -> Any:
    """Cross-entropy in nats per token; with a teacher, three parts in four against the teacher's probabilities."""
    import torch
    from torch.nn.functional import cross_entropy

    inputs, labels = batch[:, :-1], batch[:, 1:].reshape(-1)
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        if teacher is None:
            return cross_entropy(logits, labels)
        with torch.no_grad():
            wanted = teacher(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float().softmax(-1)
    log_probabilities = logits.log_softmax(-1)
    soft = -(wanted * log_probabilities).sum(-1).mean()
    return 0.25 * torch.nn.functional.nll_loss(log_probabilities, labels) + 0.75 * soft


def _save(model: Any, tokenizer: Path, out: Path) -> None:
    """A complete model folder, weights in bf16."""
    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    shutil.copyfile(tokenizer, out / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# --- evaluate ------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--models", type=click.Path(exists=True, path_type=Path), default=Path(__file__).parent, help="The pair.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Evaluate on this file, not on the library.")
@click.option("--max-windows", default=1000, help="Score at most this many windows of 4608 tokens.")
@click.option("--prompts", default=8, show_default=True, help="Prompts for each context, for the acceptance.")
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--depth", default=4, show_default=True)
def evaluate(models: Path, text: Path | None, max_windows: int, prompts: int, new_tokens: int, depth: int) -> None:
    """Print bits per byte, also by position and by context, and the acceptance, as JSON."""
    import torch
    from transformers import AutoTokenizer

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    target = _load(models / "target").to(device, dtype)
    draft = _load(models / "draft").to(device, dtype)
    tokens = torch.tensor(tokenizer(text.read_text() if text else held_out_text())["input_ids"], device=device)
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:max_windows]
    sizes = torch.tensor(
        [len(token) for token in tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))], device=device
    )
    with torch.inference_mode():
        result = {
            "tokens": windows.numel(),
            "bytes_per_token": round(sizes[windows].float().mean().item(), 3),
            "target": bits_per_byte(target, windows, sizes),
            "draft": bits_per_byte(draft, windows, sizes),
            "acceptance": {
                context: acceptance(target, draft, windows[:prompts, :context], new_tokens, depth)
                for context in (512, 2048, 4096)
            },
        }
    click.echo(json.dumps(result))


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def bits_per_byte(model: Any, windows: Any, sizes: Any) -> dict[str, Any]:
    """Bits per byte of windows (n, length): overall, by position, and of the last 512 tokens by their context.

    `sizes` has the bytes of every token in the vocabulary. The first token of a window is not scored.
    """
    import torch

    bits = torch.stack([token_bits(model, window) for window in windows])
    scored = sizes[windows[:, 1:]]
    edges = [0, 128, 512, 1024, 2048, 3072, 4096, 4608]
    positions = pairwise(edges)
    last, last_bytes = 512, scored[:, -512:].sum()
    contexts = {
        context: torch.stack([token_bits(model, window[-context - last :])[-last:] for window in windows]).sum()
        / last_bytes
        for context in (128, 512, 1024, 2048)
    }
    contexts[LENGTH - last] = bits[:, -last:].sum() / last_bytes
    return {
        "bits_per_byte": round((bits.sum() / scored.sum()).item(), 4),
        "perplexity": round(2 ** bits.mean().item(), 3),
        "by_position": {
            f"{low}-{high}": round((bits[:, low:high].sum() / scored[:, low:high].sum()).item(), 4)
            for low, high in positions
        },
        "last_512_by_context": {context: round(value.item(), 4) for context, value in contexts.items()},
    }


def token_bits(model: Any, window: Any) -> Any:
    """Bits of each token of one window but the first."""
    logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
    return -logits.log_softmax(-1).gather(1, window[1:, None])[:, 0] / math.log(2)


def acceptance(target: Any, draft: Any, prompts: Any, new_tokens: int, depth: int) -> float:
    """The fraction of `depth` greedily drafted tokens that greedy verification accepts, for prompts (n, context).

    A draft token is only ever accepted after target tokens, so one pass of the draft over the target's own text tells
    every round's outcome.
    """
    texts = _greedy(target, prompts, new_tokens)
    guesses = draft(input_ids=texts[:, :-1], use_cache=False, logits_to_keep=new_tokens).logits.argmax(-1)
    rows = (guesses == texts[:, -new_tokens:]).tolist()
    counts = [accepted_and_drafted(row, depth) for row in rows]
    return round(sum(accepted for accepted, _ in counts) / sum(drafted for _, drafted in counts), 4)


def accepted_and_drafted(agrees: list[bool], depth: int) -> tuple[int, int]:
    """Draft tokens accepted and proposed in full rounds, from whether the draft agrees with each target token."""
    accepted = drafted = position = 0
    while position + depth <= len(agrees):
        run = agrees[position : position + depth]
        hits = depth if all(run) else run.index(False)
        accepted, drafted, position = accepted + hits, drafted + depth, position + hits + 1
    return accepted, drafted


def _greedy(model: Any, prompts: Any, new_tokens: int) -> Any:
    """The prompts followed by `new_tokens` greedy tokens; no end token stops them."""
    import torch

    texts, step, past = prompts, prompts, None
    for _ in range(new_tokens):
        output = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, step = output.past_key_values, output.logits.argmax(-1)
        texts = torch.cat([texts, step], dim=1)
    return texts


if __name__ == "__main__":
    main()
