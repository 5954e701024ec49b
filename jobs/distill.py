"""The stage distill alone: `ray job submit --working-dir . -- python jobs/distill.py CONFIG [section.key=value ...]`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
