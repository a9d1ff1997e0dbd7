"""Measurements against raw limits and against other projects; ``python -m benchmarks`` runs all of them."""
