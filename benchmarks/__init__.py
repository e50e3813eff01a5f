"""Benchmarks that need other libraries besides Crossdock; not part of the package."""
