"""Tensors in, tensors out: the arithmetic of masks. Imports nothing but torch."""
