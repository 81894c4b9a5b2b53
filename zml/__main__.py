"""The executable: `zml` and `python -m zml`."""

import gc
import os
import sys


def main() -> int:
    if "ZML_PARENT" in os.environ:  # a launcher started us: see launch/tether.py
        from .launch import tether

        tether.hold()
    from .commands.cli import run

    code = run(sys.argv[1:])
    gc.freeze()  # or Python looks through all that torch has brought, several times, before it ends
    return code


if __name__ == "__main__":
    sys.exit(main())
