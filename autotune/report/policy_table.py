"""What was chosen per context, as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import mib, within_noise

if TYPE_CHECKING:
    from ..policy.policy import Policy


def print_policy(policy: Policy, console: Any) -> None:
    """What was chosen per context, for a person."""
    from rich.table import Table

    from ..policy.export import load_text, settings_text, task_text

    table = Table(title=f"load: {load_text(policy.load_group)}", title_justify="left", header_style="bold")
    for column in ("up to", "settings", "tokens/s", "baseline", "times", "peak of budget", "quality loss"):
        table.add_column(column, justify="left" if column == "settings" else "right")
    stock = {entry.context_tokens: entry for entry in policy.baseline}
    asked, floor = policy.workload["contexts"], policy.workload.get("noise_floor", {})
    for rule in policy.rules:
        expected, base = rule.expected, stock.get(rule.max_context_tokens)
        rate = f"{expected.tokens_per_s:.1f}"
        if expected.tokens_per_s_interval is not None:
            rate += " ({:.1f}-{:.1f})".format(*expected.tokens_per_s_interval)
        loss = f"{expected.perplexity_ratio - 1:+.2%}" if expected.perplexity_ratio is not None else "not measured"
        if expected.perplexity_ratio is not None and within_noise(expected.perplexity_ratio, floor):
            loss = "within noise"
        text = settings_text(rule.settings) + (f"; loads {load_text(rule.load)}" if rule.load else "")
        stocks = "does not fit" if rule.max_context_tokens in asked else "-"
        table.add_row(
            str(rule.max_context_tokens),
            text,
            rate,
            f"{base.expected.tokens_per_s:.1f}" if base else stocks,
            "tie" if rule.tie else f"{rule.speedup:.2f}" if rule.speedup else "-",
            f"{mib(expected.peak_bytes)} ({expected.peak_bytes / policy.budget_bytes:.0%})",
            loss + task_text(expected),
        )
    console.print(table)
    for rule in policy.rules:
        console.print(f"up to {rule.max_context_tokens}: {rule.note}", markup=False, highlight=False)
    alone = [(rule.max_context_tokens, rule.unrestricted) for rule in policy.rules if rule.unrestricted]
    if policy.rules[0].reload_s is None:
        shares = ", ".join(f"{1 / fastest.gain:.0%} at {length}" for length, fastest in alone)
        line = f"one load reaches {shares} of what was fastest there in the search, whatever it loads"
    else:
        times = ", ".join(f"{rule.reload_s:.1f} s at {rule.max_context_tokens}" for rule in policy.rules)
        line = f"changing from one load to another takes {times}"
    console.print(line, markup=False, highlight=False)
    for context in asked:
        if context > policy.rules[-1].max_context_tokens:
            console.print(f"{context}: nothing that was measured was feasible; the report says why", markup=False)
