"""The executable: `zml` and `python -m zml`."""

import os
import sys


def main() -> int:
    if "ZML_PARENT" in os.environ:  # a launcher started us: see launch/tether.py
        from .launch import tether

        tether.hold()
    from .commands.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
