"""Accuracy on grounding benchmarks: published protocols, answers from anywhere, runs that resume, pairs of runs."""
