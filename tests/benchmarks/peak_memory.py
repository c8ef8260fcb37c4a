"""Run a command and print its wall time and the peak memory of its largest process.

python tests/benchmarks/peak_memory.py python run_mlm.py configs/quickstart.json
"""

import resource
import subprocess
import sys
import time


def main():
    """Run the command line that follows and exit with its status."""
    start = time.perf_counter()
    status = subprocess.run(sys.argv[1:]).returncode
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s, peak memory {peak:.2f} GiB", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
