"""Importing this makes `zml` importable from the checkout that this file is in, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
