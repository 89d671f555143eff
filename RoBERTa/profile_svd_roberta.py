"""Profile a compressed RoBERTa on plain low-rank layers against its dense base."""

import sys

from flashsvd.scripts import compress_and_profile_script

COMPRESS = {"model": "textattack/roberta-base-SST-2", "task": "sst2", "ratio": 0.5}

if __name__ == "__main__":
    sys.exit(compress_and_profile_script(__doc__, COMPRESS, variants="dense,low-rank"))
