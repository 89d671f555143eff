"""Profile a dense BERT: as it is, on micro-batches, and compiled."""

import sys

from flashsvd.scripts import profile_script

if __name__ == "__main__":
    sys.exit(
        profile_script(
            __doc__,
            checkpoint="textattack/bert-base-uncased-SST-2",
            task="sst2",
            variants="dense,micro-batches,compiled",
        )
    )
