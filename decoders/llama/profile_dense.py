"""Profile a dense LLaMA on running text: as it is, on micro-batches, and compiled."""

import sys

from flashsvd.scripts import profile_script

if __name__ == "__main__":
    sys.exit(profile_script(__doc__, task="wikitext2", variants="dense,micro-batches,compiled"))
