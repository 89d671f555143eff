"""What one thread of a process does on its GPUs at a time."""

from __future__ import annotations

import threading

# Measuring, and capturing a graph, at whose beginning torch waits for the whole device, which nobody may do in the
# middle of another capture. A capture measures what it comes upon first. Other threads' forwards go on. Whoever takes
# this and a model's own lock takes this first: within it a model's forward may come upon another model, and its lock.
one_at_a_time = threading.RLock()
