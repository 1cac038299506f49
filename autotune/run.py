"""One run, from inputs to a policy: the story of the whole program in `tune`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from . import __version__
from .config import HEAD_WEIGHTS, Configuration, Record, mib
from .model.calibration import DEFAULT, cheapest
from .model.fingerprint import fingerprint
from .model.shape import ModelShape, read_shape
from .policy.choice import best_group, choose, contender, settle, unfinished
from .policy.policy import Policy, write_policy
from .policy.rules import make_policy
from .report.page import write_report
from .report.view import RunData
from .request import Request, Watch, check_inputs
from .results import Run, RunError, frame, has_ended, read_info, read_records, read_run, storage_url
from .search.earlier import Earlier, earlier_runs, learnt_from
from .search.finals import FINAL_SHARE, bisect, changes, measure_finals, reserve, seconds_for
from .search.foresight import Foresight
from .search.space import Space
from .search.study import COMPARABLE, Search, Studies, also, complete, importances, joined
from .trial.inputs import Inputs, input_files, prepare_inputs, reference_facts, score_reference, text_file
from .trial.process import WorkerFailed
from .trial.trials import Trials

COMPLETING_S = 60  # beyond the search's time: completing the winner is worth more than one more candidate
COMPLETING_SHARE = 0.1  # of --timeout, the most that completing it takes
_TRIAL_S = 600.0  # the longest that one measurement may take
_FEW = 2000  # pairs that are looked through one by one
_SURE = 0.8  # probability of fitting below which a baseline waits until more is known
_UNSURE = 0.3  # and then is not measured


class NothingFits(Exception):
    """No configuration fits the budget; the message says by how much and what would."""


def tune(request: Request, watch: Watch | None = None) -> Policy | None:
    """Search, measure the finalists again, choose; returns the policy that the run folder then holds.

    None where no configuration was feasible. KeyboardInterrupt ends the search; what was measured still makes a policy.
    Raises NothingFits before anything is measured, RunError and PlanError for inputs that cannot be used.
    """
    watch = watch or Watch()
    shapes = check_inputs(request)
    _check_budget(request, shapes)
    info = _prepare_folder(request, watch)
    studies = Studies(_url(request), request.study, info["identity"], request.workload.contexts, request.seed)
    with Trials(str(request.model), request.workload, request.budget, request.out, watch.phase) as trials:
        try:
            info, space = _prepare(request, trials, info, watch)
            search = _search(request, space, shapes, studies, trials, info, watch)
            candidates = _stock(info["environment"]["full_precision"], search.space)
            search.baseline(candidates, sure=_SURE)
            watch.note(_dropped(space))
            search.run()
            watch.note(_coverage(search) + _ended(request, info, search))
            completing_s = min(COMPLETING_S, COMPLETING_SHARE * request.timeout_s)
            chosen, baselines = _finalists(search, candidates, request.reloads, completing_s)
            end = request.started + request.timeout_s
            until = min(end, search.now() + FINAL_SHARE * request.timeout_s)
            measure_finals(search, trials, chosen, baselines, watch, until, end, request.reloads)
            chosen |= _boundaries(request, search, trials, info, chosen, baselines, watch)
        except KeyboardInterrupt:
            watch.note("stopped: finishing with what was measured")
            return conclude(request.out)
    return conclude(request.out, chosen, baselines)


def _check_budget(request: Request, shapes: dict[str, ModelShape]) -> None:
    """Raises NothingFits where even the smallest prediction is over the budget."""
    kind = "cpu" if request.budget.device == "cpu" else "cuda"
    alone = {**request.space.choices, "draft": ("none",), "attention": request.space.choices["attention"][:1]}
    space = dataclasses.replace(request.space, choices=alone).restrict(
        device=request.budget.device,
        full_precision="bf16",
        drafts=[],
        sliding=any(layer.window for layer in shapes[str(request.model)].layers),
        quantized=shapes[str(request.model)].prequantized,
        failed={},
    )
    configuration, context, prediction = cheapest(
        shapes[str(request.model)],
        {},
        list(space.configurations()),
        [min(request.workload.contexts)],
        request.workload.new_tokens,
        request.budget.device,
        DEFAULT[kind],
    )
    least = int(prediction.total * 0.95)  # what the prediction's own error leaves open
    if least > request.budget.bytes:
        raise NothingFits(
            f"--budget {mib(request.budget.bytes)} is {mib(least - request.budget.bytes)} under the smallest predicted "
            f"footprint: {configuration.weights} weights, {configuration.cache} cache at {context} tokens need about "
            f"{mib(prediction.total)}"
        )


def _prepare_folder(request: Request, watch: Watch) -> dict[str, Any]:
    """run.json, written or continued. Raises RunError."""
    workload = json.loads(json.dumps(dataclasses.asdict(request.workload)))
    identity = {
        "model": fingerprint(request.model, watch.phase),
        "drafts": [fingerprint(draft, watch.phase) for draft in request.drafts],
        "workload": workload,
        "budget": dataclasses.asdict(request.budget),
        "space": json.loads(json.dumps(dict(request.space.choices))),
    }
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        (request.out / "worker.log").touch()
    except OSError as error:
        raise RunError(f"--out {request.out} cannot be written: {error.strerror}") from None
    path = request.out / "run.json"
    info = read_info(request.out) if path.exists() else {}
    if "environment" in info:  # before that nothing was measured, and inputs may be mended
        differing = [key for key in identity if info["identity"].get(key) != identity[key]]
        differing += ["storage"] if info["storage"] != request.storage else []
        if differing:
            raise RunError(
                f"{request.out} holds a run with another {', '.join(differing)}: give this one a folder with --out, "
                "or repeat the first command to continue it"
            )
        info["reloads"] = request.reloads  # what was measured serves both choices
        info.pop("choice", None)  # until this one ends
        _write(path, info)
        return info
    info = {
        "model": str(request.model),
        "drafts": [str(draft) for draft in request.drafts],
        "budget": dataclasses.asdict(request.budget),
        "workload": workload,
        "space": request.space_name,
        "study": request.study,
        "storage": request.storage,
        "seed": request.seed,
        "reloads": request.reloads,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "autotune": __version__,
        "identity": identity,
    }
    _write(path, info)
    return info


def _write(path: Path, info: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(info, indent=2) + "\n")
    temporary.replace(path)


def _url(request: Request) -> str:
    return request.storage or f"sqlite:///{(request.out / 'study.db').resolve()}"


def _prepare(request: Request, trials: Trials, info: dict[str, Any], watch: Watch) -> tuple[dict[str, Any], Space]:
    """Look at the machine, cut the text, score the reference; done once per run folder."""
    inputs = input_files(request.out, request.workload)
    files = [inputs.tokens, *inputs.references.values(), *([inputs.task] if inputs.task else [])]
    if "environment" not in info or not all(Path(file).exists() for file in files):
        worker = trials.uncapped()
        try:
            info["environment"] = worker.request("environment", 120)
            info["environment"] |= {"base_bytes": worker.hello["base_bytes"], "device_word": request.budget.device}
            words = {knob: list(request.space.choices[knob]) for knob in ("weights", "attention")}
            words["weights"] += [w for w in request.space.choices["draft_weights"] if w not in words["weights"]]
            words["weights"] += [HEAD_WEIGHTS[w] for w in request.space.choices["lm_head"] if w in HEAD_WEIGHTS]
            info["failed"] = worker.request("probe", 900, words={k: list(dict.fromkeys(v)) for k, v in words.items()})
            text = text_file(request.workload, request.out)
            info |= prepare_inputs(
                worker, request.model, request.workload, text, request.out, info["environment"], info["identity"]
            )
        except WorkerFailed as failure:
            raise RunError(f"preparing the run failed ({failure.outcome}): {failure.reason}") from None
        finally:
            worker.kill()
        _write(request.out / "run.json", info)
    trials.inputs = inputs
    shape = read_shape(request.model)
    space = request.space.restrict(
        device=request.budget.device,
        full_precision=info["environment"]["full_precision"],
        drafts=[str(draft) for draft in request.drafts],
        sliding=any(layer.window for layer in shape.layers),
        quantized=shape.prequantized,
        failed=info["failed"],
    )
    return info, space


def _search(
    request: Request,
    space: Space,
    shapes: dict[str, ModelShape],
    studies: Studies,
    trials: Trials,
    info: dict[str, Any],
    watch: Watch,
) -> Search:
    """The search with everything that it needs to know, earlier records of the same run included."""
    end = request.started + request.timeout_s

    def measure(configuration: Configuration, context: int, stage: str) -> Record:
        if stage == "search" and search.open is not None:
            watch.gain(search.open)
        watch.trial(configuration, context, stage)
        left = max(30.0, end - search.now())
        best = [r.tokens_per_s or 0 for (_, at), r in search.known.items() if at == context and r.outcome == "ok"]
        bar = max(best, default=None) if stage == "search" and request.workload.objective == "end-to-end" else None
        return trials.measure(configuration, context, timeout_s=min(_TRIAL_S, left), stage=stage, bar=bar)

    foresight = Foresight(
        str(request.model), shapes, request.budget, request.workload.new_tokens, info["environment"]["base_bytes"]
    )
    earlier: tuple[Earlier, ...] = ()
    if request.warm_start:
        earlier, left_out = earlier_runs(request.out, info, space, foresight.predicted)
        watch.note(learnt_from(earlier, left_out))
    for run in earlier:
        for record in run.records if run.same else ():
            foresight.learn(record, run.new_tokens)
    search = Search(
        space=space,
        workload=request.workload,
        budget=request.budget,
        studies=studies,
        measure=measure,
        fits=foresight.fits,
        deadline=end,
        max_trials=request.trials,
        seed=request.seed,
        first=tuple(space.seeds()),
        earlier=earlier,
        predicted=foresight.predicted,
        step_bytes=foresight.step_bytes if request.budget.device != "cpu" else None,
    )

    def on_record(record: Record) -> None:
        foresight.learn(record)
        search.deadline = end - reserve(search, request, info["reference"]["took_s"])
        watch.record(record)

    search.on_record = on_record
    for record in read_records(_url(request), request.study):
        trials.learn(record)
        foresight.learn(record)
        cut_short = record.outcome == "timeout" and f"{_TRIAL_S:.0f} s" not in record.reason  # by the run's own end
        if record.stage != "final" and not cut_short:
            search.learn(record)
            watch.record(record)
    return search


def _stock(full_precision: str, space: Space) -> list[Configuration]:
    """What a user would run without tuning: unquantized, else nf4, else nf4 with the head in nf4; stock otherwise."""
    words = [full_precision, "bnb-nf4"]
    if "checkpoint" in space.choices["weights"]:
        words = ["checkpoint"]
    lost = any((knob, word) == ("attention", "sdpa") for knob, word, _ in space.dropped)
    attention = "eager" if lost else "sdpa"  # as transformers itself goes on where a model has no sdpa
    lm_head = full_precision if words[0] == full_precision else Configuration.lm_head
    stock = [Configuration(weights=word, lm_head=lm_head, attention=attention) for word in words]
    return [*stock, stock[-1].replace(lm_head="nf4")] if len(stock) > 1 else stock


def _coverage(search: Search) -> str:
    """How much of the space was measured; of a small one also what the plan or an earlier record ruled out."""
    pairs = [(c, context) for c in search.space.configurations() for context in search.workload.contexts]
    left = [pair for pair in pairs if pair not in search.known]
    text = f"measured {len(pairs) - len(left)} of {len(pairs)} (configuration, context) pairs of the space"
    if left and len(pairs) <= _FEW:
        hopeless = sum(bool(search.hopeless(*pair)) for pair in left)
        text += f"; {hopeless} more cannot fit or cannot differ"
    return text


def _ended(request: Request, info: dict[str, Any], search: Search) -> str:
    """What share of the possible gain was open when the search ended, which run.json keeps."""
    if search.open is None:
        return ""
    info["open_gain"] = round(search.open, 4)
    _write(request.out / "run.json", info)
    return f"; stopped with about {search.open:.0%} of the gain open"


def _dropped(space: Space) -> str:
    lines = [f"{knob} {word}: {reason}" for knob, word, reason in space.dropped]
    return "not searched here: " + "; ".join(lines) if lines else ""


def _finalists(
    search: Search, candidates: list[Configuration], reloads: bool, completing_s: float
) -> tuple[dict[int, Configuration], dict[int, Configuration]]:
    """The chosen configurations, every context of the best load group and of a near one measured, and the baselines."""
    group = best_group(search.known.values(), search.workload)
    if group is not None:
        search.deadline += completing_s
        complete(search, group)
        known, workload = list(search.known.values()), search.workload
        if not reloads and not contender(known, workload, choose(known, workload)):
            near_it = unfinished(known, workload, group)
            if near_it is not None:
                complete(search, near_it)
    if search.now() < search.deadline:
        search.baseline(candidates, sure=_UNSURE)
    chosen, baselines = _choice(search, candidates, reloads)
    if not reloads and len({baseline.load_group for baseline in baselines.values()}) > 1:
        for context in chosen:  # without reloads only what fits at the longest can be kept as a baseline
            also(search, baselines[max(baselines)], context)
        return _choice(search, candidates, reloads)
    return chosen, baselines


def _choice(
    search: Search, candidates: list[Configuration], reloads: bool
) -> tuple[dict[int, Configuration], dict[int, Configuration]]:
    stock = {context: search.baseline_of(context, candidates) for context in search.workload.contexts}
    baselines = {context: record.configuration for context, record in stock.items() if record is not None}
    return choose(list(search.known.values()), search.workload, reloads), baselines


def _boundaries(
    request: Request,
    search: Search,
    trials: Trials,
    info: dict[str, Any],
    chosen: dict[int, Configuration],
    baselines: dict[int, Configuration],
    watch: Watch,
) -> dict[int, Configuration]:
    """Lengths between contexts up to which the lower context's choice is better, as far as there is time to look.

    Speed, footprint and text are compared while halving; where a boundary is found, the reference is scored at that
    length and the choice is measured there again, quality included: a rule ends only where all of it was measured.
    """
    records = read_records(_url(request), request.study)
    standing = settle(records, chosen, baselines, request.workload, request.reloads)
    until = request.started + request.timeout_s - info["reference"]["took_s"]
    found: dict[int, Configuration] = {}
    for low, high in changes(standing, request.workload):
        ours, theirs = standing[low], standing[high]
        until -= seconds_for(search, [(ours, high)], load=True)  # to measure it again at its end
        watch.phase(f"looking between {low} and {high} for where the choice changes")
        length = bisect(search, (low, ours), (high, theirs), until)
        if length > low:
            found[length] = ours
    unscored = [length for length in found if search.known[found[length], length].perplexity_ratio is None]
    if unscored:
        assert trials.inputs is not None
        paths = {length: str(request.out / f"reference-{length}.npy") for length in unscored}
        between = Inputs(trials.inputs.tokens, paths)
        trials.close()
        worker = trials.uncapped()
        try:
            facts = reference_facts(info["identity"], info["text"], info["environment"])
            score_reference(worker, request.model, info["reference"]["weights"], between, facts)
        except WorkerFailed as failure:
            watch.note(f"no boundary between contexts: the reference could not be scored there ({failure.reason})")
            return {}
        finally:
            worker.kill()
        trials.inputs.references.update(paths)
        for length in unscored:
            search.measured(found[length], length, "boundary", again=True)
            Path(paths[length]).unlink()
    return {length: ours for length, ours in found.items() if search.known[ours, length].outcome == "ok"}


def _stored_choice(run: Run) -> tuple[dict[int, Configuration], dict[int, Configuration]]:
    chosen, baselines = (
        {int(context): Configuration(**knobs) for context, knobs in run.info["choice"][side].items()}
        for side in ("chosen", "baselines")
    )
    return chosen, baselines


def _so_far(run: Run) -> tuple[dict[int, Configuration], dict[int, Configuration]]:
    """The choice by what a run that has not ended has measured, and the baselines that it has."""
    known: dict[tuple[Configuration, int], Record] = {}
    baselines: dict[int, Configuration] = {}
    for record in run.records:
        pair = record.configuration, record.context_tokens
        if record.stage != "final":
            known[pair] = joined(known.get(pair), record)
        if record.stage == "baseline" and record.outcome in COMPARABLE:
            baselines.setdefault(record.context_tokens, record.configuration)
    return choose(list(known.values()), run.workload, run.info.get("reloads", False)), baselines


def conclude(
    out: Path, chosen: dict[int, Configuration] | None = None, baselines: dict[int, Configuration] | None = None
) -> Policy | None:
    """Write what derives from the storage: policy.json, trials.csv and report.html.

    Without a choice it is that of the run's end or, where it has not ended, what is best so far.
    """
    run = read_run(out)
    so_far = {}
    if chosen is None or baselines is None:
        if has_ended(run.info):
            chosen, baselines = _stored_choice(run)
        else:
            chosen, baselines = _so_far(run)
            so_far = {"ended": "no: this is the best so far"}
    else:
        run.info["choice"] = {
            side: {str(context): dataclasses.asdict(configuration) for context, configuration in picked.items()}
            for side, picked in (("chosen", chosen), ("baselines", baselines))
        }
        _write(out / "run.json", run.info)
    policy = make_policy(
        run.records,
        chosen,
        baselines,
        workload=run.workload,
        budget=run.budget,
        model=run.info["identity"]["model"],
        drafts=run.info["identity"]["drafts"],
        environment=run.info.get("environment", {}),
        workload_info={
            **run.info["workload"],
            **run.info.get("text", {}),
            **{key: found for key, found in run.info.get("reference", {}).items() if key == "noise_floor"},
            "space": run.info["space"],
        },
        reloads=run.info.get("reloads", False),
    )
    if policy is not None:
        write_policy(policy, out / "policy.json")
    frame(run.records).to_csv(out / "trials.csv", index=False)
    shown = {key: value for key, value in run.info.items() if key not in ("identity", "choice")} | so_far
    data = RunData(
        records=run.records,
        workload=run.workload,
        budget=run.budget,
        policy=policy.model_dump(mode="json") if policy is not None else None,
        info=shown,
        importances=importances(storage_url(out, run.info), run.info["study"], run.workload.contexts),
    )
    write_report(data, out / "report.html")
    return policy
