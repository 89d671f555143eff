"""Profile a compressed BERT on fused blocks against plain low-rank layers and its dense base."""

import sys

from flashsvd.scripts import profile_script

if __name__ == "__main__":
    sys.exit(profile_script(__doc__, variants="dense,low-rank,fused"))
