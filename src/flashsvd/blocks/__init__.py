"""Fused blocks in the place of transformers' layers, one file an architecture."""
