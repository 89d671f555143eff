"""Fine-tuning on transformers' Trainer: what is trained, on what, towards what, and what is left behind."""
