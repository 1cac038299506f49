"""One measurement, from outside (the process, its witness, its record) and from inside (the worker)."""
