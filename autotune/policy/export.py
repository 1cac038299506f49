"""A policy for elsewhere: a Python file for stock transformers, and a table for a README.

Stock transformers cannot do all that a rule says; what it cannot is written beside what it does instead. Where it must
choose, memory comes first: the budget is hard, speed is not.
"""

from __future__ import annotations

from pathlib import Path

from .. import __version__
from ..config import HEAD_WEIGHTS, Configuration, mib
from .policy import Expected, Load, ModelInfo, Policy, Rule, Settings

_HEADER = '''\
"""Load and generate with stock transformers, as close to an autotune policy as that can.

Written by autotune {version} for {model}, budget {budget}.
The rates and footprints in the comments were measured with autotune's own engine, not with this file.

What stock transformers does otherwise:
{otherwise}
"""

import sys

import torch
from transformers import {imports}

MODEL = {path!r}
DEVICE = {device!r}
NEW_TOKENS = {new_tokens}

# What generate() is given for prompts of up to so many tokens; longer ones were not measured and are refused.
RULES = {{
{rules}
}}

{cap}tokenizer = AutoTokenizer.from_pretrained(MODEL{pinned})
model = AutoModelForCausalLM.from_pretrained(
    MODEL{pinned},
    device_map=DEVICE,
{arguments}
)
{assistant}

def generate(prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """The prompt's greedy continuation under the rule of its length."""
    inputs = tokenizer(prompt, return_tensors="pt").to(DEVICE)
    length = inputs["input_ids"].shape[1]
    limit = next((limit for limit in RULES if length <= limit), None)
    if limit is None:
        raise ValueError(f"the prompt has {{length}} tokens; the policy was measured up to {{max(RULES)}}")
    settings = dict(RULES[limit])
{draft}    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **settings)
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)


if __name__ == "__main__":
    print(generate(sys.argv[1] if len(sys.argv) > 1 else "def main():"))
'''

_CAP = """\
# The budget less {context} for the CUDA context: an allocation past it raises OutOfMemoryError.
torch.cuda.set_per_process_memory_fraction({left} / torch.cuda.get_device_properties(DEVICE).total_memory, DEVICE)

"""

_ASSISTANT = """
# Proposes tokens that the model verifies.
assistant = AutoModelForCausalLM.from_pretrained(
    {path!r}{pinned},
    device_map=DEVICE,
{arguments}
)
assistant.generation_config.num_assistant_tokens_schedule = "constant"
assistant.generation_config.assistant_confidence_threshold = 0.0  # always as many as the rule says
"""

_DRAFT = """\
    if depth := settings.pop("draft_depth", 0):
        assistant.generation_config.num_assistant_tokens = depth
        settings["assistant_model"] = assistant
        if assistant.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
            settings |= {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}  # they differ in padding
"""


def as_transformers(policy: Policy) -> str:
    """A Python file that needs torch and transformers (and bitsandbytes or optimum-quanto, where the weights do)."""
    load, device = policy.load_group, str(policy.environment.get("device_word", "cpu"))
    full_precision = str(policy.environment.get("full_precision", "bf16"))
    losses: dict[str, list[int]] = {}  # what is lost -> the rules that lose it
    rules, drafts = [], False
    for rule in policy.rules:
        configuration = policy.configuration(rule)
        if configuration.has_draft_model and configuration.draft != load.draft:  # it would have to be loaded for it
            configuration = configuration.replace(draft="none", depth=0)
        settings, lost = _generate_settings(configuration, device)
        drafts |= "draft_depth" in settings
        for text in lost:
            losses.setdefault(text, []).append(rule.max_context_tokens)
        expected = rule.expected
        rules.append(f"    # measured: {_rate(expected)} tokens/s, {mib(expected.peak_bytes)} at its peak")
        rules.append(f"    {rule.max_context_tokens}: {settings!r},")
    otherwise = _load_differences(policy, device)
    otherwise += [f"for prompts up to {', '.join(map(str, limits))}: {text}" for text, limits in losses.items()]
    words = [load.weights, load.draft_weights if drafts else "none"]
    configs = {"BitsAndBytesConfig": "bnb-", "QuantoConfig": "quanto-"}
    needed = [name for name, start in configs.items() if any(word.startswith(start) for word in words)]
    cap, base = "", int(policy.environment.get("base_bytes", 0))
    if device != "cpu":
        cap = _CAP.format(context=mib(base), left=policy.budget_bytes - base)
    assistant = ""
    if drafts:
        arguments = _load_arguments(load.draft_weights, load.attention, full_precision)
        path, pinned = _source(next((info for info in policy.drafts if info.path == load.draft), None), load.draft)
        assistant = _ASSISTANT.format(path=path, pinned=pinned, arguments=arguments)
    path, pinned = _source(policy.model, policy.model.path)
    return _HEADER.format(
        version=__version__,
        model=policy.model.revision or Path(policy.model.path).name,
        budget=mib(policy.budget_bytes),
        otherwise="\n".join(f"- {text}" for text in otherwise) or "- nothing",
        imports=", ".join(["AutoModelForCausalLM", "AutoTokenizer", *needed]),
        path=path,
        pinned=pinned,
        device=device,
        new_tokens=int(policy.workload.get("new_tokens", 128)),
        rules="\n".join(rules),
        cap=cap,
        arguments=_load_arguments(load.weights, load.attention, full_precision),
        assistant=assistant,
        draft=_DRAFT if drafts else "",
    )


