"""Run any Hugging Face model as fast as it can go inside a hard VRAM budget."""
