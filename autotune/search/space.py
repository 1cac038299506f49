"""The search space: a TOML file of knobs, what of it this machine and model can run, and suggestions from it.

A combination that cannot work is never suggested: knobs are asked for in an order in which every choice is legal given
those before it, and a knob without effect is not asked for at all, so that the sampler sees a conditional space.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from ..config import (
    ATTENTIONS,
    CACHES,
    EMBEDDINGS,
    HEAD_WEIGHTS,
    LAUNCHES,
    LM_HEADS,
    SPECULATIONS,
    WEIGHTS,
    Configuration,
)

BUILT_IN = Path(__file__).parents[1] / "search_spaces"
if not BUILT_IN.exists():  # a source checkout
    BUILT_IN = Path(__file__).parents[2] / "search_spaces"

_WORDS: dict[str, tuple[str, ...] | None] = {
    "weights": WEIGHTS,
    "lm_head": LM_HEADS,
    "embeddings": EMBEDDINGS,
    "attention": ATTENTIONS,
    "draft": ("none", "prompt-lookup", "model"),
    "draft_weights": WEIGHTS,
    "speculation": SPECULATIONS,
    "depth": None,
    "cache": CACHES,
    "prefill_chunk": None,
    "launch": LAUNCHES,
}
_MAX_DEPTH = 16  # tokens; chosen, not measured
_MAX_RANGE = 64  # values between low and high; chosen: more no search could try
CAPTURABLE = ("static", "quantized-8", "quantized-4", "quantized-2", "quantized-fp8")


class SpaceError(ValueError):
    """A search space that cannot be read; the message names the file and the key."""


class Suggests(Protocol):
    """The part of an Optuna trial that a suggestion needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Space:
    """Choices per knob, in the order in which they are asked for; `dropped` tells what was taken out, and why."""

    choices: Mapping[str, tuple[Any, ...]]
    dropped: tuple[tuple[str, str, str], ...] = ()  # knob, word, reason

    def suggest(self, trial: Suggests) -> Configuration:
        """A legal configuration of the trial's choices."""
        picked: dict[str, Any] = {}
        for knob, choices in self.choices.items():
            options = _options(knob, self.choices, picked)
            if len(options) > 1:
                picked[knob] = trial.suggest_categorical(_name(knob, options, choices), options)
            elif options:
                picked[knob] = options[0]
        return Configuration(**picked)

    def configurations(self) -> Iterator[Configuration]:
        """Every legal configuration once."""
        yield from self._continue({}, list(self.choices))

    def _continue(self, picked: dict[str, Any], knobs: list[str]) -> Iterator[Configuration]:
        if not knobs:
            yield Configuration(**picked)
            return
        options = _options(knobs[0], self.choices, picked)
        for extended in [{**picked, knobs[0]: value} for value in options] or [picked]:
            yield from self._continue(extended, knobs[1:])

    def seeds(self) -> Iterator[Configuration]:
        """What most often wins: for each draft and each weights the rest as experience has it. To be tried first.

        Weights in the space's order, prompt lookup before draft models before none, both in step. Where steps can be
        recorded, on a GPU, whole prompts come before chunks, which take up to a fifth of the rate there; what fits
        decides between the two.
        """
        order = {"prompt-lookup": 0, "none": 2}
        ranks = {draft: order.get(draft, 1) for draft in self.choices["draft"]}
        pairs = product(enumerate(self.choices["weights"]), ranks)
        found: dict[Configuration, None] = {}
        for (_, weights), draft in sorted(pairs, key=lambda pair: pair[0][0] + ranks[pair[1]]):
            packed = weights not in ("bf16", "fp32")
            heads = ("int4", "nf4") if weights == "quanto-int4" else ("nf4", "int4")
            wishes: dict[str, tuple[Any, ...]] = {
                "weights": (weights,),
                "draft": (draft,),
                "lm_head": heads if packed else ("bf16", "fp32"),
                "embeddings": ("host",) if packed else ("device",),
                "attention": ("split_kv", "sdpa"),
                "draft_weights": (weights, "bnb-nf4") if packed else ("bf16", "fp32"),
                "speculation": ("constant",),
                "depth": (4, 3, 5),
                "cache": ("static",),
                "launch": ("graph",),
            }
            chunks: list[tuple[int, ...]] = [(2048, 1024) if packed else (0,)]
            for prefill in [(0,), *chunks] if "graph" in self.choices["launch"] else chunks:
                wished, picked = {**wishes, "prefill_chunk": prefill}, dict[str, Any]()
                for knob in self.choices:
                    options = _options(knob, self.choices, picked)
                    if options:
                        picked[knob] = next((word for word in wished[knob] if word in options), options[0])
                found[Configuration(**picked)] = None
        return iter(found)

    def neighbours(self, configuration: Configuration) -> Iterator[Configuration]:
        """What differs from it in one knob; a word that is not legal beside it gives way to the first that is."""
        own = {knob: getattr(configuration, knob) for knob in self.choices}
        for knob, words in self.choices.items():
            for word in words:
                if word == own[knob]:
                    continue
                wishes, picked = {**own, knob: word}, dict[str, Any]()
                for each in self.choices:
                    options = _options(each, self.choices, picked)
                    if options:
                        picked[each] = wishes[each] if wishes[each] in options else options[0]
                neighbour = Configuration(**picked)
                if neighbour != configuration:  # a word without effect
                    yield neighbour

    def parameters(self, configuration: Configuration) -> dict[str, Any] | None:
        """The choices that lead to a configuration, for Optuna; None where the space does not hold it."""
        picked: dict[str, Any] = {}
        parameters: dict[str, Any] = {}
        for knob, choices in self.choices.items():
            value, options = getattr(configuration, knob), _options(knob, self.choices, picked)
            if not options:
                continue
            if value not in options:
                return None
            picked[knob] = value
            if len(options) > 1:
                parameters[_name(knob, options, choices)] = value
        return parameters if Configuration(**picked) == configuration else None

    def restrict(
        self,
        *,
        device: str,
        full_precision: str,
        drafts: list[str],
        sliding: bool,
        quantized: bool,
        failed: Mapping[str, Mapping[str, str]],
        refused: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Space:
        """What this machine and model can run. Raises SpaceError where a knob has nothing left.

        `failed` is what this machine could not run, `refused` what the model cannot: reasons by knob and word.
        """
        kept: dict[str, tuple[Any, ...]] = {}
        dropped = list(self.dropped)
        for knob, choices in self.choices.items():
            left: list[Any] = []
            for word in choices:
                names = [full_precision] if word in ("bf16", "fp32") and full_precision == "fp32" else [word]
                if knob == "draft" and word == "model":
                    names = drafts
                    if not drafts:
                        dropped.append((knob, "model", "no --draft is given"))
                for name in names:
                    reason = (refused or {}).get(knob, {}).get(name, "")
                    reason = reason or _impossible(knob, name, device, sliding, quantized, failed)
                    if reason:
                        dropped.append((knob, str(name), reason))
                    elif name not in left:
                        left.append(name)
            if knob == "weights" and quantized and not left:
                left = ["checkpoint"]  # there is no other way to load it, whatever the space hoped for
            if knob == "attention" and choices == (Configuration.attention,) and not left:
                left = ["eager"]  # what stock takes where the model has no sdpa
            if knob == "attention" and "sdpa" not in choices:  # the baseline would take it all the same
                reason = (refused or {}).get(knob, {}).get("sdpa", "") or failed.get(knob, {}).get("sdpa", "")
                dropped += [(knob, "sdpa", reason)] if reason else []
            if not left:
                reasons = "; ".join(f"{word}: {reason}" for name, word, reason in dropped if name == knob)
                raise SpaceError(f"no choice of [{knob}] can run here ({reasons})")
            kept[knob] = tuple(left)
        if not set(kept["cache"]) & set(CAPTURABLE) and "split_kv" in kept["attention"]:
            reason = "it reads a cache of fixed shape, and the space has none"
            dropped.append(("attention", "split_kv", reason))
            stock = "eager" if _lost_sdpa(dropped) else "sdpa"
            kept["attention"] = tuple(word for word in kept["attention"] if word != "split_kv") or (stock,)
        return dataclasses.replace(self, choices=kept, dropped=tuple(dropped))


def read_space(name: str) -> Space:
    """A built-in space by its name, or a TOML file. Raises SpaceError."""
    path = Path(name) if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in BUILT_IN.glob("*.toml")))
        raise SpaceError(f"there is no search space {name}; give a TOML file or one of: {known}") from None
    except OSError as error:
        raise SpaceError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpaceError(f"{path} is not valid TOML: {error}") from None
    for key in tables:
        if key not in _WORDS:
            raise SpaceError(f"{path}: unknown knob [{key}]; the knobs are {', '.join(_WORDS)}")
    choices = {knob: _choices(path, knob, tables[knob]) for knob in _WORDS if knob in tables}
    return Space({knob: choices.get(knob, _default(knob)) for knob in _WORDS})


