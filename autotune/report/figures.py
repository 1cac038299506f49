"""The report's pictures. Their labels are escaped as they are made."""

from __future__ import annotations

import html
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..config import MIB, OUTCOMES, Configuration, LoadGroup, Record
from .view import Answer, Html, View, describe, join, knob_texts, number, quality_loss, quality_loss_error, tag, words

_INK, _FAINT, _GRID, _CHOSEN, _FAILED = "#1f2933", "#9aa5b1", "#e4e7eb", "#c2410c", "#8a4b3c"
# Colours by share of the scale; chosen. Lightness falls steadily, so that it reads without colour as well.
_FOOTPRINT = [[0, "#b8e0d2"], [0.35, "#52a9b5"], [0.7, "#2a6496"], [1, "#241a54"]]
_LINES = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7b61a8")  # Okabe and Ito's, but for the last
_SYMBOLS = ("square", "triangle-up", "diamond", "cross", "triangle-down", "pentagon")
_FAILURES = ("x-thin", "cross-thin", "asterisk", "square", "diamond", "hexagon", "triangle-up", "star")
_OWNERS = dict.fromkeys(("base", "process", "cuda_context"), "#7b8794")
_OWNERS |= {"weights": "#1f4e79", "lm_head": "#3d85b8", "embeddings": "#9ccbe8", "draft": "#a8527f"}
_OWNERS |= {"kv_cache": "#e69f00", "draft_kv_cache": "#f7dc9a", "activations": "#009e73", "slack": "#d5dae0"}
_OTHER = "#b0a18f"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (rate, loss) points that none beats (as fast, as good, and better in one), the slowest first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1])):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front[::-1]


def _figure(figure: Any, height: int, name: str, bottom: int) -> Html:
    """The picture as markup; `bottom` pixels hold the axis title and the legend."""
    font = {"family": "system-ui, -apple-system, Segoe UI, Liberation Sans, Arial, sans-serif", "color": _INK}
    legend = {"orientation": "h", "y": -54 / (height - bottom - 60), "yanchor": "top", "x": 0, "traceorder": "normal"}
    figure.update_layout(template="plotly_white", height=height, font=font, legend=legend)
    figure.update_layout(
        hoverlabel={"align": "left", "bgcolor": "white"}, margin={"l": 60, "r": 10, "t": 60, "b": bottom}
    )
    figure.update_xaxes(gridcolor=_GRID, linecolor=_FAINT, ticks="outside", tickcolor=_FAINT, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, linecolor=_FAINT, zeroline=False)
    config = {
        "responsive": True,
        "displaylogo": False,
        "displayModeBar": "hover",
        "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    }
    return tag(
        "div",
        Html(figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=name)),
        class_="figure",
    )


def _hover(view: View, record: Record) -> str:
    ratio = "" if record.perplexity_ratio is None else f", perplexity ratio {record.perplexity_ratio:.4f}"
    figures = [f"{name} {number(getattr(record, key), unit, scale)}" for name, key, unit, scale in view.figures]
    lines = [
        f"{words(record.outcome)}, {number(view.rate(record))} {view.unit}, {record.context_tokens:,} tokens",
        f"quality loss {view.loss(record, '%')}{ratio}",
        ", ".join(figures[:3]),
        ", ".join(figures[3:]),
        *textwrap.wrap(" ".join(knob_texts(record.configuration)), 76),
        *textwrap.wrap(textwrap.shorten(record.reason, 300), 76),
    ]
    return "<br>".join(html.escape(line) for line in lines)


def pareto_section(view: View) -> Html:
    parts = []
    for answer in view.answers:
        here = [record for record in view.records if record.context_tokens == answer.context]
        drawn = [record for record in here if view.rate(record)]
        blank = Counter(words(record.outcome) for record in here if not view.rate(record)).most_common()
        parts.append(tag("h3", f"{answer.context:,} tokens of context"))
        notes = (
            [f"Without figures: {', '.join(f'{n} {outcome}' for outcome, n in blank)} (see Outcomes)."] if blank else []
        )
        if drawn:
            picture = _Pareto(view, answer, drawn)
            parts.append(_figure(picture.figure(), 430, f"pareto-{answer.context}", 100))
            notes = [*picture.notes(), *notes]
        parts.append(tag("p", " ".join(notes or [] if here else ["Nothing was measured."]), class_="note"))
    return join(parts)


