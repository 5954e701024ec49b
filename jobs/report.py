"""The stage report alone: `ray job submit --working-dir . -- python jobs/report.py CONFIG [section.key=value ...]`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
