"""Profile a compressed RoBERTa on plain low-rank layers against its dense base."""

import sys

from flashsvd.scripts import profile_script

if __name__ == "__main__":
    sys.exit(profile_script(__doc__, variants="dense,low-rank"))
