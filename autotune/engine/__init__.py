"""Run a transformers decoder model with any combination of knobs: the engine that is measured and deployed."""
