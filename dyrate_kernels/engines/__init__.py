"""Inference engines that the policies run in, beside transformers' ``generate()``: one folder each."""
