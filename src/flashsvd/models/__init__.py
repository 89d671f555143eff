"""The supported model families, one file each, and how their models are found, loaded and cast."""
