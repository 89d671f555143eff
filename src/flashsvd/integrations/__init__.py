"""What loads our checkpoints, a file for each library."""
