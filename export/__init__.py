"""Quantizing and packing models for edge machines."""
