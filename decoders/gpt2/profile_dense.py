"""Profile a dense GPT-2 on running text: as it is, on micro-batches, and compiled."""

import sys

from flashsvd.scripts import profile_script

if __name__ == "__main__":
    sys.exit(
        profile_script(
            __doc__, checkpoint="openai-community/gpt2", task="wikitext2", variants="dense,micro-batches,compiled"
        )
    )
