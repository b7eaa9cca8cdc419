"""`python -m rst_fused`: the same as the command `rst-fused`."""

import sys

from rst_fused.cli import main

sys.exit(main())
