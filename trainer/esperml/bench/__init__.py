"""Measurements of latency, each beside a floor measured in the same run."""
