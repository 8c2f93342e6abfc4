"""Training: the recipe of the embedded model, from nothing to runtime/nano.mig."""
