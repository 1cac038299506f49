"""A policy deployed: from Python, and as OpenAI's API."""
