"""Which configuration is chosen, the file that says so, its verification and its other forms."""
