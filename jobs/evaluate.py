"""The stage evaluate alone: `ray job submit --working-dir . -- python jobs/evaluate.py CONFIG [section.key=value ...]`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