def _source(info: ModelInfo | None, path: str) -> tuple[str, str]:
    """What from_pretrained is given: the hub's name with the commit where it is known, else the folder."""
    if info is None or info.revision is None:
        return path, ""
    name, _, commit = info.revision.partition("@")
    return name, f', revision="{commit}"'


def _load_arguments(weights: str, attention: str, full_precision: str) -> str:
    """The lines of from_pretrained that say how weights are stored and which attention runs."""
    dtype = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}
    lines = ['dtype="auto"' if weights == "checkpoint" else f"dtype={dtype.get(weights, dtype[full_precision])}"]
    lines.append(f'attn_implementation="{"sdpa" if attention == "split_kv" else attention}"')
    match weights:
        case "bnb-int8":
            lines.append("quantization_config=BitsAndBytesConfig(load_in_8bit=True)")
        case "bnb-nf4" | "bnb-fp4":
            lines.append(
                "quantization_config=BitsAndBytesConfig(\n"
                "        load_in_4bit=True,\n"
                f'        bnb_4bit_quant_type="{weights.removeprefix("bnb-")}",\n'
                "        bnb_4bit_use_double_quant=True,\n"
                f"        bnb_4bit_compute_dtype={dtype[full_precision]},\n"
                "    )"
            )
        case "quanto-int8" | "quanto-int4":
            lines.append(f'quantization_config=QuantoConfig(weights="{weights.removeprefix("quanto-")}")')
    return "\n".join(f"    {line}," for line in lines)


def _load_differences(policy: Policy, device: str) -> list[str]:
    """What stock transformers cannot do of the load group."""
    load, lost = policy.load_group, []
    if load.weights == "checkpoint":
        lost.append(
            "the quantized checkpoint needs its method's package (gptqmodel for GPTQ and AWQ), and runs its kernels"
        )
    if load.lm_head in HEAD_WEIGHTS:
        lost.append(f"lm_head stays unquantized, not {load.lm_head}: it holds more memory")
    if load.embeddings == "host":
        lost.append("embeddings are on the device, not in host memory: they hold more memory")
    if load.attention == "split_kv":
        lost.append("attention is sdpa; split_kv, which reads only what the cache holds, is autotune's own")
    if device != "cpu":
        lost.append("projections that read the same input are separate products, not merged into one")
        if load.weights == "quanto-int4":
            lost.append("int4 products are quanto's own layers")
    if any(rule.load for rule in policy.rules):
        lost.append("every rule runs on the longest rule's load, without reloading")
    if load.draft != "none" and all(rule.settings.draft != "model" for rule in policy.rules):
        lost.append("the draft model is not loaded: no rule uses it")
    return lost