def _default(knob: str) -> tuple[Any, ...]:
    if knob == "depth":
        return (4,)
    return ("bf16",) if knob == "draft_weights" else (getattr(Configuration(), knob),)


def _choices(path: Path, knob: str, table: Any) -> tuple[Any, ...]:
    if not isinstance(table, dict):
        raise SpaceError(f"{path}: {knob} must be a table, like [{knob}]")
    for key in table:
        if key not in ("choices", "low", "high"):
            raise SpaceError(f"{path}: unknown key {knob}.{key}; use choices, or low and high")
    if ("choices" in table) == ("low" in table or "high" in table):
        raise SpaceError(f"{path}: [{knob}] takes either choices, or low and high")
    if "choices" not in table:
        low, high = table.get("low"), table.get("high")
        if _WORDS[knob] is not None:
            raise SpaceError(f"{path}: [{knob}] takes choices: {', '.join(_WORDS[knob] or ())}")
        if not _is_count(low) or not _is_count(high) or low > high:
            raise SpaceError(f"{path}: {knob}.low and {knob}.high must be whole numbers, low at most high")
        for end in (low, high):
            _check(path, knob, end)
        if high - low >= _MAX_RANGE:
            raise SpaceError(f"{path}: {knob}.low to {knob}.high are {high - low + 1} values; list some as choices")
        values: list[Any] = list(range(low, high + 1))
    else:
        values = table["choices"]
        if not isinstance(values, list) or not values:
            raise SpaceError(f"{path}: {knob}.choices must be a list that holds something")
    for value in values:
        _check(path, knob, value)
    return tuple(dict.fromkeys(values))


