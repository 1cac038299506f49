"""Which of transformers' attentions a model's class has, asked before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.auto_factory import _get_model_class

_FLAGS = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}  # of the class
_FLAGS |= {f"flash_attention_{version}": "_supports_flash_attn" for version in (2, 3)}


def lacks(folder: str | Path, attention: str) -> str:
    """Why the folder's model cannot run with this attention, or nothing."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    mapping = AutoModelForCausalLM._model_mapping
    if attention not in _FLAGS or type(config) not in mapping:  # loading it will say more
        return ""
    if getattr(_get_model_class(config, mapping), _FLAGS[attention]):
        return ""
    return f"transformers' {config.model_type} has no {attention}"


def usual_attention(folder: str | Path) -> str:
    """The attention that stock transformers takes where none is asked for."""
    return "eager" if lacks(folder, "sdpa") else "sdpa"
