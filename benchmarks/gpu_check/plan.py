"""List the steps of the check for a machine, the most important first.

- Section a: the machine and its tests.
- Section b: correctness, compared with a CPU.
- Section c: speed and memory of one device.
- Section d: several devices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from benchmarks.gpu_check.readings import read_curve_of, read_doctor, read_profile, read_result, read_tests
from benchmarks.gpu_check.steps import Figures, Stage, Step
from benchmarks.planned_memory import Setting as MemorySetting
from benchmarks.train_command import PeerCommand
from benchmarks.train_setting import Setting
from tests.support.runs import (
    BACKENDS,
    PYTHON_PATH,
    REPOSITORY,
    TINY_BYTE_RUN,
    TINY_RUN,
    TRAIN,
    Sections,
    merged,
    ranks_command,
    train_arguments,
)

PRECISIONS = ("fp32", "amp_bf16", "amp_fp16", "bf16")
OFFLOAD = ("zero2_offload", "zero3_offload")
PEERS = ("transformers-loop", "transformers-trainer")
VARIANTS = ("ddp-blocks", "ddp-muon")  # the loss in blocks of the vocabulary, and another optimizer
PROFILED = ("ddp", "fsdp", "zero1")
CURVE_STEPS, PROFILED_STEPS = 30, 3
SEQUENCES_PER_STEP = 8

#: Head size and lengths for which fused attention kernels exist. 64 tokens are one block of keys. In the backward pass
#: of one block, the order of additions is fixed.
CURVE_MODEL = {"n_layer": 2, "n_head": 3, "n_embd": 192, "context_length": 64}

#: Least memory of the device in GiB -> sequences in a micro-batch of GPT-2 124M with 1,024 tokens. transformers needs
#: more memory than this project, because its logits are in fp32.
MICRO_BATCHES = {100: 64, 70: 32, 38: 16, 20: 8, 0: 4}

BESIDE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}  # for steps that share the cores

STAGE_TITLES = {"a": "machine and tests", "b": "correctness", "c": "speed and memory", "d": "several devices"}

#: A rehearsal on a CPU may run beside other programs, so its steps may take this many times as long.
PATIENCE = 5


def patient(step: Step) -> Step:
    """Return the step with a longer time limit, for a rehearsal on a CPU."""
    return replace(step, limit_s=PATIENCE * step.limit_s)


@dataclass(frozen=True)
class Check:
    """Builds the stages for one machine.

    Args:
        folder: each step writes to a subfolder with the name of the step.
        machine: the figures of the step ``machine``.
    """

    folder: Path
    machine: Figures
    peer_commands: Sequence[PeerCommand] = ()

    @property
    def on_gpu(self) -> bool:
        """Return whether the check runs on a GPU. Otherwise, all sizes are tiny."""
        return bool(self.machine["device_type"] == "cuda")

    @property
    def processes(self) -> int:
        """Return the number of ranks in section d: one per GPU, but at least two."""
        return max(2, int(self.machine["devices"]))

    @property
    def curve_processes(self) -> int:
        """Return the largest number of ranks among which the sequences of a step can be divided."""
        return max(ranks for ranks in (2, 4, 8) if ranks <= self.processes)

    def stages(self) -> list[Stage]:
        # The exact comparison, and what runs use by default.
        first = [*product(BACKENDS, ("fp32",), (False,)), *product(BACKENDS, ("amp_bf16", "bf16"), (True,))]
        others = [case for case in product(BACKENDS, PRECISIONS, (False, True)) if case not in first]
        resumed = [self.resumed(*case) for case in product(("ddp", "fsdp", "zero1"), (False, True))]
        moved = [self.moved(backend) for backend in ("ddp", "fsdp", "zero2")]
        offload = [self.curve(backend, "fp32", False) for backend in OFFLOAD]
        several = self.several_curves()
        stages = [
            Stage("a", [self.data()], alone=False),
            Stage("a", [self.reference(), self.doctor(), *self.gpu_tests()], alone=False),
            Stage("b", [*self.curves(first), self.inference(), *moved], alone=False),
            Stage("c", [self.ceilings("first"), self.speed("ddp"), self.generation(), self.speed("fsdp")], alone=True),
            Stage("c", [self.memory(name) for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")], alone=True),
            Stage("b", [*resumed, *offload, *self.curves(others)], alone=False),
            Stage("c", [self.profile("ddp"), *map(self.speed, ("zero1", *PEERS, *VARIANTS))], alone=True),
            Stage("c", [self.peer(command) for command in self.peer_commands], alone=True),
            Stage("c", [*map(self.speed, ("zero2", "zero3", "zero0")), self.ceilings("last")], alone=True),
            Stage("d", several[: len(BACKENDS)], alone=True),
            Stage("d", self.several_speeds(), alone=True),
            Stage("d", several[len(BACKENDS) :], alone=True),
        ]
        if self.on_gpu:
            return stages
        return [replace(stage, steps=[patient(step) for step in stage.steps]) for stage in stages]

    # a: the machine and its tests

    def data(self) -> Step:
        command = self._module("data", self.machine["device_type"], str(self._at("data")))
        return Step("data", command, lambda _: {}, 180, 10, environment=self._environment(BESIDE))

    def reference(self) -> Step:
        """Return the reference for all curves: the run on one CPU process in fp32."""
        sections = merged(self.curve_sections("fp32", compiled=False, processes=1), {"run": {"device": "cpu"}})
        run = self._at("reference") / "run"
        command = ranks_command(1, TRAIN, train_arguments("ddp", run, sections))
        read = read_curve_of(run, run, "fp32")
        return Step("reference", command, read, 240, 10, environment=self._environment(BESIDE))

    def doctor(self) -> Step:
        command = [sys.executable, str(REPOSITORY / "launch" / "doctor.py"), "--json", "--thorough"]
        command += ["--folder", str(self.folder)]
        return Step("doctor", command, read_doctor, 240, 20, environment=self._environment(BESIDE))

    def gpu_tests(self) -> list[Step]:
        steps = []
        tests = REPOSITORY / "tests"
        for path in sorted(tests.rglob("test_*.py")):
            if "pytest.mark.gpu" not in path.read_text(encoding="utf-8"):
                continue
            name = f"tests {path.relative_to(tests).with_suffix('')}".replace("/", ".")
            report = self._at(name) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider"]
            command += [f"--junitxml={report}", str(path)]
            why = self._lacking("pytest") if self.on_gpu else "these tests need a GPU"
            steps.append(Step(name, command, read_tests, 240, 15, why, self._environment(BESIDE)))
        return steps

    # b: correctness

    def curve_sections(self, precision: str, *, compiled: bool, processes: int) -> Sections:
        micro_batch = max(1, min(2, SEQUENCES_PER_STEP // processes))
        batch = {"tokens_per_step": SEQUENCES_PER_STEP * CURVE_MODEL["context_length"], "micro_batch_size": micro_batch}
        return merged(
            TINY_RUN if self.on_gpu else TINY_BYTE_RUN,
            {
                "run": {"device": self.machine["device_type"], "precision": precision, "compile": compiled},
                "model": CURVE_MODEL,
                "data": {"path": str(self._at("data") / "curves")},
                "batch": batch,
                "optimizer": {"learning_rate": 3e-4},  # at 1e-3, differences from rounding grow tenfold on the way
                "schedule": {"max_steps": CURVE_STEPS},
                "checkpoint": {"every_steps": 10, "keep_last": 3},
                "evaluation": {"tasks": []},
            },
        )

    def curves(self, cases: Sequence[tuple[str, str, bool]]) -> list[Step]:
        return [self.curve(*case) for case in cases]

    def curve(self, backend: str, precision: str, compiled: bool, processes: int = 1) -> Step:
        """Return a step that trains a run. The loss curve must agree with the reference."""
        how = "compiled" if compiled else "eager"
        name = f"curve {backend} {precision} {how}" + (f" x{processes}" if processes > 1 else "")
        run = self._at(name) / "run"
        sections = self.curve_sections(precision, compiled=compiled, processes=processes)
        command = ranks_command(processes, TRAIN, train_arguments(backend, run, sections))
        read = read_curve_of(run, self._at("reference") / "run", precision, keep_checkpoints=False)
        why = self._lacking_for(backend)
        return Step(name, command, read, 240, 40 if compiled else 15, why, self._environment(BESIDE))

    def resumed(self, backend: str, compiled: bool) -> Step:
        name = f"resume {backend} {'compiled' if compiled else 'eager'}"
        sections = self.curve_sections("fp32", compiled=compiled, processes=1)
        return self._sequence(name, "resumed", backend, sections)

    def moved(self, backend: str) -> Step:
        sections = self.curve_sections("fp32", compiled=False, processes=1)
        return self._sequence(f"move {backend}", "moved", backend, sections, str(self._at("reference") / "run"))

    def _sequence(self, name: str, kind: str, backend: str, sections: Sections, *rest: str) -> Step:
        folder = self._at(name)
        command = self._module("sequences", kind, backend, json.dumps(sections), str(folder), *rest)
        why = self._lacking_for(backend)
        return Step(name, command, read_result, 300, 40, why, self._environment(BESIDE))

    def inference(self) -> Step:
        source, data = self._at("reference") / "run", self._at("data") / "curves"
        out = self._at("inference") / "result.json"
        command = self._module("inference", self.machine["device_type"], str(source), str(data), str(out))
        return Step("inference", command, read_result, 120, 15, environment=self._environment(BESIDE))

    # c: speed and memory

    def speed_setting(self, processes: int = 1) -> Setting:
        """Return GPT-2 124M with 1,024 tokens on a GPU, and a tiny model on a CPU."""
        tiny = Setting(
            data=str(self._at("data") / "speed"),
            n_layer=2,
            n_head=2,
            n_embd=64,
            seq_len=64,
            micro_batch_size=2,
            processes=processes,
            device=self.machine["device_type"],
            precision="bf16",
            steps=8,
            warmup_steps=4,
            steps_per_row=1,
        )
        if not self.on_gpu:
            return tiny
        memory_gib = self.machine["memory_gib"]
        micro_batch = next(size for least, size in MICRO_BATCHES.items() if memory_gib >= least)
        gpt2 = replace(tiny, n_layer=12, n_head=12, n_embd=768, seq_len=1024, micro_batch_size=micro_batch)
        gentle = 1e-4  # with 6e-4, the loss of such a short warm-up jumps, and rounding moves the jump to another step
        return replace(gpt2, steps=50, warmup_steps=10, steps_per_row=5, learning_rate=gentle)

    def ceilings(self, when: str, processes: int = 1) -> Step:
        return self._measurement(f"ceilings {when}", "ceilings", processes, usual_s=15)

    def speed(self, contender: str, processes: int = 1) -> Step:
        return self._measurement(f"speed {contender}", contender, processes)

    def peer(self, command: PeerCommand, processes: int = 1) -> Step:
        return self._measurement(f"speed {command.name}", f"{command.name}={command.template}", processes)

    def _measurement(self, name: str, contender: str, processes: int, usual_s: float = 45) -> Step:
        ranks = f" x{processes}" if processes > 1 else ""
        out = self._at(name + ranks) / "result.json"
        command = self._module("speed", self.speed_setting(processes).to_json(), str(out), contender)
        if name.startswith("speed") and contender != "ddp":
            command.append(str(self._at(f"speed ddp{ranks}") / "result.json"))
        why = self._lacking("transformers") if contender in PEERS else self._lacking_for(contender)
        return Step(name + ranks, command, read_result, 240, usual_s, why, self._environment())

    def profile(self, backend: str, processes: int = 1) -> Step:
        name = f"profile {backend}" + (f" x{processes}" if processes > 1 else "")
        run = self._at(name) / "run"
        setting = replace(self.speed_setting(processes), steps=PROFILED_STEPS + 8)
        sections = merged(setting.sections(), {"logging": {"profile_steps": PROFILED_STEPS}})
        command = ranks_command(processes, TRAIN, train_arguments(backend, run, sections))
        why = self._lacking_for(backend)
        return Step(name, command, read_profile(run), 240, 45, why, self._environment())

    def generation(self) -> Step:
        """Return a step that compares generation with ``transformers``."""
        out = self._at("generation") / "result.json"
        command = [sys.executable, "-m", "benchmarks.generation", "--device", self.machine["device_type"]]
        command += ["--out", str(out), "--precision", "bf16"]
        command += [] if self.on_gpu else ["--preset", "gpt2-tiny", "--tokens", "8", "--rows", "1"]
        why = self._lacking("transformers")
        return Step("generation", command, read_result, 240, 60, why, self._environment())

    def memory(self, backend: str) -> Step:
        setting = MemorySetting(backend, 1, "gpt2" if self.on_gpu else "small", "bf16")
        out = self._at(f"memory {backend}") / "result.json"
        command = self._module("memory", json.dumps(asdict(setting)), str(out))
        why = self._lacking_for(backend)
        return Step(f"memory {backend}", command, read_result, 240, 20, why, self._environment())

    # d: several devices

    def several_curves(self) -> list[Step]:
        """Return the runs on several ranks whose curves must agree with the reference, most important first."""
        cases = [(backend, precision, False) for precision in ("fp32", "bf16") for backend in BACKENDS]
        cases += [(backend, precision, True) for precision in ("bf16", "fp32") for backend in BACKENDS]
        cases += list(product(BACKENDS, ("amp_bf16", "amp_fp16"), (False, True)))
        return [self._needs_several(self.curve(*case, self.curve_processes)) for case in cases]

    def several_speeds(self) -> list[Step]:
        ranks = self.processes
        steps = [self.ceilings("first", ranks), self.speed("ddp", ranks), self.profile("ddp", ranks)]
        for backend in ("fsdp", "zero1"):
            steps += [self.speed(backend, ranks), self.profile(backend, ranks)]
        steps += [self.speed(name, ranks) for name in (*PEERS, "zero2", "zero3", "zero0")]
        steps += [self.peer(command, ranks) for command in self.peer_commands]
        steps.append(self.ceilings("last", ranks))
        return [self._needs_several(step) for step in steps]

    def _needs_several(self, step: Step) -> Step:
        has_one = self.on_gpu and self.machine["devices"] < 2
        return replace(step, skipped="this machine has one GPU") if has_one else step

    # helpers

    def _at(self, name: str) -> Path:
        return self.folder / name

    def _module(self, module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.gpu_check.{module}", *arguments]

    def _environment(self, *layers: dict[str, str]) -> dict[str, str]:
        """Return the variables of a step. On a CPU, GPUs are hidden."""
        variables = {"PYTHONPATH": PYTHON_PATH, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
        if not self.on_gpu:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        for layer in layers:
            variables |= layer
        return variables

    def _lacking(self, package: str) -> str:
        return "" if self.machine["packages"][package] else f"{package} is not installed"

    def _lacking_for(self, backend: str) -> str:
        return self._lacking("deepspeed") if backend.startswith("zero") else ""
