"""`autotune plan`: predictions as a table, per layer, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys

import click
from rich.console import Console
from rich.table import Table

from ..config import Configuration, mib
from ..model.calibration import DEFAULT, largest_context, predict
from ..model.footprint import Prediction, by_layer
from ..model.shape import ModelShape
from ..request import Request, check_inputs
from .view import describe

SHOWN = 24  # rows of the table; chosen


def print_plan(request: Request, as_json: bool) -> None:
    """The distinct footprints of the space, smallest first at the longest context."""
    shapes = check_inputs(request)
    target = shapes[str(request.model)]
    calibration = DEFAULT["cpu" if request.budget.device == "cpu" else "cuda"]
    rows = []
    for configuration in _distinct(request, target):
        draft = shapes.get(configuration.draft)
        predictions = {
            context: predict(
                target, draft, configuration, context, request.workload.new_tokens, request.budget.device, calibration
            )
            for context in request.workload.contexts
        }
        fits = largest_context(target, draft, configuration, request.workload.new_tokens, request.budget, calibration)
        rows.append((configuration, predictions, fits))
    rows.sort(key=lambda row: row[1][max(request.workload.contexts)].total)
    if as_json:
        click.echo(json.dumps([_row(*row) for row in rows], indent=2))
        return
    table = Table(
        title=f"predicted footprint, budget {mib(request.budget.bytes)}", title_justify="left", header_style="bold"
    )
    table.add_column("configuration")
    for context in request.workload.contexts:
        table.add_column(f"{context} tokens", justify="right")
    table.add_column("largest context", justify="right")
    for configuration, predictions, fits in rows[:SHOWN]:
        cells = [f"{mib(p.total)}" + ("" if p.total <= request.budget.bytes else " over") for p in predictions.values()]
        table.add_row(describe(configuration), *cells, str(fits) if fits else "none")
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"{len(rows) - SHOWN} more; --json lists all")
    console.print("Predictions, before calibration on this machine: autotune run measures.")


def print_layers(request: Request, as_json: bool) -> None:
    """Weights and cache per layer, for the stock configuration at the longest context."""
    shapes = check_inputs(request)
    configuration = Configuration(weights=str(request.space.choices["weights"][0]))
    context = max(request.workload.contexts)
    rows = by_layer(shapes[str(request.model)], configuration, context, request.workload.new_tokens)
    if as_json:
        click.echo(json.dumps([row._asdict() for row in rows], indent=2))
        return
    table = Table(
        "layer", "weights", "KV cache", header_style="bold", title=f"{describe(configuration)}, {context} tokens"
    )
    for row in rows:
        table.add_row(str(row.layer), mib(row.weights_bytes), mib(row.kv_bytes))
    Console().print(table)


def _distinct(request: Request, target: ModelShape) -> list[Configuration]:
    """The space's configurations that differ in memory: one depth, no launch, the first attention."""
    choices = dict(request.space.choices)
    choices["depth"] = choices["depth"][-1:]
    choices["attention"] = choices["attention"][:1]
    choices["speculation"] = choices["speculation"][:1]
    choices["launch"] = ("eager",)
    choices["draft"] = tuple(word for word in choices["draft"] if word != "prompt-lookup") or ("none",)
    space = dataclasses.replace(request.space, choices=choices).restrict(
        device=request.budget.device,
        full_precision="bf16",
        drafts=[str(draft) for draft in request.drafts],
        sliding=any(layer.window for layer in target.layers),
        quantized=target.prequantized,
        failed={},
    )
    return list(space.configurations())


def _row(configuration: Configuration, predictions: dict[int, Prediction], fits: int) -> dict[str, object]:
    return {
        "configuration": dataclasses.asdict(configuration),
        "largest_context_tokens": fits,
        "contexts": {
            str(context): {
                "total_bytes": prediction.total,
                "owners": dict(prediction.owners),
                "host_bytes": prediction.host_bytes,
                "kv_bytes_per_token": prediction.kv_bytes_per_token,
                "decode_floor_s": prediction.decode_floor_s,
            }
            for context, prediction in predictions.items()
        },
    }
