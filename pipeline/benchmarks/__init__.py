"""Benchmarks of operators, steps and ranks, and the scaling model."""
