"""lm-evaluation-harness scores a checkpoint with the numbers of our scorer, and of its own model on the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer
from data_tools.vocabulary import END_OF_TEXT
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.protocols import encode_pair
from pipeline.hardware import matmul_ceiling
from pipeline.interop.hugging_face.exporting import export_checkpoint
from pipeline.model.gpt2 import GPT2
from tests.pipeline.evaluation.conftest import plain_score
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[harness]'")

from lm_eval.api.instance import Instance

from pipeline.interop.lm_evaluation_harness import CheckpointModel

CONTEXT = 48

#: Contexts and continuations: choices of one example, an empty context, a space at the end, a long context, Unicode.
PAIRS = [
    ("Question: What is wet?\nAnswer:", " Water"),
    ("Question: What is wet?\nAnswer:", " A stone in the desert"),
    ("", "Water is wet."),
    ("Violets are ", "blue"),
    ("One, two, three, four, five, six, seven, " * 8, "eight"),
    ("Écrire une", " lettre à l'été"),
]
TEXTS = ["A short text.", "One, two, three, four, five, six, seven, eight.\n" * 9, ""]
PROMPTS = ["The meaning of life is", "One, two, three, four, five, six, seven, " * 8, "Été"]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_text_model(text_config(context_length=CONTEXT))


@pytest.fixture(scope="module")
def run_folder(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "run"
    return save_in_pieces(model, text_config(folder, context_length=CONTEXT), folder)


@pytest.fixture(scope="module")
def ours(run_folder: Path) -> CheckpointModel:
    return CheckpointModel(run_folder, precision="fp32", batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def theirs(run_folder: Path) -> Any:
    """Return the harness's own model on our export."""
    pytest.importorskip("peft", reason="the harness's model for transformers needs lm-eval[hf]")
    from lm_eval.models.huggingface import HFLM

    folder = export_checkpoint(run_folder, run_folder.parent / "exported", "float32").path
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_a_precision_that_is_slow_on_this_cpu_gives_a_warning_with_the_setting_of_the_harness(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(matmul_ceiling, "_fp32_speedup", lambda _: 30.0)
    CheckpointModel(run_folder, precision="amp_bf16", device="cpu")
    (warning,) = caplog.messages
    assert warning.startswith("precision=amp_bf16 is slow on this CPU: ") and warning.endswith("set precision=fp32")


def test_loglikelihoods_are_those_of_a_plain_loop(ours: CheckpointModel, model: GPT2) -> None:
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS))
    for (context, continuation), (log_likelihood, is_greedy) in zip(PAIRS, found, strict=True):
        expected, greedy = plain_score(model, encode_pair(load_tokenizer(), context, continuation))
        assert log_likelihood == pytest.approx(expected, abs=2e-5)
        assert is_greedy == greedy
    assert len({log_likelihood for log_likelihood, _ in found}) == len(PAIRS)


def test_loglikelihoods_are_those_of_the_harness(ours: CheckpointModel, theirs: Any) -> None:
    asked = requests("loglikelihood", *PAIRS)
    expected = theirs.loglikelihood(asked)
    assert [is_greedy for _, is_greedy in ours.loglikelihood(asked)] == [is_greedy for _, is_greedy in expected]
    assert [score for score, _ in ours.loglikelihood(asked)] == pytest.approx([s for s, _ in expected], abs=1e-4)


def test_whole_texts_are_scored_as_the_harness_scores_them(ours: CheckpointModel, theirs: Any) -> None:
    asked = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    found = ours.loglikelihood_rolling(asked)
    assert found == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)
    assert found[0] < 0 and found[1] < 0 and found[2] == 0


def test_greedy_completions_are_those_of_the_harness(ours: CheckpointModel, theirs: Any) -> None:
    texts = ours.generate_until(requests("generate_until", *((prompt, {"max_gen_toks": 12}) for prompt in PROMPTS)))
    stops = [text[len(text) // 2 :][:3] for text in texts]  # stop texts that occur
    options = [{"until": [stop], "max_gen_toks": 12, "do_sample": False} for stop in stops]
    asked = requests("generate_until", *zip(PROMPTS, options, strict=True))
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert [text[: len(completion)] for text, completion in zip(texts, found, strict=True)] == found
    assert all(len(completion) < len(text) for text, completion in zip(texts, found, strict=True))


def test_options_of_the_harness_decide_the_draws(ours: CheckpointModel) -> None:
    drawn = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.9}
    options = [drawn, {"max_new_tokens": 8}, {**drawn, "top_k": 1}]
    texts = ours.generate_until(requests("generate_until", *((PROMPTS[0], each) for each in options)))
    assert texts[1] == texts[2] != texts[0]


def test_a_context_of_white_space_is_scored_after_the_end_of_text(ours: CheckpointModel, model: GPT2) -> None:
    (found,) = ours.loglikelihood(requests("loglikelihood", (" ", "Water")))
    request = encode_pair(load_tokenizer(), "", " Water")
    assert request.context == (END_OF_TEXT,)
    assert found[0] == pytest.approx(plain_score(model, request)[0], abs=2e-5)


def test_a_mistake_is_one_line(ours: CheckpointModel, run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a continuation has \d+ tokens, more than the model's context of 48: ' word"):
        ours.loglikelihood(requests("loglikelihood", ("A", " word" * 50)))
    with pytest.raises(ConfigError, match="precision is 'fp8'; it must be one of fp32, amp_bf16, amp_fp16, bf16"):
        CheckpointModel(run_folder, precision="fp8")
    with pytest.raises(ConfigError, match="weights is 'best'; it must be one of training, ema"):
        CheckpointModel(run_folder, weights="best")
    with pytest.raises(ConfigError, match="device is 'tpu'; it must be one of auto, cpu, cuda, mps"):
        CheckpointModel(run_folder, device="tpu")
    with pytest.raises(ConfigError, match="batch_size: must be a whole number from 1 or auto, it is 'many'"):
        CheckpointModel(run_folder, batch_size="many", device="cpu")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        CheckpointModel(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="no chat template"):
        ours.chat_template(True)
