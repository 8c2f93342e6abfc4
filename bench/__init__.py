"""Latency and accuracy reports."""
