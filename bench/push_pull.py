"""How fast do gradients go and parameters come? Round trips of one worker with one shard that runs the optimizer.

    python bench/push_pull.py             64 KB, 1 MB and 16 MB, about two minutes

A whole job with a script whose model is one parameter and whose gradient is there already. What is timed is
`opt.step()`: it copies the gradient, pushes it, commits, waits until the shard has made a step of SGD with momentum,
pulls the parameters and writes them into the model. Uncompressed fp32; in sync, so that nothing of an exchange runs
beside the next one.

GB/s is the size of the parameters by the time of one round trip: as much goes and as much comes. MXNet's KVStore
(1.9.1, dist_async, one server, one worker, SGD on the server, tcp) made 0.67 GB/s at 1 MB counted in this way (median
of six; best 0.78), measured on a two-core machine; the target is three times that.

one machine   coordinator, shard and worker as `zml run` starts them: shared memory
tcp           the same over tcp on loopback, without shared memory and without keys
raw TCP       another process sends back what it has taken in whole; loopback, the same sizes in the same run
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click

HERE = Path(__file__).resolve().parent
KB, MB = 1 << 10, 1 << 20
SIZES = (64 * KB, MB, 16 * MB)
KVSTORE_GB_PER_S, TIMES = 0.67, 3.0
WARM_UP = 20
PATIENCE_S = 120
SCRIPT = "PUSH_PULL"  # in the environment of the script: {"size", "seconds", "file", "memory"}


# -- the script of the job ---------------------------------------------------------------------------------------


def round_trips(size: int, seconds: float, file: str, memory: bool) -> None:
    """Runs under zml: times optimizer steps, and leaves their seconds in the file."""
    from dataclasses import replace

    import torch

    import zml
    import zml.link

    if not memory:
        zml.link.BULK = replace(zml.link.BULK, slots=0)
    torch.set_num_threads(1)
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(size // 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    zml.join(model, optimizer, torch.utils.data.DataLoader(range(4)))  # type: ignore[arg-type]
    model.weight.grad = torch.randn(size // 4) * 1e-3
    Path(file).write_text(json.dumps(timed(optimizer.step, seconds)))


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call, for about so long, after a warm-up."""
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - begin)
    return times


# -- a job, and raw TCP ------------------------------------------------------------------------------------------


def job(size: int, seconds: float, memory: bool) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="zml-pp-") as folder:
        file = Path(folder, "seconds.json")
        order = {"size": size, "seconds": seconds, "file": str(file), "memory": memory}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
        path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"PYTHONPATH": path, SCRIPT: json.dumps(order), "OMP_NUM_THREADS": "1"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            at = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        bind = f"ipc://{folder}/p0" if memory else "tcp://127.0.0.1:0"
        roles = (
            ("coordinator", "--sync", "--bind", at, str(Path(__file__).resolve())),
            ("ps", "--shard", "0", "--bind", bind, "--coordinator", at),
            ("worker", "--cpu", "--coordinator", at),
        )
        output = Path(folder, "output.txt")
        with output.open("wb") as out:
            started = [
                subprocess.Popen(
                    [sys.executable, "-m", "zml", *role],
                    cwd=folder,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for role in roles
            ]
        try:
            codes = [process.wait(PATIENCE_S) for process in started]
        except subprocess.TimeoutExpired:
            codes = [1]
        finally:
            for process in started:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if any(codes):
            raise click.ClickException(f"the job failed:\n{output.read_text(errors='replace')}")
        times: list[float] = json.loads(file.read_text())
        return times


def echo(listener: socket.socket) -> None:
    """The other process of raw TCP: first the size, then each message back once it is here in whole."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(int.from_bytes(connection.recv(8), "little")))
    while fill(connection, buffer):
        connection.sendall(buffer)


def fill(connection: socket.socket, buffer: memoryview) -> bool:
    """Receive exactly so many bytes; false when there are no more."""
    taken = 0
    while taken < len(buffer):
        count = connection.recv_into(buffer[taken:])
        if not count:
            return False
        taken += count
    return True


def raw_tcp(size: int, seconds: float) -> list[float]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if not child:
            with suppress(OSError):
                echo(listener)
            os._exit(0)
        try:
            with socket.create_connection(listener.getsockname()) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(size.to_bytes(8, "little"))
                out, back = memoryview(bytearray(os.urandom(size))), memoryview(bytearray(size))
                return timed(lambda: (connection.sendall(out), fill(connection, back)), seconds)
        finally:
            os.waitpid(child, 0)


# -- the table ---------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[int, float], list[float]]] = {
    "raw TCP": raw_tcp,
    "zml, one machine": lambda size, seconds: job(size, seconds, True),
    "zml, tcp": lambda size, seconds: job(size, seconds, False),
}


def figures(times: list[float], size: int) -> dict[str, float]:
    quick = statistics.quantiles(times, n=10)[0]
    return {
        "gb_per_s": size / statistics.median(times) / 1e9,
        "gb_per_s_quick": size / quick / 1e9,
        "median_us": 1e6 * statistics.median(times),
        "round_trips": len(times),
    }


def label(size: int) -> str:
    return f"{size // MB} MB" if size >= MB else f"{size // KB} KB"


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of each measurement.")
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(seconds: float, repetitions: int, as_json: bool) -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        click.echo(
            f"other processes are busy here (load {load:.1f}): look at the fastest tenth, too", err=True
        )
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, way in WAYS.items():
        for size in SIZES:
            runs = [figures(way(size, seconds), size) for _ in range(repetitions)]
            found.setdefault(name, {})[size] = {
                key: (max if key == "gb_per_s_quick" else statistics.median)(run[key] for run in runs)
                for key in runs[0]
            }
    target = TIMES * KVSTORE_GB_PER_S
    if as_json:
        click.echo(json.dumps({"load_before": load, "target_gb_per_s": target, "found": found}))
        return
    click.echo(f"{'push, commit, pull':18}" + "".join(f"{label(size):>28}" for size in SIZES))
    click.echo(f"{'':18}" + f"{'us  GB/s (fastest tenth)':>28}" * len(SIZES))
    for name, by_size in found.items():
        cells = "".join(
            f"{f['median_us']:13,.0f}  {f['gb_per_s']:4.2f} ({f['gb_per_s_quick']:5.2f})".rjust(28)
            for f in by_size.values()
        )
        click.echo(f"{name:18}{cells}")
    for name in list(found)[1:]:
        value = found[name][MB]["gb_per_s"]
        verdict = "met" if value >= target else "MISSED"
        click.echo(
            f"{name} at 1 MB: {value:.2f} GB/s, {value / KVSTORE_GB_PER_S:.1f} x dist_async's "
            f"{KVSTORE_GB_PER_S} (>= {TIMES:g}: {verdict}), {value / found['raw TCP'][MB]['gb_per_s']:.2f} of raw TCP"
        )


if __name__ == "__main__":
    if SCRIPT in os.environ:
        round_trips(**json.loads(os.environ[SCRIPT]))
    else:
        main()
