"""Low-rank linear layers: their forms W ~ U V, what a checkpoint says of them, and how large they are."""
