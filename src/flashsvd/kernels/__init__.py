"""Low-rank operators, one file each: the equation, a plain torch reference and, where there is one, the kernel."""
