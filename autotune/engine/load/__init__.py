"""Loading a model tensor by tensor: the door."""

from .model import load_model
from .quantize import quantize_linear

__all__ = ["load_model", "quantize_linear"]
