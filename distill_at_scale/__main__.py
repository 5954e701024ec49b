"""`python -m distill_at_scale` is the command `distill-at-scale`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
