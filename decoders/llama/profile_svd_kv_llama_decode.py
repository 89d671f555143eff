"""Profile a LLaMA that plain SVD compressed while it generates, with dense keys and values and with low-rank ones."""

import sys

from flashsvd.scripts import compress_and_profile_script

COMPRESS = {"task": "wikitext2", "ratio": 0.5}

if __name__ == "__main__":
    sys.exit(
        compress_and_profile_script(
            __doc__,
            COMPRESS,
            variants="dense,low-rank,fused",
            kv_cache="dense,auto,lowrank",
            batch_size=16,
            seq_len=384,
            new_tokens=128,
        )
    )
