"""``launch/plan.py`` as a user runs it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import launch.plan
from data_tools.errors import UserError
from pipeline.config.loading import load_config
from pipeline.data.batch_plan import plan_batch
from pipeline.planning import devices
from pipeline.planning.presentation import format_days
from tests.support.runs import CONFIGS

TINY = ["--set", "model.preset=gpt2-tiny", "batch.tokens_per_step=65536", "--world-size=4"]


def plan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    tiny = TINY[:-1] if "--world-size" in arguments else TINY
    monkeypatch.setattr("sys.argv", ["plan.py", "--config", str(CONFIGS / "zero1.json"), *tiny, *arguments])
    launch.plan.main()


def test_the_schedule_is_shown_without_a_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ["schedule.name=wsd", "schedule.warmup_steps=30", "schedule.max_steps=1000", "schedule.decay_steps=100"]
    settings = [*schedule, "schedule.min_lr_ratio=0", "optimizer.learning_rate=0.002", "batch.tokens_per_step=65536"]
    monkeypatch.setattr(
        "sys.argv", ["plan.py", "--schedule", "--config", str(CONFIGS / "zero1.json"), "--set", *settings]
    )
    launch.plan.main()
    title, _, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "schedule warm-up 30 steps, constant to step 900, linear to 0 of the peak at step 1,000"
    rows = {int(step.replace(",", "")): rest for step, *rest in (line.split() for line in lines)}
    assert list(rows) == [0, 30, *range(50, 1001, 50)]
    assert rows[500] == ["32,768,000", "2.00e-03", "#" * 50]
    assert rows[900] == ["58,982,400", "1.98e-03", "#" * 50], "the first step of the decay"
    assert rows[950] == ["62,259,200", "9.80e-04", "#" * 24]
    assert rows[1000] == ["65,536,000", "0.00e+00"]


def test_a_table_of_every_backend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan(monkeypatch, "--tokens", "1000000", "--mfu", "0.3")
    printed = capsys.readouterr().out
    assert "assumed MFU 0.30" in printed
    assert "1,000,000 tokens" in printed
    for backend in launch.plan.BACKENDS:
        assert printed.count(f"\n{backend} ") == 2  # once for memory and once for speed
    verdict, *_, command = printed.splitlines()
    assert verdict.startswith("verdict  fits: ")
    assert command.startswith(f"{verdict.removeprefix('verdict  ')}: torchrun --standalone --nproc_per_node=4 -m ")
    assert "schedule.max_steps=16" in shlex.split(command), "16 steps of 65,536 tokens"


@pytest.mark.parametrize("backends", [["ddp"], ["fsdp"], ["zero1"], ["zero3", "zero2"]])
def test_the_command_of_the_verdict_is_accepted(
    backends: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The small memory leaves micro-batches that are smaller than the config's 16."""
    plan(monkeypatch, "--backends", *backends, "--memory", "2.5", "--tokens", "10B")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    files, overrides = words[words.index("--config") + 1 : words.index("--set")], words[words.index("--set") + 1 :]
    assert files[0] in (*backends, str(CONFIGS / "zero1.json")), "the name of a config, which needs no checkout"
    config = load_config(files, overrides)
    batch = plan_batch(config, 4)
    assert batch.micro_batch_size < 16
    assert config.backend.name == ("deepspeed" if "zero" in backends[0] else backends[0])
    plan(monkeypatch, "--set", *overrides, "--backends", *backends, "--memory", "2.5", "--json")
    assert any(each["fits"] for each in json.loads(capsys.readouterr().out)["plans"])


