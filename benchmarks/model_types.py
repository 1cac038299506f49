"""Which model types run: autotune's own code on a tiny random checkpoint of each decoder-only type of transformers.

Each type's checkpoint has a few layers, of every kind that the type has, and runs in float32 on a CPU. A cache, a
chunk or a draft must not change greedy text, so each text is judged by that of stock `generate`: they are equal, or
part where the two largest of stock's logits are closer than TIE of the logits' standard deviation, which is what
float32 leaves open. A quantized cache changes the text; there prompt lookup is judged by the same cache without it.
Bytes are compared with those of what the engine loaded and of what its cache held.

Tiny models cannot tell how well a type runs at 4 bits, how fast, or on a GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from autotune.config import Configuration, LoadGroup
from autotune.engine.decode import Engine
from autotune.engine.load.attentions import usual_attention
from autotune.engine.support import Unsupported
from autotune.model.calibration import DEFAULT, predict
from autotune.model.folder import PlanError, check_folder
from autotune.model.refused import check_type, word_refusals
from autotune.model.shape import ModelShape, read_shape
from benchmarks.tiny_types import SPECIAL, VOCABULARY, factory, tiny_config, tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
NEW_TOKENS = 24
SHORT, LONG = 40, 160  # tokens of a prompt: more than a sliding window; enough for groups of 64 behind the newest 96
TIE = 1e-4  # of the logits' deviation; float32 leaves about 1e-5 open
CLOSE = 0.05  # share by which predicted bytes may be off: set by us
WEIGHTS = ("quanto-int4", "bnb-nf4")
# The deviations of a tiny model's tables and the gains of its layers, tried until its text has VARIETY words.
DRAWS, VARIETY = ((0.02, 2.0), (0.5, 1.0), (0.1, 1.5), (0.5, 4.0), (0.0002, 4.0)), 6

KNOBS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache": "static"},
    "prompt-lookup": {"draft": "prompt-lookup", "depth": 3},
    "chunks": {"prefill_chunk": 16},
}
COLUMNS = ("plan", *KNOBS, "quantized-4", "own draft", *WEIGHTS)

_ENCODERS = """bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text
electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert
roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod"""
_AUDIO = "moshi moss_transcribe_diarize musicgen musicgen_melody whisper"
_CAPTIONS = "git got_ocr2 trocr"
_NOT_ALONE = "gemma4_assistant gemma4_unified_assistant gpt-sw3"  # read their target's states; another name of gpt2
LEFT_OUT = set(" ".join((_ENCODERS, _AUDIO, _CAPTIONS, _NOT_ALONE)).split())
_COMMON = """qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text gemma3_text gemma3 gemma3n
gemma3n_text gemma4 gemma4_text gpt_oss llama llama4_text mistral ministral ministral3 mixtral phi3 phi4_multimodal glm4
glm4_moe glm4_moe_lite lfm2 lfm2_moe granite granitemoehybrid olmo2 olmo3 olmoe smollm3 falcon_h1 nemotron_h exaone4
seed_oss hunyuan_v1_dense deepseek_v3 bamba mamba2 cohere2 starcoder2"""  # on cards of 8 to 24 GB
FIRST = _COMMON.split()
TYPES = [*FIRST, *sorted(set(CAUSAL) - LEFT_OUT - set(FIRST))]


INTRO = """# Model types

Which types of transformers' causal language models run, by the `model_type` of `config.json`: {runs} of {types}. This
page is written by `python -m benchmarks.model_types --write`, here with transformers {transformers} and torch {torch}.
For each type it makes a tiny random checkpoint with every kind of layer of the type, and runs autotune's own code on it
in float32 on a CPU. That says that a type is understood; it does not say how fast it is, how good at 4 bits, or what a
GPU makes of it.

- **plan**: `autotune plan` takes the model, and the bytes that it predicts for weights and cache are within 5 % of what
  is held.
- **dynamic**, **static**, **prompt-lookup**, **chunks** of the prompt, **own draft** (the model drafts for itself):
  greedy text is that of stock `generate`.
- **quantized-4**: greedy text through the 4-bit cache is the same with prompt lookup as without.
- **quanto-int4**, **bnb-nf4**: the 4-bit weights load and give finite logits. Types that may have experts have them
  here, as most of their weights; models of such a type without experts take 4 bits.

`Y`: it holds. `refused`: `autotune plan` says so before a weight is read. `WRONG` and `crash` are faults of autotune;
`unknown`: stock transformers gives no answer to compare with. What then was not tried has a dash. The numbers are those
of the reasons below the tables. Of a multimodal type the text runs; gemma3n's is `gemma3n_text`. Types with an encoder,
for audio or for captions of pictures are left out, and so are drafts that read their target's states.

## Common on cards of 8 to 24 GB

{common}

## All others

{others}

## Reasons

