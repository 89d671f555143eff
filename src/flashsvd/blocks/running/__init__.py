"""How fused blocks run: packed tokens, chunks of layers, choices by measurement, CUDA graphs, and what is refused."""
