"""All stages in order: `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG [section.key=value ...]`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the package comes from the uploaded working directory

from distill_at_scale.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
