"""The codec's kernels, compiled before they are needed: on a machine's first sparse job that takes half a minute."""

import sys

NOTICE = "zml: "  # how a line begins that a launcher is to show


def compile_kernels() -> None:
    """Or load them, where they were compiled before."""
    from .codec import kernels

    def say(text: str) -> None:
        print(f"{NOTICE}{text}", file=sys.stderr, flush=True)

    for module in (kernels.ENTRY, *kernels.ON_SHARDS):
        kernels.prepare(say, module)
