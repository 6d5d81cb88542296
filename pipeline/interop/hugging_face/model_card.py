"""The README of an exported model: what it is, how it was trained, its curve, its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoint import TrainingState
from pipeline.config.schema import Config
from pipeline.interop.hugging_face.layout import MODEL_TYPE
from pipeline.model.gpt2 import parameter_count
from pipeline.report.curves import STEPS, loss_chart
from pipeline.report.runs import Run
from pipeline.run_folder.layout import EVALUATION_FOLDER, run_folder_of
from pipeline.run_folder.metrics import read_metrics

CARD_FILE = "README.md"
CURVE_FILE = "loss.png"
_MOST_CURVE_ROWS = 20


def model_card(checkpoint: Path, state: TrainingState, config: Config) -> dict[str, bytes]:
    """The files of the card: Markdown under the front matter that the hub reads, and the picture that it shows.

    Without matplotlib, or without rows of the run, there is no picture.
    """
    run_folder = run_folder_of(checkpoint)
    rows = [row for row in read_metrics(run_folder) if row["step"] <= state.step]
    picture = _picture(rows, config.run.name)
    sections = [
        _front_matter(config),
        _introduction(state, config),
        _training(state, config),
        _curve(rows, shown=bool(picture)),
        _evaluation(run_folder, state.step),
        _usage(),
    ]
    text = "\n".join(section for section in sections if section)
    return {CARD_FILE: text.encode(), **({CURVE_FILE: picture} if picture else {})}


def _picture(rows: list[dict[str, Any]], name: str) -> bytes | None:
    """Loss against steps, PNG."""
    try:
        from pipeline.report.drawing import draw  # an extra, and slow to import
    except ImportError:
        return None
    chart = loss_chart([Run(name, {}, rows, {})], "loss", STEPS)
    return draw(chart).png if chart.curves else None


def _front_matter(config: Config) -> str:
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            f"tags: [{MODEL_TYPE}]",
            f"model_name: {json.dumps(config.run.name)}",
            "---",
            "",
        ]
    )


def _introduction(state: TrainingState, config: Config) -> str:
    model = config.model
    trained = f"trained on {state.tokens:,} tokens in {state.step:,} steps" if state.step else "not trained further"
    return (
        f"# {config.run.name}\n\nA GPT-2 of {parameter_count(model):,} parameters, {trained}: {model.n_layer} layers, "
        f"{model.n_head} heads, width {model.n_embd}, context {model.context_length}, vocabulary {model.vocab_size}.\n"
    )


def _training(state: TrainingState, config: Config) -> str:
    settings = {
        "data": ", ".join(component.path for component in config.data.components),
        "tokens a step": f"{config.batch.tokens_per_step:,}",
        "optimizer": f"AdamW, learning rate {config.optimizer.learning_rate:g}, betas {config.optimizer.betas}, "
        f"weight decay {config.optimizer.weight_decay:g}, clipping {config.optimizer.grad_clip:g}",
        "schedule": f"warm-up {config.schedule.warmup_steps:,} steps, cosine to {config.schedule.min_lr_ratio:g} "
        f"of the peak at step {config.schedule.max_steps:,}",
        "precision": config.run.precision,
        "seed": str(config.run.seed),
    }
    if not state.step:
        return ""
    return _table("Training", ("setting", "value"), settings.items())


def _curve(rows: list[dict[str, Any]], *, shown: bool) -> str:
    """Losses at steps spread evenly over the run, the last one always; the picture, if it is shown, under them."""
    train = {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}
    validation = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}
    steps = _spread(sorted(validation.keys() | train.keys()) if len(validation) < 2 else sorted(validation))
    if not steps:
        return ""
    cells = [(f"{step:,}", _loss(train.get(step)), _loss(validation.get(step))) for step in steps]
    table = _table("Curve", ("step", "training loss", "validation loss"), cells)
    return f"{table}\n![Loss against steps]({CURVE_FILE})\n" if shown else table


def _spread(steps: list[int]) -> list[int]:
    """At most so many of them, from the first to the last."""
    if len(steps) <= _MOST_CURVE_ROWS:
        return steps
    return [steps[i * (len(steps) - 1) // (_MOST_CURVE_ROWS - 1)] for i in range(_MOST_CURVE_ROWS)]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _evaluation(run_folder: Path, step: int) -> str:
    """Numbers of the tasks that were scored on this very step."""
    cells = [
        (task, key.replace("_", " "), f"{value:.4f}")
        for task, result in _results_of_step(run_folder, step)
        for key, value in result.items()
        if isinstance(value, float)
    ]
    return _table("Evaluation", ("task", "measure", "value"), cells) if cells else ""


def _results_of_step(run_folder: Path, step: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((run_folder / EVALUATION_FOLDER).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # a result that was cut by a crash is none
        if isinstance(result, dict) and result.get("step") == step:
            yield path.stem, result


def _usage() -> str:
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
        'prompt = tokenizer("The meaning of life is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))",
    ]
    return "\n".join(["## Use", "", "```python", *code, "```", ""])


def _table(title: str, head: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join([f"## {title}", "", *lines, ""])