def _check(path: Path, knob: str, value: Any) -> None:
    words = _WORDS[knob]
    if words is not None and value not in words:
        raise SpaceError(f"{path}: {knob}.choices has {value!r}; the words are {', '.join(words)}")
    if words is None and not _is_count(value):
        raise SpaceError(f"{path}: {knob} has {value!r}, which is not a whole number of tokens")
    if knob == "depth" and not 1 <= value <= _MAX_DEPTH:
        raise SpaceError(f"{path}: depth has {value}; it must be 1 to {_MAX_DEPTH}")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _options(knob: str, space: Mapping[str, tuple[Any, ...]], picked: Mapping[str, Any]) -> tuple[Any, ...]:
    """The knob's choices that are legal given those picked before; none where it has no effect.

    An adaptive depth is the space's largest: it uses the smaller ones by itself.
    """
    choices = space[knob]
    match knob:
        case "lm_head" | "embeddings":
            return choices if picked["weights"] != "checkpoint" else ()
        case "draft_weights":
            return choices if picked["draft"] not in ("none", "prompt-lookup") else ()
        case "speculation":
            return choices if picked["draft"] != "none" and max(space["depth"]) > 1 else ()
        case "depth" if picked.get("speculation") == "adaptive":
            return (max(choices),)
        case "depth":
            return choices if picked["draft"] != "none" else ()
        case "cache" if picked.get("attention", "sdpa") == "split_kv":
            return tuple(word for word in choices if word in CAPTURABLE)
        case "launch":
            fixed = picked["cache"] in CAPTURABLE and picked.get("attention", "sdpa") in ("eager", "sdpa", "split_kv")
            waits = "bnb-int8" in (picked["weights"], picked.get("draft_weights"))
            return choices if fixed and not waits else tuple(word for word in choices if word == "eager")
        case _:
            return choices


def _name(knob: str, options: tuple[Any, ...], choices: tuple[Any, ...]) -> str:
    """Optuna's name for a choice: a parameter's choices must never change, so a part of them is one of its own."""
    return knob if options == choices else f"{knob} of {len(options)}"


def _impossible(
    knob: str, word: Any, device: str, sliding: bool, quantized: bool, failed: Mapping[str, Mapping[str, str]]
) -> str:
    """Why this machine or model cannot run the word, or nothing."""
    cpu = device == "cpu"
    if knob in ("weights", "draft_weights") and word in failed.get("weights", {}):
        return failed["weights"][word]
    if knob == "lm_head" and HEAD_WEIGHTS.get(word) in failed.get("weights", {}):
        return failed["weights"][HEAD_WEIGHTS[word]]
    if knob == "attention" and word in failed.get("attention", {}):
        return failed["attention"][word]
    if knob == "weights" and (word == "checkpoint") != quantized:
        return "the checkpoint is already quantized" if quantized else "the checkpoint is not quantized"
    if knob == "cache" and word == "sliding" and not sliding:
        return "the model has no sliding-window layers"
    if cpu and (knob, word) in {("cache", "offloaded"), ("embeddings", "host")}:
        return "the device is the host already"
    if cpu and (knob, word) in {("launch", "graph"), ("launch", "compile"), ("attention", "split_kv")}:
        return "it needs an NVIDIA GPU"
    return ""


def _lost_sdpa(dropped: Iterable[tuple[str, str, str]]) -> bool:
    return any((knob, word) == ("attention", "sdpa") for knob, word, _ in dropped)


def stock_configurations(full_precision: str, space: Space) -> list[Configuration]:
    """What a user would run without tuning: unquantized, else nf4, else nf4 with the head in nf4; stock otherwise."""
    words = [full_precision, "bnb-nf4"]
    if "checkpoint" in space.choices["weights"]:
        words = ["checkpoint"]
    attention = "eager" if _lost_sdpa(space.dropped) else "sdpa"  # as transformers itself goes on without sdpa
    lm_head = full_precision if words[0] == full_precision else Configuration.lm_head
    stock = [Configuration(weights=word, lm_head=lm_head, attention=attention) for word in words]
    return [*stock, stock[-1].replace(lm_head="nf4")] if len(stock) > 1 else stock
