"""Loading a model tensor by tensor: the door."""

from .attentions import lacks, usual_attention
from .model import load_model
from .quantize import quantize_linear

__all__ = ["lacks", "load_model", "quantize_linear", "usual_attention"]
