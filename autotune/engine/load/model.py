"""Load a model tensor by tensor: each weight reaches the device alone and is quantized before the next one is read.

So the peak while loading is the final footprint and one tensor more, embeddings can stay in host memory without ever
visiting the device, and the same code serves a GPU and a CPU. Only safetensors are read. GPTQ and AWQ checkpoints keep
the 4 bits that they have; those of other methods go through transformers' own loader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from ...config import HEAD_WEIGHTS
from ...model.activations import MERGED
from ...model.folder import REFUSED, stop_tokens
from ...model.stored import Packing, UnreadablePacking, read_packing
from ..attention import register_split_kv
from ..embedding import lock_pages
from ..grouped import use_grouped
from ..linear import Merged, Slice, concatenated, siblings
from ..support import Unsupported, compute_dtype
from .packed import place_packed
from .place import name_of, place, replace, trim
from .quantize import as_linear, check_linear, quantize_linear, quantized_linears, source
from .tensors import Tensors


def load_model(
    folder: str | Path,
    *,
    weights: str = "bf16",
    lm_head: str = "bf16",
    embeddings: str = "device",
    attention: str = "sdpa",
    device: str = "cpu",
    merge: bool | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`, its linear layers stored as `weights` says.

    With `merge` (the default on a GPU), projections that read the same input become one product.
    Raises Unsupported for a combination that this model or machine cannot run.
    """
    if attention == "split_kv":
        register_split_kv(device)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type in REFUSED:
        raise Unsupported(f"{config.model_type} {REFUSED[config.model_type]}")
    dtype = compute_dtype(weights, device)
    packing = _check_quantized(config, weights, lm_head, embeddings)
    if weights == "checkpoint" and packing is None:
        return _load_as_stored(folder, attention, device)
    model = _empty_model(config, dtype, attention)
    stop = stop_tokens(Path(folder))
    if stop is not None:
        model.generation_config.eos_token_id = stop
    quantized = quantized_linears(model, weights)
    if weights not in ("bf16", "fp32", "checkpoint"):
        check_linear(model, weights)
    tensors = Tensors(Path(folder), model, packed=packing is not None)
    output = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))
    if tied and output is not None:  # by the config; a head with values of its own is not, as in transformers
        tied = not tensors.differ(f"{name_of(model, output)}.weight", f"{name_of(model, embedding)}.weight")
    groups = siblings(model) if (device != "cpu" if merge is None else merge) and weights in MERGED else {}
    groups = {name: group for name, group in groups.items() if len({tensors.packs(one) for one in group}) == 1}
    twins = _twins(model)
    modules = [(name, module) for name, module in model.named_modules() if name not in twins]
    shared = tied and lm_head in ("bf16", "fp32") and embeddings == "device"
    if output is not None and not shared:
        # first, while the device is empty: it is the largest matrix, and quantizing it takes it whole
        name = name_of(model, output)
        if packing is not None and tensors.packs(name):
            place_packed(model, (name,), tensors, packing, dtype, device)
        else:
            word = HEAD_WEIGHTS.get(lm_head, lm_head)
            place(output, name, tensors, dtype, source(word, device))
            if tied:  # that was its bias
                place(output, name_of(model, embedding), tensors, dtype, source(word, device))
            replace(model, name, quantize_linear(output, word, device))
        trim(device)
    for name, module in modules:
        if module is output:
            continue
        if packing is not None and tensors.packs(name):
            group = groups.get(name, (name,))
            if name == group[-1]:
                place_packed(model, group, tensors, packing, dtype, device)
                trim(device)
            continue
        on_host = (module is embedding and embeddings == "host") or name in groups
        on_host = on_host or (name in quantized and source(weights, device) == "cpu")
        place(module, name, tensors, dtype, "cpu" if on_host else device)
        if name in groups:
            if name == groups[name][-1]:
                _merge(model, groups[name], weights, device)
        elif name in quantized:
            linear = as_linear(module)
            assert linear is not None
            if linear is not module:
                module.weight = None  # the linear layer has it, or a copy
            replace(model, name, quantize_linear(linear, weights, device))
            trim(device)
    if output is not None and shared:
        place(output, name_of(model, output), tensors, dtype, device)  # its bias
        output.weight = embedding.weight
    for name, original in twins.items():
        replace(model, name, model.get_submodule(original))
    leftovers = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if leftovers:
        raise Unsupported(f"the checkpoint has no tensor for {leftovers[0]} ({len(leftovers)} missing in all)")
    if embeddings == "host" and device != "cpu":
        lock_pages(embedding, device)
    if device == "cpu" and dtype == torch.bfloat16:
        use_grouped(model)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _twins(model: PreTrainedModel) -> dict[str, str]:
    """The modules, by name, whose weights are those of another: the other's name. The lm_head is not meant."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    output = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        originals = {
            tied.get(f"{name}.{key}", "").rpartition(".")[0] for key, _ in module.named_parameters(recurse=False)
        }
        if module is not output and len(originals) == 1 and "" not in originals:
            found[name] = originals.pop()
    return found


def _merge(model: nn.Module, names: tuple[str, ...], weights: str, device: str) -> None:
    """Put one product in the place of several layers, whose weights are in host memory."""
    layers = [model.get_submodule(name) for name in names]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    whole = quantize_linear(concatenated(linears, source(weights, device)), weights, device)
    for linear in linears:
        linear.weight = None  # type: ignore[assignment]
    merged = Merged(whole, [linear.out_features for linear in linears])
    for index, name in enumerate(names):
        replace(model, name, Slice(merged, index))


def _empty_model(config: Any, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    from accelerate import init_empty_weights

    text = _text_tower(config)
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config if text is None else text, dtype=dtype, attn_implementation=attention
            )
    except (ImportError, ValueError) as error:  # transformers' words for an attention that this model or machine lacks
        raise Unsupported(str(error)) from error
    if text is not None:  # the whole model's config has the tokens that end a text
        model.generation_config = GenerationConfig.from_model_config(config)
    return model


def _text_tower(config: Any) -> Any:
    """The config of a multimodal model's text tower, where that is a model of its own; else None.

    It is tied as stock ties it: by the whole model's config, but where transformers loads the tower alone as well.
    """
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    own: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if own is None or own.config_class is not type(text):
        text.tie_word_embeddings = config.tie_word_embeddings
    return text


def _check_quantized(config: Any, weights: str, lm_head: str, embeddings: str) -> Packing | None:
    """How the checkpoint packs its layers, if it does. Raises Unsupported where `weights` is for another checkpoint."""
    quantization = getattr(config, "quantization_config", None)
    if weights != "checkpoint":
        if quantization is not None:
            raise Unsupported("the checkpoint is already quantized: only weights = checkpoint can load it")
        return None
    if quantization is None:
        raise Unsupported("weights = checkpoint is for checkpoints that are already quantized; this one is not")
    if lm_head not in ("bf16", "fp32") or embeddings != "device":
        raise Unsupported("a checkpoint that is already quantized keeps its own lm_head and embeddings")
    try:
        return read_packing(quantization)
    except UnreadablePacking as error:
        raise Unsupported(str(error)) from error


def _load_as_stored(folder: str | Path, attention: str, device: str) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": device}, attn_implementation=attention, use_safetensors=True, local_files_only=True
        )
    except ImportError as error:  # the method's own package is not installed
        raise Unsupported(str(error)) from error
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]
