"""`python -m flashsvd`."""

import sys

from flashsvd.cli import main

sys.exit(main())
