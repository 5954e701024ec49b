"""The stage score alone: `ray job submit --working-dir . -- python jobs/score.py CONFIG [section.key=value ...]`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
