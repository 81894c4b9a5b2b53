"""What `zml doctor` looks at, here and on machines that are not well."""

import os
import socket
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest

from zml import gpu
from zml.doctor import graphics, installed, machine, network, slurm, telling
from zml.doctor.findings import Check, worst
from zml.errors import NO_GPU, ZmlError


def no_such(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def fails_to_resolve(host: str) -> str:
    raise socket.gaierror(-2, "Name or service not known")


def test_this_machine_passes_every_check_that_the_tests_themselves_need(tmp_path: Path) -> None:
    checks = {check.name: check for check in machine.examine(tmp_path / "runs", {})}
    for name in (
        "python",
        "torch",
        "pyzmq",
        "msgpack",
        "uvloop",
        "libzmq",
        "event loop",
        "loopback",
        "fsync",
    ):
        assert checks[name].verdict in ("pass", "warn"), checks[name]
    assert checks.keys() >= {
        "zml", "open files", "processes", "shared memory", "disk", "clock", "host name", "listening", "MTU", "GPUs",
        "Slurm",
    }  # fmt: skip
    assert all(check.fix for check in checks.values() if check.verdict != "pass")
    assert not (tmp_path / "runs").exists()  # it looks and leaves nothing


def test_every_check_that_does_not_pass_has_something_to_do(tmp_path: Path) -> None:
    (tmp_path / "tun0").mkdir()
    (tmp_path / "tun0" / "operstate").write_text("unknown\n")
    (tmp_path / "tun0" / "mtu").write_text("1280\n")
    unwell = [
        installed.check_package("torch", (2, 4), no_such),
        installed.check_package("msgpack", (1, 2, 1), lambda name: "1.0.8"),
        installed.check_libzmq("4.3.4", "True"),
        installed.check_libzmq("4.3.5", "False"),
        *installed.check_libraries((sys.executable, "-c", "import nothing_of_this_name")),
        *installed.check_libraries((str(tmp_path / "nowhere"),)),
        installed.check_name(lambda name: "0.10.15"),
        machine.check_open_files((1024, 4096)),
        machine.check_processes(100),
        machine.check_shm(Path("/nowhere")),
        network.check_name_resolves(fails_to_resolve),
        network.check_bind(lambda: "192.0.2.77"),
        network.check_interfaces(tmp_path),
        network.check_clock(lambda: (network.TIME_ERROR, 0)),
        network.check_clock(lambda: (0, network.STA_UNSYNC)),
        graphics.check_driver("", "nvidia-smi has not answered for 20 s", "12.6"),
        slurm.check({"SLURM_JOB_ID": "7"}),
    ]
    assert [(check.name, check.verdict) for check in unwell] == [
        ("torch", "fail"),
        ("msgpack", "fail"),
        ("libzmq", "fail"),
        ("libzmq", "warn"),
        ("libraries", "fail"),
        ("libraries", "fail"),
        ("zml", "fail"),
        ("open files", "warn"),
        ("processes", "warn"),
        ("shared memory", "warn"),
        ("host name", "warn"),
        ("listening", "fail"),
        ("MTU", "warn"),
        ("clock", "warn"),
        ("clock", "warn"),
        ("GPU driver", "fail"),
        ("Slurm", "warn"),
    ]
    assert all(check.fix and check.found for check in unwell)
    assert worst(unwell) == "fail"


def test_another_package_called_zml_is_found_out() -> None:
    assert installed.check_name(no_such, lambda name: None).verdict == "pass"
    assert (
        installed.check_name(lambda name: "0.10.15").found
        == "another package called zml (0.10.15) is installed over this one"
    )


def test_a_script_called_zml_hides_the_package(tmp_path: Path) -> None:
    assert installed.check_name(no_such, lambda name: None, tmp_path).verdict == "pass"
    (tmp_path / "zml.py").touch()
    found = installed.check_name(no_such, lambda name: None, tmp_path)
    assert (found.verdict, found.found) == (
        "fail",
        f"{tmp_path}/zml.py hides this package from scripts beside it",
    )


def test_a_command_of_another_installation_is_a_warning(tmp_path: Path) -> None:
    command = tmp_path / "zml"
    for first, verdict in (("#!/nowhere/bin/python3", "warn"), (f"#!{sys.executable}", "pass")):
        command.write_text(f"{first}\n")
        assert installed.check_name(no_such, lambda name: str(command), tmp_path / "here").verdict == verdict


def test_a_local_version_is_as_good_as_its_release() -> None:
    assert installed.version("2.13.0+cpu") == (2, 13, 0)
    assert installed.version("27.0.0rc1") == (27, 0)
    assert installed.check_package("torch", (2, 4), lambda name: "2.13.0+cpu") == Check(
        "torch", "pass", "2.13.0+cpu"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    verdicts = {check.name: check.verdict for check in machine.check_disk(tmp_path / "runs")}
    tmp_path.chmod(0o700)
    assert verdicts["fsync"] == "fail"


def test_a_clock_that_is_kept_or_of_which_nothing_is_known_is_no_trouble() -> None:
    assert [network.check_clock(lambda: known).verdict for known in (None, (0, 0))] == ["pass", "pass"]  # noqa: B023


def test_a_machine_that_is_alone_is_well() -> None:
    assert network.check_bind(lambda: None).verdict == "pass"
    assert network.check_name_resolves(lambda host: "127.0.1.1").found.endswith(
        "which only this machine reaches"
    )


HEAD = """
| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |
"""


@pytest.mark.parametrize(
    ("cuda", "verdict", "found"),
    [
        ("12.6", "pass", "550.54.15, for CUDA 12.4; torch is built for CUDA 12.6"),
        ("13.0", "fail", "550.54.15, for CUDA 12.4; torch is built for CUDA 13.0"),
        ("", "pass", "550.54.15, for CUDA 12.4"),
        (None, "pass", "550.54.15, for CUDA 12.4"),
    ],
)
def test_a_driver_runs_what_is_built_for_its_cuda_and_the_minor_versions_of_it(
    cuda: str | None, verdict: str, found: str
) -> None:
    check = graphics.check_driver(HEAD, "", cuda)
    assert (check.verdict, check.found) == (verdict, found)


def test_gpus_that_this_torch_cannot_use_are_a_warning() -> None:
    assert graphics.check_gpus(GPUS, "").verdict == "warn"
    assert graphics.check_gpus(GPUS, "12.6") == Check(
        "GPUs", "pass", "0 NVIDIA H100 80GB HBM3 (80 GB), 1 NVIDIA A100 (40 GB), 3 Odd (0 GB)"
    )
    assert graphics.check_gpus([], "").verdict == "pass"


def test_what_torch_is_built_for_is_read_without_loading_it() -> None:
    import torch

    assert graphics.built_for() == (torch.version.cuda or "")


def test_a_slurm_job_is_complete_or_says_what_is_missing() -> None:
    whole = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_NNODES": "2"}
    there = lambda name: f"/usr/bin/{name}"  # noqa: E731
    assert slurm.check(whole, there) == Check("Slurm", "pass", "job 7 on 2 nodes: gpu[1-2]")
    assert slurm.check({}, there).found == "not inside a job"
    assert slurm.check({}, lambda name: None).found == "there is none here"
    assert slurm.check({**whole, "SLURM_NNODES": ""}, there).found == "job 7, but SLURM_NNODES is not set"
    assert slurm.check(whole, lambda name: None).found == "job 7, but there is no command srun"


def test_a_line_for_each_check_its_fix_below_and_a_count() -> None:
    checks = [Check("disk", "pass", "1 GB"), Check("clock", "warn", "nothing " * 12, "Start chrony.")]
    lines = list(telling.lines(checks, 60))
    assert lines[0] == "pass  disk            1 GB"
    assert lines[1].startswith("warn  clock           nothing") and lines[2].startswith(" " * 22 + "nothing")
    assert lines[-3:] == [" " * 22 + "Start chrony.", "", "1 passed, 1 warning, 0 failed"]
    assert all(len(line) <= 60 for line in lines)


SMI = "0, NVIDIA H100 80GB HBM3, 81559\n1, NVIDIA A100, 40960\nNo devices were found\n3, Odd, [N/A]\n"
GPUS = gpu.parse(SMI)


def test_gpus_are_read_from_nvidia_smi_and_other_lines_passed_over() -> None:
    assert GPUS == [
        gpu.Gpu(0, "NVIDIA H100 80GB HBM3", 81559),
        gpu.Gpu(1, "NVIDIA A100", 40960),
        gpu.Gpu(3, "Odd", 0),
    ]
    assert gpu.parse("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []


def test_a_gpu_that_is_not_there_is_an_error_that_says_which_are() -> None:
    assert gpu.device(1, GPUS) == "cuda:1"
    with pytest.raises(ZmlError) as caught:
        gpu.device(2, GPUS[:2])
    assert caught.value.code == NO_GPU
    assert caught.value.what == (
        "there is no GPU 2; this machine has 0 (NVIDIA H100 80GB HBM3, 80 GB), 1 (NVIDIA A100, 40 GB)"
    )
    with pytest.raises(ZmlError) as caught:
        gpu.device(0, [])
    assert (caught.value.what, caught.value.fix) == (
        "there is no GPU 0: nvidia-smi finds none here",
        "Use --cpu.",
    )


def test_workers_get_gpus_in_turn_of_those_that_may_be_seen() -> None:
    assert gpu.share_out(3, GPUS[:2], {}) == ["cuda:0", "cuda:1", "cuda:0"]
    assert gpu.share_out(2, GPUS, {"CUDA_VISIBLE_DEVICES": "3"}) == ["cuda:3", "cuda:3"]
    assert gpu.share_out(2, GPUS, {"CUDA_VISIBLE_DEVICES": ""}) == ["cpu", "cpu"]
    assert gpu.share_out(2, [], {}) == ["cpu", "cpu"]


def test_without_nvidia_smi_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.found() == []


def test_nvidia_smi_is_asked_and_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho failed\nexit 9\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu.found() == []
    (tmp_path / "answer").write_text(SMI)
    fake.write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n")
    assert gpu.found() == GPUS


def test_a_check_that_hangs_or_breaks_is_told_and_the_others_go_on() -> None:
    over = threading.Event()

    def hangs() -> Check:
        over.wait(60)
        return Check("disk", "pass", "at last")

    def breaks() -> Check:
        raise FileNotFoundError(2, "No such file or directory")

    try:
        assert machine.looked("disk", hangs, 0.01)[0].found == "no answer within 0.01 s"
    finally:
        over.set()
    (told,) = machine.looked("name", breaks)
    assert (told.name, told.verdict) == ("name", "fail") and "FileNotFoundError" in told.found
    assert machine.looked("bind", lambda: Check("bind", "pass", "")) == [Check("bind", "pass", "")]
