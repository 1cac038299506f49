"""Which configurations are looked at, in which order, and when that is enough."""
