"""A model on disk: what its files are called, hold and promise. Nothing here reads pictures or computes."""
