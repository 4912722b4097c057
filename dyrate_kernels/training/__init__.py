"""Training: the bundled model (``python -m dyrate_kernels.training.demo``)."""
