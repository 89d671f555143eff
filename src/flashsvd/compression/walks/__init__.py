"""A model compressed layer by layer: each is calibrated on what those before it give, and trained to do as it did."""
