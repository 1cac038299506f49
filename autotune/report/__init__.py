"""What a person reads: the page of a run, its progress, and the plan's table."""
