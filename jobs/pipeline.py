"""All stages in order: `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG [section.key=value ...]`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
