"""A sweep over sweep.space: `ray job submit --working-dir . -- python jobs/sweep.py CONFIG [section.key=value ...]`."""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(abspath(__file__)))  # this folder's select.py must not stand for Python's own

from distill_at_scale.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
