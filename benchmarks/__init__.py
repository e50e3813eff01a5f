"""Benchmarks that need more than Crossdock; they are no part of the package."""
