"""What `zml doctor` looks at, here and on machines that are not well."""

import os
import socket
from importlib import metadata
from pathlib import Path

import pytest

from zml import doctor, gpu
from zml.doctor import Check
from zml.errors import NO_GPU, ZmlError


def no_such(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_this_machine_passes_every_check_that_the_tests_themselves_need(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.examine(tmp_path / "runs")}
    for name in ("python", "torch", "pyzmq", "msgpack", "uvloop", "libzmq", "loopback", "fsync"):
        assert checks[name].verdict in ("pass", "warn"), checks[name]
    assert {"zml", "open files", "shared memory", "disk", "host name", "GPUs"} <= checks.keys()
    assert not (tmp_path / "runs").exists()  # it looks and leaves nothing


def test_every_check_that_does_not_pass_has_something_to_do() -> None:
    unwell = [
        doctor.check_package("torch", (2, 4), no_such),
        doctor.check_package("msgpack", (1, 2, 1), lambda name: "1.0.8"),
        doctor.check_name(lambda name: "0.10.15"),
        doctor.check_open_files((1024, 4096)),
        doctor.check_shm(Path("/nowhere")),
        doctor.check_name_resolves(fails_to_resolve),
    ]
    assert [(check.name, check.verdict) for check in unwell] == [
        ("torch", "fail"),
        ("msgpack", "fail"),
        ("zml", "fail"),
        ("open files", "warn"),
        ("shared memory", "warn"),
        ("host name", "warn"),
    ]
    assert all(check.fix and check.found for check in unwell)


def fails_to_resolve(host: str) -> str:
    raise socket.gaierror(-2, "Name or service not known")


def test_another_package_called_zml_is_found_out() -> None:
    assert doctor.check_name(no_such).verdict == "pass"
    assert (
        doctor.check_name(lambda name: "0.10.15").found
        == "another package called zml (0.10.15) is installed over this one"
    )


def test_a_local_version_is_as_good_as_its_release() -> None:
    assert doctor.version("2.13.0+cpu") == (2, 13, 0)
    assert doctor.version("27.0.0rc1") == (27, 0)
    assert doctor.check_package("torch", (2, 4), lambda name: "2.13.0+cpu") == Check(
        "torch", "pass", "2.13.0+cpu"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    verdicts = {check.name: check.verdict for check in doctor.check_disk(tmp_path / "runs")}
    tmp_path.chmod(0o700)
    assert verdicts["fsync"] == "fail"


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
