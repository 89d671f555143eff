"""Profile a LLaMA that asvd compressed while it generates, on plain low-rank layers and on fused blocks."""

import sys

from flashsvd.scripts import compress_and_profile_script

COMPRESS = {"task": "wikitext2", "method": "asvd", "ratio": 0.5}

if __name__ == "__main__":
    sys.exit(
        compress_and_profile_script(
            __doc__,
            COMPRESS,
            variants="dense,low-rank,fused",
            batch_size=16,
            seq_len=384,
            new_tokens=128,
        )
    )
