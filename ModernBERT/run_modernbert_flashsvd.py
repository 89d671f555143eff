"""Profile a compressed ModernBERT on fused blocks against plain low-rank layers and its dense base."""

import sys

from flashsvd.scripts import compress_and_profile_script

COMPRESS = {"task": "sst2", "ratio": 0.5, "qkv": "per-head"}

if __name__ == "__main__":
    sys.exit(compress_and_profile_script(__doc__, COMPRESS, variants="dense,low-rank,fused"))
