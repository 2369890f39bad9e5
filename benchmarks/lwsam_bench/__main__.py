"""Run the command line as `python -m lwsam_bench`."""

import sys

from lwsam_bench.commands.cli import main


if __name__ == "__main__":
    sys.exit(main())
