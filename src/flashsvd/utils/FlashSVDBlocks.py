"""Home of the fused blocks under the import path existing users know; no fused block is shipped yet."""

__all__: list[str] = []
