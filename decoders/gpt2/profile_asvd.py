"""Profile a GPT-2 that asvd compressed, on plain low-rank layers, against its dense base."""

import sys

from flashsvd.scripts import compress_and_profile_script

COMPRESS = {"model": "openai-community/gpt2", "task": "wikitext2", "method": "asvd", "ratio": 0.5}

if __name__ == "__main__":
    sys.exit(compress_and_profile_script(__doc__, COMPRESS, variants="dense,low-rank"))
