"""Profile a dense ModernBERT: as it is, on micro-batches, and compiled."""

import sys

from flashsvd.scripts import profile_script

if __name__ == "__main__":
    sys.exit(profile_script(__doc__, variants="dense,micro-batches,compiled"))
