"""Benchmarks of semisparse: each run writes JSON, and cards and README figures are generated from it."""
