"""What `flashsvd profile` is made of: the variants, how one is measured, and the result."""
