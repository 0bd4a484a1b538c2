"""Benchmarks: scripts and what they share; nothing of it is installed."""
