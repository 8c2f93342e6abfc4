"""Data to train, calibrate and test on: drawn scenes and the readers of grounding sets."""