def test_every_micro_batch_that_is_named_can_be_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(monkeypatch, "--memory", "2.5", "--json")
    plans = json.loads(capsys.readouterr().out)["plans"]
    for size in {each[key] for each in plans for key in ("largest_micro_batch", "micro_batch_size")} - {0}:
        plan_batch(load_config([CONFIGS / "zero1.json"], [*TINY[1:3], f"batch.micro_batch_size={size}"]), 4)
    assert all(each["days"] is not None for each in plans if each["largest_micro_batch"])


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan(monkeypatch, "--memory", "1.05")
    *_, last = capsys.readouterr().out.splitlines()
    found = re.match(
        r"does not fit: (\w+) needs the least, ([\d.]+) GiB for one sequence, and 0\.05 GiB are usable", last
    )
    assert found, last
    # With one sequence per micro-batch and as much memory, the same backend fits.
    needed = 1 + (float(found[2]) + 0.005) / 0.95
    plan(monkeypatch, "--memory", str(needed), "--backends", found[1])
    assert capsys.readouterr().out.startswith(f"verdict  fits: {found[1]}, micro-batch 1, ")
    assert "torchrun" not in last


@pytest.mark.parametrize("tokens", ["10B", "10e9", "10000000000", "10,000,000,000", "10_000M"])
def test_ways_to_write_a_budget(
    tokens: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(monkeypatch, "--backends", "ddp", "--tokens", tokens)
    assert "budget   10,000,000,000 tokens" in capsys.readouterr().out


def test_ranks_share_the_cpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "measure_matmul_ceiling", lambda *_: 1e12)
    monkeypatch.setattr(devices, "_measure_copy", lambda *_: 1e10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    monkeypatch.setattr(devices, "memory_limit", lambda: 6 << 30)  # the limit of a container
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    alone, shared = (devices.find_device("this", "fp32", ranks) for ranks in (1, 4))
    assert shared.flops("fp32") * 4 == alone.flops("fp32") == 1e12
    assert shared.memory_gib * 4 == alone.memory_gib == 6.0
    assert shared.host_gb_per_s * 4 == alone.host_gb_per_s
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # each rank has two threads, also when it is alone
    assert devices.find_device("this", "fp32", 4).flops("fp32") == 1e12


@pytest.mark.parametrize(
    ("ranks", "network"), [(1, "1 host, 1 per host"), (2, "1 host, 2 per host, 40 Gbit/s between two ranks")]
)
def test_a_plan_for_a_cpu_names_no_gpu(
    ranks: int, network: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "measure_matmul_ceiling", lambda *_: 1e12)
    monkeypatch.setattr(devices, "_measure_copy", lambda *_: 1e10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan(monkeypatch, "--device", "this", "--world-size", str(ranks), "--backends", "fsdp", "--tokens", "1000000")
    lines = capsys.readouterr().out.splitlines()
    assert f"network  {network}" in lines
    assert not [line for line in lines[:-1] if "GPU" in line]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 seconds"), (33, "33 seconds"), (3500, "58 minutes"), (7200, "2 hours"), (86400 * 1.5, "1.5 days")],
)
def test_a_duration_has_a_unit_that_fits(seconds: float, text: str) -> None:
    assert format_days(seconds / 86400) == text


@pytest.mark.parametrize(("gpus", "node_gb_per_s"), [(1, 25), (2, 200)])
def test_links_of_this_machines_gpus_are_measured(
    monkeypatch: pytest.MonkeyPatch, gpus: int, node_gb_per_s: int
) -> None:
    bandwidths = {("cpu", "cuda"): 25e9, ("cuda:0", "cuda:1"): 200e9}
    monkeypatch.setattr(devices, "measure_matmul_ceiling", lambda *_: 1e12)
    monkeypatch.setattr(devices, "_measure_copy", lambda start, end: bandwidths[str(start), str(end)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    device = devices.find_device("this", "fp32", gpus)
    assert (device.host_gb_per_s, device.node_gb_per_s, device.per_node) == (25, node_gb_per_s, gpus)


@pytest.mark.parametrize(("start", "end", "is_pinned"), [("cpu", "cuda", True), ("cuda:0", "cuda:1", False)])
def test_copies_from_the_host_are_measured_from_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, start: str, end: str, is_pinned: bool
) -> None:
    made: list[tuple[str, bool]] = []
    ones = torch.ones

    def make(size: int, *, device: torch.device, pin_memory: bool = False, **_: Any) -> torch.Tensor:
        made.append((str(device), pin_memory))
        return ones(1 << 10)

    monkeypatch.setattr(torch, "ones", make)
    monkeypatch.setattr(devices, "synchronize", lambda _: None)
    assert devices._measure_copy(torch.device(start), torch.device(end)) > 0
    assert made == [(start, is_pinned), (end, False)]


def test_json_and_picture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    plan(monkeypatch, "--backends", "fsdp", "zero1", "--json", "--plot", str(picture))
    plans: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["plans"]
    assert [each["backend"] for each in plans] == ["fsdp", "zero1"]
    for each in plans:
        memory = each["memory"]
        assert memory.pop("total") == sum(memory.values())
        assert each["fits"] and each["largest_micro_batch"] > each["batch"]["micro_batch_size"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_many_hosts_are_answered_with_speed_limit_cost_and_a_chart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 65,536 tokens per step, 64 ranks of 16 sequences are too many: each rank has 4 sequences."""
    options = ["--world-size", "64", "--gpus-per-host", "4", "--network", "2x100gbit", "--backends", "ddp", "fsdp"]
    options += ["--price-per-gpu-hour", "2", "--scaling", "--set", "data.seq_len=256"]
    plan(monkeypatch, *options)
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[0]: line for line in lines if line}
    assert named["verdict"].startswith("verdict  fits: ") and "micro-batch 4" in named["verdict"]
    assert named["network"].startswith("network  16 hosts, 4 per host, ")
    assert named["network"].endswith("; 200 Gbit/s between hosts")
    assert re.search(r"predicted: [\d,]+ tokens/s, a step of [\d.]+ ms", named["speed"])
    assert re.search(r"efficiency [\d.]+%; waits for bandwidth between hosts [\d.]+%", named["limit"])
    assert named["4096"].rstrip("#").endswith("% ") and named["1"].endswith("100% " + 30 * "#")
    assert "--nnodes=16 --nproc_per_node=4" in lines[-1] and "batch.micro_batch_size=4" in lines[-1]
    plan(monkeypatch, *options, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"verdict", "plans", "scaling"}
    best = min(printed["plans"], key=lambda each: each["days"])
    assert printed["verdict"]["cost"] == pytest.approx(2 * 24 * 64 * best["days"], rel=0.01)
    assert [each["batch"]["world_size"] for each in printed["scaling"]] == [1 << power for power in range(13)]


def test_the_chart_agrees_with_the_verdict_if_the_micro_batch_of_the_config_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a card with 24 GB, 8 sequences of the config do not fit under fsdp on 8 ranks, and nothing fits on one."""
    options = ["plan.py", "--config", str(CONFIGS / "gpt2_1558m.json"), "--gpus", "8", "--device", "rtx4090"]
    options += ["--backends", "ddp", "fsdp", "--scaling"]
    monkeypatch.setattr("sys.argv", options)
    launch.plan.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert lines[0].startswith("verdict  fits: fsdp, micro-batch 4, ")
    speed = re.search(r"[\d,]+ tokens/s", rows["speed"])
    assert speed and rows["8"].split()[1:5] == ["fsdp", "4", "1,048,576", speed[0].split()[0]]
    assert [rank for rank in map(str, (1 << power for power in range(13))) if rank not in rows] == []
    assert re.fullmatch(r" +1  does not fit: ddp needs the least, [\d.]+ GiB for one sequence", rows["1"])
    assert rows["4096"].split()[3] == f"{4096 * 1024:,}", "one sequence per rank is more than the step of the config"


@pytest.mark.parametrize("memory", ["2.5", "1.05"])  # a smaller micro-batch fits, nothing fits
def test_json_has_the_verdict_of_the_text(
    memory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backends", "ddp", "zero1", "--memory", memory]
    plan(monkeypatch, *options)
    first, *_, last = capsys.readouterr().out.splitlines()
    plan(monkeypatch, *options, "--json")
    printed = json.loads(capsys.readouterr().out)
    verdict = printed["verdict"]
    assert printed.keys() == {"verdict", "plans"}, "docs/planning.md lists the keys"
    assert verdict.keys() == {"fits", "text", "command", "cost"} and verdict["cost"] is None, "without a price"
    assert first == f"verdict  {verdict['text']}"
    assert last == (f"{verdict['text']}: {verdict['command']}" if verdict["fits"] else verdict["text"])
    assert verdict["fits"] == (memory == "2.5") == ("-m launch.train --config " in str(verdict["command"]))


def test_the_settings_of_the_configs_own_backend_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buffers = []
    for bucket in (1_000_000, 3_000_000):
        own = f"backend.deepspeed.zero_optimization.reduce_bucket_size={bucket}"
        plan(monkeypatch, "--set", own, "--backends", "zero1", "--json")
        buffers.append(json.loads(capsys.readouterr().out)["plans"][0]["memory"]["buffers"])
    assert buffers[1] == 3 * buffers[0]


def test_fsdp_is_planned_and_started_with_the_settings_of_a_config_for_every_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = {}
    for reshards in ("true", "false"):
        own = f"backend.fsdp.reshard_after_forward={reshards}"
        plan(monkeypatch, "--set", own, "--backends", "fsdp", "--json")
        sent[reshards] = json.loads(capsys.readouterr().out)["plans"][0]["speed"]["sent_bytes"]
    assert sent["true"] > sent["false"]
    plan(monkeypatch, "--set", own, "--backends", "fsdp")
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    config = load_config(words[words.index("--config") + 1 : words.index("--set")], words[words.index("--set") + 1 :])
    assert (config.backend.name, config.backend.fsdp.reshard_after_forward) == ("fsdp", False)


def test_shard_groups_of_whole_nodes_are_planned_and_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--world-size", "32", "--device", "l4", "--set", "batch.tokens_per_step=131072"]
    plan(monkeypatch, *options, "--backends", "fsdp", "--json")
    printed = json.loads(capsys.readouterr().out)
    plans = {each["backend"]: each["memory"]["parameters"] for each in printed["plans"]}
    assert list(plans) == ["fsdp", "fsdp/8", "fsdp/16"]
    assert plans["fsdp/8"] == pytest.approx(4 * plans["fsdp"], rel=1e-2)
    words = shlex.split(printed["verdict"]["command"])
    overrides = words[words.index("--set") + 1 :]
    config = load_config(words[words.index("--config") + 1 : words.index("--set")], overrides)
    assert config.backend.name == "fsdp" and config.backend.fsdp.shard_group_size == 8, "less traffic between nodes"
    plan(monkeypatch, *options, "backend.fsdp.shard_group_size=2", "--backends", "fsdp", "--json")
    (own,) = json.loads(capsys.readouterr().out)["plans"]
    assert own["memory"]["parameters"] == pytest.approx(16 * plans["fsdp"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h1000"], "--device: h1000 is not known; known are h100-80gb"),
        (["--world-size", "3"], "batch.tokens_per_step .* is not a multiple"),
        (["--world-size", "0"], "--world-size/--gpus: must be a whole number from 1, it is '0'"),
        (
            ["--world-size", "12", "--gpus-per-host", "8"],
            "--gpus: 12 is not a multiple of --gpus-per-host .8.; .*: 8, 16",
        ),
        (
            ["--world-size", "12", "--device", "l4"],
            "--gpus: 12 is not a multiple of --gpus-per-host .8 by default.; .*: 8, 16; or set another --gpus-per-host",
        ),
        (["--network", "400gbt"], "--network: must be a bandwidth such as 400gbit, .*, it is '400gbt'"),
        (["--network", "0gbit"], "--network: must be a bandwidth"),
        (
            ["--price-per-gpu-hour", "2$"],
            "--price-per-gpu-hour: must be a number above 0, without a unit, it is '2[$]'",
        ),
        (["--mfu", "1.5"], "--mfu"),
        (["--memory", "1"], "--memory: must be more than the 1 GiB"),
        (["--memory", "24GB"], "--memory: must be a number above 0"),
        (["--tokens", "10.5"], "--tokens: must be a whole number such as 5000000, 10B or 10e9, it is '10.5'"),
        (["--plot", "no/such/folder/plan.png"], "--plot"),
    ],
)
def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(monkeypatch, "--backends", "ddp", *arguments)