class _Pareto:
    """The picture of one context; what lies off the scale is drawn at its edge, what has no quality, in a strip."""

    def __init__(self, view: View, answer: Answer, drawn: Sequence[Record]) -> None:
        self.view, self.answer, self.drawn = view, answer, drawn
        self.limit = 100 * view.run.workload.max_quality_loss
        losses = [loss for record in drawn if record.outcome == "ok" and (loss := quality_loss(record)) is not None]
        self.low, top = min([0.0, *losses]), max([0.0, *losses])
        self.top = max(top, self.limit) if top - self.low > self.limit / 8 or not losses else top
        span = max(self.top - self.low, 0.05)
        self.high, self.bottom = self.low + 1.12 * span, self.low - 0.1 * span
        self.strip = self.bottom - 0.06 * span
        self.blank = any(quality_loss(record) is None for record in drawn)
        rates = [view.speed(record) for record in drawn]
        margin = 0.06 * max(max(rates) - min(rates), 0.1 * max(rates))
        self.left, self.right = min(rates) - margin, max(rates) + margin

    def figure(self) -> Any:
        from plotly import graph_objects as go

        figure = go.Figure()
        ok = [record for record in self.drawn if record.outcome == "ok"]
        scored = [record for record in ok if quality_loss(record) is not None]
        front = [scored[i] for i in pareto_front([(self.view.speed(r), self.y(r)) for r in scored])]
        line = {"color": "#52606d", "width": 1.5, "shape": "vh"}
        figure.add_scatter(
            **{**self.points(front), "mode": "lines", "hoverinfo": "skip"}, line=line, name="Pareto front"
        )
        figure.add_scatter(**self.points(ok), **self.intervals(ok), marker=self.colors(ok), name="fits")
        for outcome, symbol in zip(OUTCOMES[1:], _FAILURES, strict=True):
            failed = [record for record in self.drawn if record.outcome == outcome]
            marker = {"symbol": f"{symbol}-open", "size": 9, "color": _FAILED, "line": {"width": 1.6, "color": _FAILED}}
            if failed:
                figure.add_scatter(**self.points(failed), marker=marker, name=words(outcome))
        self.add_limits(figure)
        self.add_names(figure)
        figure.update_xaxes(title=f"{self.view.unit} (more is faster)", range=[self.left, self.right])
        return figure

    def y(self, record: Record) -> float:
        loss = quality_loss(record)
        return (self.bottom + self.strip) / 2 if loss is None else min(loss, self.high)

    def points(self, records: Sequence[Record]) -> dict[str, Any]:
        place = {"x": [self.view.speed(record) for record in records], "y": [self.y(record) for record in records]}
        hover = [_hover(self.view, record) for record in records]
        return {**place, "mode": "markers", "hovertext": hover, "hoverinfo": "text", "cliponaxis": False}

    def colors(self, records: Sequence[Record]) -> dict[str, Any]:
        peaks = [record.peak_bytes / MIB if record.peak_bytes else math.nan for record in records]
        low, high = min([0.9 * self.view.budget, *(peak for peak in peaks if peak > 0)]), self.view.budget
        ticks = [low + (high - low) * step / 4 for step in range(5)]
        names = [f"{tick:,.0f}" for tick in ticks[:-1]] + [f"{high:,.0f} budget"]
        bar = {
            "title": {"text": "footprint, MiB", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "tickvals": ticks,
        }
        scale = {"cmin": low, "cmax": high, "colorscale": _FOOTPRINT, "colorbar": {**bar, "ticktext": names}}
        return {"color": peaks, **scale, "size": 11, "opacity": 0.9, "line": {"color": "white", "width": 1}}

    def intervals(self, records: Sequence[Record]) -> dict[str, Any]:
        speeds = [self.view.speed(record) for record in records]
        ends = [self.view.interval(record) or (speed, speed) for record, speed in zip(records, speeds, strict=True)]
        faint = {"type": "data", "thickness": 1, "width": 0, "color": "rgba(82,96,109,0.35)"}
        above = [end[1] - speed for end, speed in zip(ends, speeds, strict=True)]
        below = [speed - end[0] for end, speed in zip(ends, speeds, strict=True)]
        losses = [quality_loss_error(record) or 0 for record in records]
        return {"error_x": {**faint, "array": above, "arrayminus": below}, "error_y": {**faint, "array": losses}}

    def add_limits(self, figure: Any) -> None:
        if self.limit <= self.high:
            line = {"color": _CHOSEN, "dash": "dash", "width": 1.2}
            ends = {"x": [self.left, self.right], "y": [self.limit] * 2}
            figure.add_scatter(**ends, mode="lines", line=line, name=f"limit, {self.limit:g} %", hoverinfo="skip")
        rough = (self.high - self.bottom) / 8
        step = 10 ** math.floor(math.log10(rough))
        step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
        ticks = [round(step * i, 6) for i in range(math.ceil(self.bottom / step), math.floor(self.high / step) + 1)]
        names = [f"{tick:g}" for tick in ticks]
        if self.blank:
            figure.add_hrect(self.strip, self.bottom, fillcolor=_GRID, opacity=0.5, line_width=0, layer="below")
            ticks, names = [(self.strip + self.bottom) / 2, *ticks], ["not<br>measured", *names]
        title, low = "quality loss, % (less is better)", self.strip if self.blank else self.bottom
        figure.update_yaxes(title=title, range=[low, self.high], tickvals=ticks, ticktext=names)

    def add_names(self, figure: Any) -> None:
        """Labels stand in rows above the picture, where they cover neither a point nor each other."""
        answer = self.answer
        names = [("chosen", answer.chosen, _CHOSEN), ("baseline", answer.baseline, _INK)]
        names = [("chosen: the baseline", answer.chosen, _CHOSEN)] if answer.kept else names
        present = [(name, record, color) for name, record, color in names if record and record in self.drawn]
        for row, (name, record, color) in reversed(list(enumerate(present))):
            x, y = self.view.speed(record), self.y(record)
            side = (x - self.left) / (self.right - self.left)
            anchor = "left" if side < 0.35 else "right" if side > 0.65 else "center"
            loss = "" if quality_loss(record) is None else f", loss {self.view.loss(record, '%', error=False)}"
            text = f"<b>{name}</b> {number(x)} {self.view.unit}{loss}"
            tail = {
                "ax": x,
                "axref": "x",
                "ay": self.high + (0.05 + 0.08 * row) * (self.high - self.bottom),
                "ayref": "y",
            }
            look = {"arrowcolor": color, "arrowwidth": 1, "arrowhead": 0, "standoff": 10, "bgcolor": "white"}
            figure.add_annotation(x=x, y=y, text=text, **tail, **look, xanchor=anchor, font={"color": color})
            ring = {"symbol": "circle-open", "size": 19, "color": color, "line": {"width": 2.5, "color": color}}
            marks = {**self.points([record]), "marker": ring, "hoverinfo": "skip", "showlegend": False}
            figure.add_scatter(**marks)

    def notes(self) -> list[str]:
        off = sum((quality_loss(record) or 0) > self.high for record in self.drawn)
        notes = [f"The limit of {self.limit:g} % lies above the scale."] if self.limit > self.high else []
        return [*notes, f"{off} with a loss beyond the scale stand at its upper edge."] if off else notes


def context_figure(view: View) -> Html:
    """Rate and footprint over context, side by side: chosen, baseline, and each load group's fastest that fits."""
    from plotly.subplots import make_subplots

    lines = _context_lines(view)
    if not lines:
        return tag("p", "Nothing that was measured fits.", class_="note")
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.15)
    for name, records, style in lines:
        xs, text = [f"{record.context_tokens:,}" for record in records], html.escape(name)
        hover = [f"<b>{text}</b><br>{_hover(view, record)}" for record in records]
        look = {**style, "x": xs, "mode": "lines+markers", "name": text, "legendgroup": text, "hoverinfo": "text"}
        peaks = [record.peak_bytes / MIB if record.peak_bytes else None for record in records]
        figure.add_scatter(**look, y=[view.rate(record) for record in records], hovertext=hover, row=1, col=1)
        figure.add_scatter(**look, y=peaks, hovertext=hover, showlegend=False, row=1, col=2)
    contexts = [f"{context:,}" for context in view.contexts]
    line = {"color": _CHOSEN, "dash": "dash", "width": 1.2}
    name = f"budget, {view.budget:,.0f} MiB"
    figure.add_scatter(x=contexts, y=[view.budget] * len(contexts), mode="lines", line=line, name=name, row=1, col=2)
    figure.update_xaxes(title="context, tokens", type="category", categoryorder="array", categoryarray=contexts)
    figure.update_yaxes(rangemode="tozero", tickformat=",")
    figure.update_yaxes(title=view.unit, row=1, col=1)
    figure.update_yaxes(title="footprint, MiB", row=1, col=2)
    bottom = 64 + 20 * len(lines)
    return _figure(figure, 380 + bottom, "contexts", bottom)