def _generate_settings(configuration: Configuration, device: str) -> tuple[dict[str, object], list[str]]:
    """generate()'s arguments for a rule, and what is lost."""
    settings: dict[str, object] = {}
    lost: list[str] = []
    depth, cache = configuration.depth, configuration.cache
    if cache.startswith("quantized"):
        # stock raises in `crop`: quantized tokens cannot be rolled back
        if depth:
            lost.append(f"no speculation (depth {depth}): the quantized cache cannot be rolled back")
        depth = 0
        settings["cache_implementation"] = "quantized"
        match cache.removeprefix("quantized-"):
            case "4" | "2" as bits:
                settings["cache_config"] = {"backend": "quanto", "nbits": int(bits)}
                lost.append("each time 128 tokens are full the whole cache is quantized again, so its error grows")
            case "8":
                settings["cache_config"] = {"backend": "fp8"}
                lost.append("the cache is fp8 with one scale per layer, not 8-bit integers in groups of 64")
            case _:
                settings["cache_config"] = {"backend": "fp8"}
                lost.append("the fp8 cache has one scale per layer, from the prompt")
    elif cache == "static" and depth:
        lost.append("the cache grows (dynamic): assisted generation refuses a static one")
    elif cache in ("static", "offloaded"):
        settings["cache_implementation"] = cache
    if depth and configuration.draft == "prompt-lookup":
        settings |= {"prompt_lookup_num_tokens": depth, "max_matching_ngram_size": 3}
    elif depth:
        settings["draft_depth"] = depth
    if depth and configuration.speculation == "adaptive":
        lost.append(f"speculation is always {depth} tokens deep and does not adapt to what is accepted")
    if configuration.prefill_chunk and depth:
        lost.append(f"the prompt is prefilled whole, not in chunks of {configuration.prefill_chunk}: more memory")
    elif configuration.prefill_chunk:
        settings["prefill_chunk_size"] = configuration.prefill_chunk
    compiled = configuration.launch != "eager" and settings.get("cache_implementation") == "static"
    if configuration.launch == "graph":
        instead = "torch.compile launches the steps" if compiled else "every kernel is launched by itself"
        lost.append(f"no recorded CUDA graphs: {instead}")
    elif configuration.launch == "compile" and not compiled:
        lost.append("not compiled: stock compiles only with a static cache and no speculation")
    if not compiled:
        settings["disable_compile"] = True
    return settings, lost


_COLUMNS = ("prompt up to", "settings", "tokens/s", "baseline", "times the baseline", "peak of budget", "quality loss")


def as_markdown(policy: Policy) -> str:
    """A table with a row per rule: settings, rates, baseline, peak of the budget, quality loss; 95 % intervals."""
    info, environment = policy.model, policy.environment
    stock = {entry.context_tokens: entry for entry in policy.baseline}
    lines = [
        f"{info.revision or Path(info.path).name} on {environment.get('device', 'an unnamed device')}, budget "
        f"{mib(policy.budget_bytes)}, {policy.workload.get('new_tokens', '?')} new tokens a request. "
        f"Loaded once: {load_text(policy.load_group)}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rule in policy.rules:
        base = stock.get(rule.max_context_tokens)
        cells = [
            str(rule.max_context_tokens),
            settings_text(rule.settings) + (f"; loads {load_text(rule.load)}" if rule.load else ""),
            _rate(rule.expected),
            _rate(base.expected) if base else "does not fit",
            _speedup(rule),
            f"{mib(rule.expected.peak_bytes)} ({rule.expected.peak_bytes / policy.budget_bytes:.0%})",
            _loss(rule.expected) + task_text(rule.expected),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{library} {version}" for library, version in environment.get("versions", {}).items())
    return "\n".join([*lines, "", f"Intervals are 95 %. Measured with {versions or 'unknown versions'}.", ""])


def load_text(load: Load) -> str:
    """A load group for a person."""
    text = f"{load.weights} weights, {load.lm_head} lm_head, {load.attention} attention"
    text += ", embeddings in host memory" if load.embeddings == "host" else ""
    return text + (f", draft {Path(load.draft).name} in {load.draft_weights}" if load.draft != "none" else "")


def settings_text(settings: Settings) -> str:
    """A rule's settings for a person."""
    text = f"{settings.cache} cache, {settings.launch}"
    most = "up to " if settings.speculation == "adaptive" else ""
    text += f", {settings.draft} x {most}{settings.depth}" if settings.depth else ""
    return text + (f", chunks of {settings.prefill_chunk}" if settings.prefill_chunk else "")


def _rate(expected: Expected) -> str:
    interval = expected.tokens_per_s_interval
    return f"{expected.tokens_per_s:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def _speedup(rule: Rule) -> str:
    if rule.speedup is None:
        return "-"
    text = f"{rule.speedup:.2f}"
    if rule.speedup_interval is not None:
        text += " ({:.2f} to {:.2f})".format(*rule.speedup_interval)
    return text + (", a tie" if rule.tie else "")


def task_text(expected: Expected) -> str:
    """What a task's answers came to, after the quality loss, for a person; nothing where there was none."""
    if expected.task_f1 is None or expected.task_loss is None:
        return ""
    return f", F1 {expected.task_f1:.0%} ({-100 * expected.task_loss:+.1f} points)"


def _loss(expected: Expected) -> str:
    if expected.perplexity_ratio is None:
        return "not measured"
    text = f"{expected.perplexity_ratio - 1:+.2%}"
    if expected.perplexity_ratio_interval is not None:
        text += " ({:+.2%} to {:+.2%})".format(*(ratio - 1 for ratio in expected.perplexity_ratio_interval))
    return text
