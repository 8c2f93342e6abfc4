"""Latency: this engine and its peers on the same pictures, beside the machine's ceilings."""
