"""The stage ingest alone: `ray job submit --working-dir . -- python jobs/ingest.py CONFIG [section.key=value ...]`."""

import sys

from distill_at_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
