"""One process of those whose programs are read: `python -m` this module.

How many devices it has is said by `XLA_FLAGS`. It prints one line of JSON for each row.
"""

import argparse
import json

from lwsam_bench.scaling import programs
from lwsam_bench.support import processes


def main() -> None:
    """Read the arguments, join the others, print the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--process-id", type=int, required=True)
    parser.add_argument("--num-processes", type=int, required=True)
    parser.add_argument("--methods", nargs="+", default=tuple(programs.METHODS))
    given = parser.parse_args()
    joined = processes.join(given.coordinator, given.process_id, given.num_processes)
    assert joined.mesh is not None
    for row in programs.rows(joined.mesh, tuple(given.methods)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
