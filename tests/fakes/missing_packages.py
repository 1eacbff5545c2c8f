"""Run code in a Python in which some packages are not installed."""

import subprocess
import sys

_WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_without(names: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code`; importing one of the packages `names` fails as if it had never been installed."""
    script = _WITHOUT.replace("{names}", repr(sorted(names))) + code
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