def _context_lines(view: View) -> list[tuple[str, list[Record], dict[str, Any]]]:
    """Name, records by context, and style of each line; of the load groups, the six fastest."""
    groups: dict[LoadGroup, dict[int, Record]] = defaultdict(dict)
    for record in sorted(view.records, key=view.speed):
        if record.outcome == "ok":
            groups[record.configuration.load_group][record.context_tokens] = record
    fastest = sorted(groups, key=lambda group: -max(map(view.speed, groups[group].values())))
    base = view.baseline.load_group if view.baseline else LoadGroup()
    lines: list[tuple[str, list[Record], dict[str, Any]]] = []
    for group, color, symbol in zip(fastest, _LINES, _SYMBOLS, strict=False):
        style = {"line": {"color": color, "width": 1.5}, "marker": {"symbol": symbol, "size": 8, "color": color}}
        loaded = describe(Configuration(**asdict(group)), Configuration(**asdict(base)))
        name = "fastest, loaded as the baseline" if group == base else f"fastest with {loaded}"
        lines.append((name, [groups[group][context] for context in sorted(groups[group])], style))
    base_line = [answer.baseline for answer in view.answers if answer.baseline]
    chosen_line = [answer.chosen for answer in view.answers if answer.chosen]
    lines = [line for line in lines if any(record not in [*base_line, *chosen_line] for record in line[1])]
    dashed = {"line": {"color": _INK, "width": 2, "dash": "dot"}, "marker": {"symbol": "circle-open", "size": 10}}
    thick = {"line": {"color": _CHOSEN, "width": 3.5}, "marker": {"symbol": "circle", "size": 10}}
    return [line for line in [*lines, ("baseline", base_line, dashed), ("chosen", chosen_line, thick)] if line[1]]


