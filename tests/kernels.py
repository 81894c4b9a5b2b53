"""The codec's kernels, compiled once on a machine, before the clock of any test runs: `python -m tests.kernels`."""

from zml.codec import kernels


def prepare() -> None:
    for module in (kernels.ENTRY, *kernels.ON_SHARDS, *kernels.ON_DEVICES):
        kernels.prepare(lambda text: print(f"{text} ..."), module)


if __name__ == "__main__":
    prepare()
