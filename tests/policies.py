"""Policies of records that never happened, and one of the bundled model that can be deployed."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

from hypothesis import strategies as st
from rich.console import Console

from autotune.config import MIB, Budget, Configuration, Record, Workload
from autotune.demo import TARGET
from autotune.model.fingerprint import fingerprint
from autotune.policy.policy import Expected, Load, ModelInfo, Policy, Rule, Settings, to_configuration
from autotune.policy.rules import make_policy
from autotune.report.policy_table import print_policy
from tests.records import synthetic_record

BUDGET = Budget(1000 * MIB)
DRAFT = "/models/draft"
STOCK = Configuration(weights="bnb-nf4")
FAST = Configuration(weights="quanto-int4", cache="static", draft=DRAFT, draft_weights="bf16", depth=4)
DEEP = FAST.replace(depth=6)
MODEL = {"path": "/models/target", "weights_sha256": "0a", "tokenizer_sha256": "1b"}
configurations = st.builds(
    Configuration,
    weights=st.sampled_from(["bf16", "bnb-nf4", "quanto-int4"]),
    lm_head=st.sampled_from(["bf16", "nf4"]),
    draft=st.sampled_from(["none", "prompt-lookup", DRAFT]),
    draft_weights=st.sampled_from(["bf16", "bnb-nf4"]),
    depth=st.integers(0, 16),
    speculation=st.sampled_from(["constant", "adaptive"]),
    cache=st.sampled_from(["dynamic", "static", "quantized-4"]),
    attention=st.sampled_from(["sdpa", "eager"]),
    prefill_chunk=st.sampled_from([0, 512]),
    launch=st.sampled_from(["eager", "graph", "compile"]),
)


def around(rate: float, spread: float = 0.01, rounds: int = 3) -> tuple[float, ...]:
    """Rates of rounds with this median."""
    return tuple(rate * (1 + spread * (i - (rounds - 1) / 2)) for i in range(rounds))


def both_finals(configuration: Configuration, context: int, rate: float, **figures: Any) -> list[Record]:
    return [synthetic_record(configuration, context, around(rate), stage="final", **figures) for _ in range(2)]


def policy_of(
    records: list[Record],
    chosen: dict[int, Configuration],
    baselines: dict[int, Configuration],
    reloads: bool = False,
    **workload: Any,
) -> Policy | None:
    return make_policy(
        records,
        chosen,
        baselines,
        reloads=reloads,
        workload=Workload(**{"contexts": tuple(chosen)} | workload),
        budget=BUDGET,
        model=MODEL,
        environment={"device": "a CPU", "versions": {"torch": "2"}},
        workload_info={"contexts": list(workload.get("contexts", chosen)), "new_tokens": 100},
    )


def finals(rates: dict[Configuration, float], context: int = 512, spread: float = 0.01) -> list[Record]:
    """One record each of three rounds: at a spread of 1 %, errors of 2.8 %."""
    return [synthetic_record(c, context, around(rate, spread), stage="final") for c, rate in rates.items()]


def tied_with(policy: Policy | None, at: int = 0) -> list[Configuration]:
    assert policy is not None
    return [to_configuration(tie.load, tie.settings) for tie in policy.rules[at].ties]


def chosen_at(policy: Policy | None, context: int) -> Configuration:
    assert policy is not None
    return policy.configuration(policy.rule_for(context))


def printed(policy: Policy) -> str:
    console = Console(width=200, file=io.StringIO())
    print_policy(policy, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


OTHER = STOCK.replace(weights="quanto-int8")


def bundled_policy(longest: int = 256, budget: int = 2 * 10**9) -> Policy:
    def rule(limit: int, cache: str) -> Rule:
        expected = Expected(
            tokens_per_s=1.0, tokens_per_s_interval=(0.1, 2.0), decode_tokens_per_s=1.0, ttft_s=1.0, peak_bytes=1
        )
        settings = Settings(draft="none", depth=0, cache=cache, prefill_chunk=0, launch="eager")
        return Rule(max_context_tokens=limit, settings=settings, expected=expected)

    return Policy(
        model=ModelInfo(**fingerprint(TARGET)),
        budget_bytes=budget,
        environment={"device_word": "cpu"},
        workload=json.loads(json.dumps(asdict(Workload(contexts=(64, longest), new_tokens=16)))),
        load=Load(  # in float32 a cache that is used again changes no token
            weights="fp32", lm_head="fp32", embeddings="device", draft="none", draft_weights="none", attention="sdpa"
        ),
        rules=[rule(64, "static"), rule(longest, "quantized-8")],
        baseline=[],
    )
