"""The stage select alone: `ray job submit --working-dir . -- python jobs/select.py CONFIG [section.key=value ...]`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))
