"""What `flashsvd eval` is made of: the timed loop, the kinds of job, predictions and metrics."""
