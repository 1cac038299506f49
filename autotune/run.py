"""One run, from inputs to a policy: the story of the whole program in `tune`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from . import __version__
from .config import HEAD_WEIGHTS, Configuration, Record
from .model.fingerprint import fingerprint
from .model.refused import word_refusals
from .model.shape import ModelShape, read_shape
from .policy.choice import choose, settle
from .policy.policy import Policy, write_policy
from .policy.rules import make_policy
from .report.page import write_report
from .report.view import RunData
from .request import Request, check_budget, check_inputs
from .results import Run, RunError, frame, has_ended, read_info, read_records, read_run, storage_url
from .samples import joined
from .search.boundaries import boundaries
from .search.earlier import Earlier, earlier_runs, learnt_from
from .search.finals import FINAL_SHARE, finalists, measure_finals, reserve
from .search.foresight import Foresight
from .search.search import COMPARABLE, Search, coverage
from .search.space import Space, stock_configurations
from .search.study import Studies, importances
from .search.watch import Watch
from .trial.inputs import input_files, prepare_inputs, reference_facts, text_file
from .trial.process import WorkerFailed
from .trial.trials import Trials

# All chosen, not measured.
COMPLETING_S = 60  # seconds beyond the search's time: completing the winner is worth more than one more candidate
COMPLETING_SHARE = 0.1  # of --timeout, the most that completing it takes
_TRIAL_S = 600.0  # seconds that one measurement may take at most
_SURE = 0.8  # probability of fitting below which a baseline waits until more is known


def tune(request: Request, watch: Watch | None = None) -> Policy | None:
    """Search, measure the finalists again, choose; returns the policy that the run folder then holds.

    None where no configuration was feasible. KeyboardInterrupt ends the search; what was measured still makes a policy.
    Raises NothingFits before anything is measured, RunError and PlanError for inputs that cannot be used.
    """
    watch = watch or Watch()
    shapes = check_inputs(request)
    check_budget(request, shapes)
    info = _prepare_folder(request, watch)
    studies = Studies(_url(request), request.study, info["identity"], request.workload.contexts, request.seed)
    with Trials(str(request.model), request.workload, request.budget, request.out, watch.phase) as trials:
        try:
            info, space = _prepare(request, trials, info, watch)
            search = _search(request, space, shapes, studies, trials, info, watch)
            candidates = stock_configurations(info["environment"]["full_precision"], search.space)
            search.baseline(candidates, sure=_SURE)
            watch.note(_dropped(space))
            search.run()
            watch.note(coverage(search) + _ended(request, info, search))
            completing_s = min(COMPLETING_S, COMPLETING_SHARE * request.timeout_s)
            chosen, baselines = finalists(search, candidates, request.reloads, completing_s)
            end = request.started + request.timeout_s
            until = min(end, search.now() + FINAL_SHARE * request.timeout_s)
            measure_finals(search, trials, chosen, baselines, watch, until, end, request.reloads)
            standing = settle(
                read_records(_url(request), request.study), chosen, baselines, request.workload, request.reloads
            )
            until = end - info["reference"]["took_s"]
            chosen |= boundaries(search, trials, standing, until, _reference(info), watch)
        except KeyboardInterrupt:
            watch.note("stopped: finishing with what was measured")
            return conclude(request.out)
    return conclude(request.out, chosen, baselines)


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
            words["attention"].append(Configuration.attention)  # which the baseline takes, whatever the space has
            words = {knob: list(dict.fromkeys(asked)) for knob, asked in words.items()}
            info["failed"] = worker.request("probe", 900, words=words, model=str(request.model))
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
    drafts = [read_shape(draft) for draft in request.drafts]
    space = request.space.restrict(
        device=request.budget.device,
        full_precision=info["environment"]["full_precision"],
        drafts=[str(draft) for draft in request.drafts],
        sliding=any(layer.window for layer in shape.layers),
        quantized=shape.prequantized,
        failed=info["failed"],
        refused=word_refusals(shape, drafts),
    )
    return info, space


def _reference(info: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The reference's weights, and what decides its logits."""
    return info["reference"]["weights"], reference_facts(info["identity"], info["text"], info["environment"])


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
        search.deadline = end - reserve(search, request.reloads, request.timeout_s, info["reference"]["took_s"])
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
