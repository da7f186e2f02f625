"""Evaluation: predictions, accuracy and its intervals, benchmarks, the report."""
