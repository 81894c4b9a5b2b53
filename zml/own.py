"""Which files are zml's own: what stacks and log lines of a user's script are told apart by.

In a checkout two of its packages are links to folders beside it; both names of each count.
"""

import os
from pathlib import Path

_HERE = Path(__file__).parent
_PARTS = (_HERE, _HERE / "transport", _HERE / "scheduler")
FOLDERS = tuple(dict.fromkeys(f"{path}{os.sep}" for part in _PARTS for path in (part, part.resolve())))
"""Each ends with a separator: a file is ours where its path starts with one of them."""
