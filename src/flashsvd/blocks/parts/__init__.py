"""The packed parts of a fused block: attention, feed-forward networks, norms, and how their weights are read."""
