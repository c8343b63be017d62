"""`python -m trainer CONFIG`: `winnow train` without the figures that need the subject model."""

import sys
from pathlib import Path

# `-m` puts the working directory first, where a `store.py` of the user's would be taken for ours.
_HOME = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and not sys.flags.safe_path and Path(sys.path[0]).resolve() != _HOME:
    del sys.path[0]

from winnow.cli.train import make_app

if __name__ == "__main__":
    make_app()()
