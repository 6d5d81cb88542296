"""Test that the training benchmark compares equal settings, and that compiled training has the eager curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import train
from benchmarks.train import LOSS_TOLERANCE as BENCHMARK_TOLERANCE
from benchmarks.train import Contender, Limits, contenders_of, disagreements, parse_arguments, train_ours, train_peer
from benchmarks.train_command import PeerCommand, read_steps
from benchmarks.train_setting import Measured, Setting
from tests.support.agreement import LOSS_TOLERANCE
from tests.support.runs import curve_of, merged

NANOGPT = """\
tokens per iteration will be: 2,048
step 0: train loss 10.9, val loss 10.9
iter 0: loss 10.8731, time 90210.00ms, mfu -100.00%
iter 1: loss 10.5, time 1,700.5ms, mfu 0.40%
saving checkpoint to out
"""
BUILD_NANOGPT = """\
step    0 | loss: 10.955029 | lr 8.3916e-07 | norm: 15.3 | dt: 2000.00ms | tok/sec: 1024.0
step    1 | loss: 9.5 | lr 1.6783e-06 | norm: 15.3 | tok/sec: 512.0
"""


@pytest.fixture
def setting(corpus: Path) -> Setting:
    """Return a setting that takes seconds on one core."""
    return Setting(
        data=str(corpus),
        n_layer=1,
        n_head=2,
        n_embd=32,
        seq_len=48,
        micro_batch_size=2,
        processes=1,
        device="cpu",
        precision="amp_bf16",
        steps=8,
        warmup_steps=4,
        steps_per_row=1,
        learning_rate=1e-2,
    )


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (NANOGPT, [(1, 10.8731, 90210.0), (2, 10.5, 1700.5)]),
        (BUILD_NANOGPT, [(1, 10.955029, 2000.0), (2, 9.5, 4000.0)]),
        ("loss is 3, time 4ms\nno step here\n", []),
    ],
)
def test_printed_steps_of_peers_are_parsed(text: str, steps: list[tuple[int, float, float]]) -> None:
    assert list(read_steps(text.splitlines(), tokens_per_step=2048)) == steps


def test_compiled_training_and_transformers_follow_the_eager_curve(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All use the same batches and weights; blocked attention and the fused loss do not change the curve."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    eager = curve_of("ddp", tmp_path / "eager", merged(setting.sections(), {"run": {"compile": False}}))
    compiled = train_ours("ddp", setting)
    peer = train_peer(["loop", "--eager"], setting)
    assert eager.losses[-1] < eager.losses[0] - 0.01
    for step, loss in enumerate(eager.losses, 1):
        assert compiled.losses[step] == pytest.approx(loss, abs=LOSS_TOLERANCE["amp_bf16"])
        assert peer.losses[step] == pytest.approx(loss, abs=LOSS_TOLERANCE["amp_bf16"])
    assert len(compiled.step_ms) == len(peer.step_ms) == setting.steps - setting.warmup_steps
    assert compiled.peak_bytes is not None and compiled.peak_bytes > 1 << 27


def peer_that_prints(losses: list[float], folder: Path) -> PeerCommand:
    """Return a command that prints losses without training and records its arguments."""
    script = folder / "peer.py"
    lines = [f"step {step} | loss: {loss} | dt: {100 + step}ms" for step, loss in enumerate(losses)]
    script.write_text(
        "import json, os, sys\n"
        f"print({chr(10).join(lines)!r})\n"
        f"json.dump([sys.argv[1], sorted(os.listdir(sys.argv[2]))], open({str(folder / 'given')!r}, 'w'))\n"
    )
    return PeerCommand.parse(f"peer=python {script} {{n_layer}}x{{n_embd}} {{data}}")


def test_a_command_gets_sizes_and_tokens_and_is_measured(setting: Setting, tmp_path: Path) -> None:
    measured = peer_that_prints([5.0] * 8, tmp_path).run(setting)
    assert json.loads((tmp_path / "given").read_text()) == ["1x32", ["train.bin", "val.bin"]]
    assert measured.step_ms == [104.0, 105.0, 106.0, 107.0]
    assert measured.losses[8] == 5.0


def test_the_output_of_a_failed_command_is_shown(setting: Setting) -> None:
    with pytest.raises(RuntimeError, match="no such trainer"):
        PeerCommand.parse("peer=echo no such trainer; false").run(setting)


@pytest.mark.parametrize(("difference", "agree"), [(0.9, True), (1.1, False), (float("nan"), False)])
def test_losses_must_agree(
    difference: float,
    agree: bool,
    setting: Setting,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table shows medians, quartiles, shares and ratios, and the losses are compared."""

    def contender(name: str, loss: float, step_ms: list[float]) -> Contender:
        return Contender(name, lambda _: Measured(dict.fromkeys(range(1, 9), loss), step_ms, 3 << 30))

    monkeypatch.setattr(train, "measure_limits", lambda _: Limits(1e12, 1e10, "a machine"))
    contenders = [
        contender("ours", 5.0, [90.0, 96.0, 100.0, 104.0, 120.0]),
        contender("peer", 5.0 + difference * BENCHMARK_TOLERANCE, [150.0, 150.0]),
    ]
    failures = train.compare(contenders, setting, rounds=1)
    output = capsys.readouterr().out
    assert failures == (0 if agree else 1)
    assert "| ours | 960 | 923 - 1,000 |" in output
    assert "1.50x as fast" in output and "3.00 GiB" in output
    assert ("The losses agree." in output) == agree


def test_a_contender_without_common_steps_does_not_agree(setting: Setting) -> None:
    found = {"a": Measured({5: 1.0}, [1.0], None), "b": Measured({6: 1.0}, [1.0], None)}
    contenders = [Contender(name, lambda _: found["a"]) for name in found]
    assert disagreements(contenders, found, warmup_steps=4) == ["b has no step in common with a"]


def test_the_command_line() -> None:
    arguments = parse_arguments(["--contenders", "ddp", "fsdp", "--peer-command", "x=run {data}", "--processes", "2"])
    assert [contender.name for contender in contenders_of(arguments.contenders, arguments.peer_command)] == [
        "ddp",
        "fsdp",
        "x",
    ]
    with pytest.raises(SystemExit):
        parse_arguments(["--peer-command", "no template"])
