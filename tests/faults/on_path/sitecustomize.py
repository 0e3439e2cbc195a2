"""Python imports this at its start where this directory is on PYTHONPATH: faults for ranks that a launcher starts."""

import os
import sys
from pathlib import Path

if "RANK" in os.environ:
    sys.path.append(str(Path(__file__).parents[1]))
    from injection import inject

    inject()