{reasons}
"""


class Cell(NamedTuple):
    """What a check gave: Y, refused, WRONG or crash; or unknown, where stock has no answer."""

    status: str
    reason: str = ""


Row = dict[str, Cell]  # by column; a type that is refused, or unknown, has but the first


def check(kind: str, folder: Path) -> Row:
    """The row of a type, whose tiny checkpoint is written to the folder."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tiny_config(kind).save_pretrained(folder)
        try:
            check_type(folder)
            stock = _Stock(kind, folder)
            check_folder(folder)
            return _Checks(folder, stock, read_shape(folder)).row()
        except PlanError as error:
            said = str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "").replace(str(folder), "the folder")
            return {"plan": Cell("refused", said)}
        except _NoAnswer as error:
            return {"plan": Cell("unknown", f"stock transformers fails on it here: {error}")}


class _NoAnswer(Exception):
    """Stock transformers cannot make, load or run the tiny model."""


def _words(error: Exception) -> str:
    """An error's first sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]}"


def _prompt(count: int) -> list[int]:
    """Random tokens, whose first half comes again, for a lookup to find."""
    tokens = torch.randint(SPECIAL, VOCABULARY, (count - count // 2,), generator=torch.Generator().manual_seed(count))
    return (tokens.tolist() * 2)[:count]


class _Stock:
    """What stock transformers says: the greedy text, and the logits [NEW_TOKENS, vocabulary] that it was chosen by."""

    def __init__(self, kind: str, folder: Path) -> None:
        try:
            self._generate(kind, folder)
        except Exception as error:  # whatever it is, the type has a row
            raise _NoAnswer(_words(error)) from error

    def _generate(self, kind: str, folder: Path) -> None:
        self.tokens: list[int] = []
        for draw in DRAWS:
            tiny_model(kind, *draw).save_pretrained(folder)
            self.attention = usual_attention(folder)
            model = (
                factory(kind)
                .from_pretrained(folder, dtype=torch.float32, attn_implementation=self.attention, local_files_only=True)
                .eval()
            )
            model.generation_config.eos_token_id = None
            ids = torch.tensor([_prompt(SHORT)])
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            self.tokens = made.sequences[0, SHORT:].tolist()
            self.logits = torch.cat(made.logits)
            if len(set(self.tokens)) >= VARIETY:
                break


def _judged(said: list[int], wanted: list[int], logits: torch.Tensor) -> Cell:
    """Whether a text is the wanted one, or leaves it at a tie of the logits [tokens, vocabulary]."""
    if said == wanted:
        return Cell("Y")
    at = next((i for i, pair in enumerate(zip(said, wanted, strict=False)) if pair[0] != pair[1]), len(said))
    first, second = logits[at].topk(2).values
    gap = float((first - second) / logits[at].std())
    if gap < TIE:
        return Cell("Y")
    return Cell("WRONG", f"the text is another from token {at} on, where the first two logits are {gap:.1g} apart")


class _Checks:
    def __init__(self, folder: Path, stock: _Stock, shape: ModelShape) -> None:
        self.folder, self.stock, self.shape = folder, stock, shape
        self.base = {"weights": "fp32", "lm_head": "fp32", "attention": stock.attention}
        self.engine: Engine | None = None
        refused = word_refusals(shape)
        self.planned = refused["cache"] | refused.get("weights", {})  # the reason, by the word and so by the column

    def row(self) -> Row:
        calls: dict[str, Callable[[], Cell]] = {"plan": self._plan}
        calls |= {name: lambda knobs=knobs: self._text(self._loaded(), **knobs) for name, knobs in KNOBS.items()}
        calls |= {"quantized-4": self._quantized, "own draft": self._own_draft}
        calls |= {word: lambda word=word: self._four_bits(word) for word in WEIGHTS}
        return {name: self._cell(self.planned.get(name, ""), calls[name]) for name in COLUMNS}

    def _cell(self, planned: str, call: Callable[[], Cell]) -> Cell:
        try:
            cell = call()
        except Unsupported as error:
            if planned:
                return Cell("refused", re.sub(r"\d+%", "most", planned))  # a share of the tiny model
            return Cell("WRONG", f"the plan allows what the engine refuses: {_words(error)}")
        except Exception as error:  # noqa: BLE001 - a fault is a cell
            return Cell("crash", _words(error))
        return Cell("WRONG", f"the plan refuses what the engine runs: {planned}") if planned else cell

    def _loaded(self) -> Engine:
        if self.engine is None:
            self.engine = Engine.load(str(self.folder), LoadGroup(**self.base), "cpu")
        return self.engine

    def _plan(self) -> Cell:
        c = Configuration(**self.base)
        owners = predict(self.shape, None, c, SHORT, NEW_TOKENS - 1, "cpu", DEFAULT["cpu"]).owners  # one is not fed
        engine = self._loaded()
        tensors = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in engine.target.parameters()}
        weights = owners["weights"] + owners["lm_head"] + owners["embeddings"]
        pairs = {"weights": (weights, sum(tensors.values()))}
        pairs["cache"] = (owners["kv_cache"], engine.generate(_prompt(SHORT), c, NEW_TOKENS).cache_bytes)
        for name, (said, held) in pairs.items():
            if abs(said - held) > CLOSE * held:
                return Cell("WRONG", f"{said} bytes of {name} are predicted, {held} are held")
        return Cell("Y")

    def _text(self, engine: Engine, **knobs: Any) -> Cell:
        said = engine.generate(_prompt(SHORT), Configuration(**self.base | knobs), NEW_TOKENS).tokens
        return _judged(said, self.stock.tokens, self.stock.logits)

    def _quantized(self) -> Cell:
        engine, prompt = self._loaded(), _prompt(LONG)
        plain = Configuration(**self.base, cache="quantized-4")
        wanted = engine.generate(prompt, plain, NEW_TOKENS).tokens
        said = engine.generate(prompt, plain.replace(draft="prompt-lookup", depth=3), NEW_TOKENS).tokens
        return _judged(said, wanted, engine.score(prompt, wanted, plain, 1))

    def _own_draft(self) -> Cell:
        drafted = {"draft": str(self.folder), "draft_weights": "fp32"}
        return self._text(Engine.load(str(self.folder), LoadGroup(**self.base, **drafted), "cpu"), **drafted, depth=3)

    def _four_bits(self, word: str) -> Cell:
        knobs = {"weights": word, "attention": self.stock.attention}
        engine = Engine.load(str(self.folder), LoadGroup(**knobs), "cpu")
        logits = engine.score(_prompt(SHORT), self.stock.tokens, Configuration(**knobs), 1)
        return Cell("Y") if logits.isfinite().all() else Cell("WRONG", "logits are not finite")


def _send(kind: str, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(check(kind, Path(folder)))


def checked_apart(kind: str, limit: float) -> Row:
    """The row of a type from a process of its own, which may crash or take too long."""
    context = multiprocessing.get_context("fork")  # all is imported already
    with tempfile.TemporaryDirectory() as folder:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(kind, folder, there))
        process.start()
        there.close()
        try:
            if here.poll(limit):
                return here.recv()  # type: ignore[no-any-return]
            return {"plan": Cell("crash", f"it took more than {limit:.0f} s")}
        except EOFError:
            return {"plan": Cell("crash", "its process ended")}
        finally:
            process.kill()
            process.join()


def page(rows: dict[str, Row]) -> str:
    """docs/models.md."""
    reasons: dict[str, int] = {}

    def shown(cell: Cell | None) -> str:
        if cell is None:
            return "-"
        number = reasons.setdefault(cell.reason, len(reasons) + 1) if cell.reason else None
        return f"{cell.status} ({number})" if number else cell.status

    def table(kinds: list[str]) -> str:
        head = ["model_type", *COLUMNS]
        lines = [head, ["---"] * len(head)]
        lines += [[f"`{kind}`", *(shown(rows[kind].get(name)) for name in COLUMNS)] for kind in kinds if kind in rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    tables = table(FIRST), table([kind for kind in TYPES if kind not in FIRST])
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return INTRO.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        types=len(rows),
        runs=sum(row.get("dynamic", Cell("")).status == "Y" for row in rows.values()),
        common=tables[0],
        others=tables[1],
        reasons=notes,
    )


@click.command()
@click.argument("kinds", metavar="[TYPE]...", nargs=-1)
@click.option("--limit", default=120.0, show_default=True, help="seconds for a type")
@click.option("--kept", type=click.Path(path_type=Path, exists=True), help="an earlier output, for the types not named")
@click.option("--write", is_flag=True, help="write docs/models.md")
def main(kinds: tuple[str, ...], limit: float, kept: Path | None, write: bool) -> None:
    """What runs of each model type; the last line is one JSON object.

    Example: python -m benchmarks.model_types llama mamba2
    """
    unknown = sorted(set(kinds) - set(TYPES))
    if unknown:
        raise click.UsageError(f"{unknown[0]} is no decoder-only type of transformers {transformers.__version__}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    earlier = json.loads(kept.read_text().splitlines()[-1])["rows"] if kept else {}
    rows = {kind: {name: Cell(*cell) for name, cell in row.items()} for kind, row in earlier.items()}
    if write and {*rows, *(kinds or TYPES)} != set(TYPES):
        raise click.UsageError("--write is for all types: name none, or give the others' rows with --kept")
    click.echo(f"{'':<26}" + "".join(f"{name:<15}" for name in COLUMNS))
    for number, kind in enumerate(kinds or TYPES, 1):
        rows[kind] = checked_apart(kind, limit)
        cells = [rows[kind].get(name, Cell("-")) for name in COLUMNS]
        click.echo(f"{kind:<26}" + "".join(f"{cell.status:<15}" for cell in cells))
        for reason in dict.fromkeys(cell.reason for cell in cells if cell.reason):
            click.echo(f"  {reason}")
        click.echo(f"{number} of {len(kinds or TYPES)}", err=True)
    if write:
        PAGE.write_text(page(rows), encoding="utf-8")
    counts = {name: Counter(row[name].status for row in rows.values() if name in row) for name in COLUMNS}
    click.echo(json.dumps({"benchmark": "model_types", "types": len(rows), "counts": counts, "rows": rows}))


if __name__ == "__main__":
    main()