def memory_section(view: View) -> Html:
    """Who holds the memory: per configuration, and against context."""
    return join([_memory_figure(view), _memory_over_context(view)])


def _memory_over_context(view: View) -> Html:
    """The footprint by owner, stacked, over context: of the baseline and of the chosen, where several were measured."""
    from plotly.subplots import make_subplots

    kept = all(answer.kept for answer in view.answers)
    sides = {"baseline, which is kept" if kept else "baseline": [answer.baseline for answer in view.answers]}
    sides |= {} if kept else {"chosen": [answer.chosen for answer in view.answers]}
    held = {name: [r for r in records if r and r.memory] for name, records in sides.items()}
    held = {name: records for name, records in held.items() if len(records) > 1}
    if not held:
        return Html("")
    figure = make_subplots(1, len(held), subplot_titles=list(held), shared_yaxes=True, horizontal_spacing=0.05)
    for column, records in enumerate(held.values(), 1):
        place, contexts = {"row": 1, "col": column}, [record.context_tokens for record in records]
        for owner in _owners([record.memory for record in records]):
            sizes, name = [record.memory.get(owner, 0) / MIB for record in records], html.escape(words(owner))
            hover = [f"{name} at {c:,}: {number(size, 'MiB')}" for c, size in zip(contexts, sizes, strict=True)]
            look = {"fillcolor": _OWNERS.get(owner, _OTHER), "line": {"color": "white", "width": 1}, "mode": "lines"}
            text = {"name": name, "showlegend": False, "hovertext": hover, "hoverinfo": "text"}
            figure.add_scatter(x=contexts, y=sizes, stackgroup="owners", **look, **text, **place)
        figure.add_hline(view.budget, line={"color": _CHOSEN, "dash": "dash", "width": 1.5}, **place)
    ends = [record.context_tokens for records in held.values() for record in records]
    figure.update_xaxes(title="context, tokens", tickformat=",", nticks=5, range=[min(ends), max(ends)])
    top = max(view.budget, *(sum(record.memory.values()) / MIB for records in held.values() for record in records))
    figure.update_yaxes(tickformat=",", range=[0, 1.08 * top])
    figure.update_yaxes(title="footprint, MiB", row=1, col=1)
    note = "Straight lines join the contexts that were measured; what is chosen may change from one to the next. "
    note += f"The dashed line is the budget, {view.budget:,.0f} MiB. The colours are those of the bars above."
    return join([_figure(figure, 400, "memory-over-context", 60), tag("p", note, class_="note")])


