"""For `PYTHONPATH`, of processes that train; what it is good for is told in `sitecustomize`."""

import os
from pathlib import Path

PYTHONPATH = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
