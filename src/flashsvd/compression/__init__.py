"""Compressing a model: what was asked for, the steps of doing it, and what came of it."""
