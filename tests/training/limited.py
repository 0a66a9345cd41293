"""Run a script with little memory: ``limited.py MEGABYTES SCRIPT ARGUMENT...`` leaves it so much for data.

Linux alone. What the script imports is not counted.
"""

import re
import resource
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script with a limit on the data of its process."""
    megabytes, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="imported")
    (used,) = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    limit = int(used) * 1024 + int(megabytes) * 10**6
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