def _owners(memories: Iterable[Mapping[str, int]]) -> list[str]:
    """Those that hold anything, in the order in which they are stacked."""
    holding = [owner for memory in memories for owner, size in memory.items() if size]
    return [owner for owner in dict.fromkeys([*_OWNERS, *holding]) if owner in holding]


def _memory_figure(view: View) -> Html:
    """The footprint by owner, a bar each for the baseline and the chosen at every context."""
    from plotly import graph_objects as go

    named = [(a, name, r) for a in view.answers for name, r in (("baseline", a.baseline), ("chosen", a.chosen))]
    bars = {
        f"{a.context:,} {name}": r.memory
        for a, name, r in named
        if r and r.memory and not (a.kept and name == "chosen")
    }
    if not bars:
        return tag("p", "No record says which owner holds how much.", class_="note")
    figure, sums = go.Figure(), {name: sum(memory.values()) / MIB for name, memory in bars.items()}
    for owner in _owners(bars.values()):
        sizes, name = [memory.get(owner, 0) / MIB for memory in bars.values()], html.escape(words(owner))
        hover = [f"{name}: {number(size, 'MiB')}" for size in sizes]
        marker = {"color": _OWNERS.get(owner, _OTHER), "line": {"color": "white", "width": 1}}
        look = {"orientation": "h", "marker": marker, "hovertext": hover, "hoverinfo": "text"}
        figure.add_bar(x=sizes, y=list(bars), name=name, **look)
    for name, total in sums.items():
        label = {"text": f"{total:,.0f} MiB", "xanchor": "left", "xshift": 4, "bgcolor": "white", "showarrow": False}
        figure.add_annotation(x=total, y=name, **label)
    text = {"text": f"budget {view.budget:,.0f} MiB", "yref": "paper", "yanchor": "bottom", "showarrow": False}
    figure.add_vline(view.budget, line={"color": _CHOSEN, "dash": "dash", "width": 1.5})
    figure.add_annotation(x=view.budget, y=1, **text)
    figure.update_xaxes(title="MiB", tickformat=",", range=[0, 1.15 * max(view.budget, *sums.values())])
    figure.update_yaxes(autorange="reversed", type="category", ticksuffix="  ", automargin=True)
    figure.update_layout(barmode="stack", bargap=0.3)
    return _figure(figure, 170 + 36 * len(bars), "memory", 110)
