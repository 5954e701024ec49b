"""`python -m distill_at_scale` is the command `distill-at-scale`."""

import sys

from distill_at_scale.cli import main

sys.exit(main())
