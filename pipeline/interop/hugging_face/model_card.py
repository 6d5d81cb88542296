"""Write the ``README.md`` of an exported model."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.formatting import count_of
from pipeline.checkpoint.inspection import find_different_numbers
from pipeline.checkpoint.json_files import read_json_object
from pipeline.checkpoint.manifest import read_manifest
from pipeline.checkpoint.state import TrainingState
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError
from pipeline.interop.hugging_face.layout import MODEL_TYPE
from pipeline.model.gpt2 import parameter_count
from pipeline.report.curves import STEPS, loss_chart
from pipeline.report.runs import Run
from pipeline.run_folder.layout import EVALUATION_FOLDER, run_folder_of
from pipeline.run_folder.metrics import read_metrics

CARD_FILE = "README.md"
CURVE_FILE = "loss.png"
_MAX_CURVE_ROWS = 20
_NEW_TOKENS = 40  # in the example of the card, if the context is long enough

_CARD = """\
---
{metadata}
---

# {name}

A GPT-2 of {parameters:,} parameters, {trained}: {model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, \
context {model.context_length}, vocabulary {model.vocab_size}.

{sections}
## Use

{use}"""

_USE_WITH_TEXT = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
prompt = tokenizer("The meaning of life is", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={new_tokens})[0]))
```
"""

_USE_WITH_IDS = """\
This folder has no tokenizer, because the model's tokens are not GPT-2's. The model takes and returns token ids:

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
prompt = torch.tensor([[0, 1, 2]])  # the ids of a text, from the model's own tokenizer
print(model.generate(prompt, max_new_tokens={new_tokens})[0].tolist())
```
"""

#: The keys of the config whose changes the card shows.
_CARD_SETTINGS = ("run.precision", "model.", "data.", "batch.", "optimizer.", "schedule.", "averaging.")
_OPTIMIZER_NAMES = {"adamw": "AdamW", "muon": "Muon for the matrices of the blocks and AdamW for the rest"}


def model_card(
    checkpoint: Path, state: TrainingState, config: Config, weights: str, *, has_tokenizer: bool
) -> dict[str, bytes]:
    """Return the files of the model card by name: a Markdown file and a picture of the loss curve.

    The picture is left out if matplotlib is not installed or the run folder has no metrics.

    Args:
        has_tokenizer: whether the export contains a tokenizer. If not, the card shows how to use token ids.
    """
    from huggingface_hub import ModelCardData  # slow to import

    run_folder = run_folder_of(checkpoint)
    rows = [row for row in read_metrics(run_folder) if row["step"] <= state.step]
    picture = _draw_curve(rows, config.run.name)
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=[MODEL_TYPE], model_name=config.run.name
    )
    changes = find_different_numbers(run_folder, state.step, config)
    sections = [
        _training(state, config, weights, changes),
        _changed_settings(rows, state.step),
        _curve(rows, has_picture=bool(picture)),
        _evaluation(run_folder, read_manifest(checkpoint).weights_sha256(weights)),
    ]
    text = _CARD.format(
        metadata=metadata.to_yaml(),
        name=config.run.name,
        parameters=parameter_count(config.model),
        trained=f"trained on {count_of(state.tokens, 'token')} in {count_of(state.step, 'step')}"
        if state.step
        else "not trained further",
        model=config.model,
        sections="\n".join(filter(None, sections)),
        use=(_USE_WITH_TEXT if has_tokenizer else _USE_WITH_IDS).format(
            new_tokens=min(_NEW_TOKENS, config.model.context_length // 2)
        ),
    )
    return {CARD_FILE: text.encode(), **({CURVE_FILE: picture} if picture else {})}


def _draw_curve(rows: list[dict[str, Any]], name: str) -> bytes | None:
    """Return a PNG of the loss curve, or None without a loss or without matplotlib."""
    try:
        from pipeline.report.drawing import draw  # imports matplotlib, which is optional and slow to import
    except ImportError:
        return None
    chart = loss_chart([Run(name, {}, rows, {})], "loss", STEPS)
    return draw(chart).png if chart.curves else None


def _training(state: TrainingState, config: Config, weights: str, changes: list[str]) -> str:
    if not state.step:
        return ""
    optimizer = config.optimizer
    name = _OPTIMIZER_NAMES.get(optimizer.name, optimizer.name)
    settings = {
        "data": ", ".join(component.path for component in config.data.components),
        **({"initial weights": config.checkpoint.init_from} if config.checkpoint.init_from else {}),
        "tokens per step": f"{config.batch.tokens_per_step:,}",
        "optimizer": f"{name}, learning rate {optimizer.learning_rate:g}, betas {optimizer.betas}, "
        f"weight decay {optimizer.weight_decay:g}, clipping {optimizer.grad_clip:g}",
        "schedule": str(config.schedule),
        **(
            {} if weights == "training" else {"weights": f"moving average over the steps, decay {config.averaging.ema}"}
        ),
        "precision": config.run.precision,
        "seed": str(config.run.seed),
        **({"numbers differ from those of other backends": ", ".join(changes)} if changes else {}),
    }
    return _table("Training", ("setting", "value"), settings.items())


def _changed_settings(rows: list[dict[str, Any]], last_step: int) -> str:
    """Return a table of the settings that a resumed run has changed. The table "Training" has only the last settings.

    If a run started several times from the same checkpoint, only the last start is shown.
    """
    starts = {row["step"]: row["started"].get("changed", []) for row in rows if isinstance(row.get("started"), dict)}
    cells = [
        (f"{step:,}", change)
        for step, changes in sorted(starts.items())
        for change in changes
        if step < last_step and change.startswith(_CARD_SETTINGS)
    ]
    return _table("Settings that changed during the training", ("after step", "change"), cells) if cells else ""


def _curve(rows: list[dict[str, Any]], *, has_picture: bool) -> str:
    train, validation = (
        {row["step"]: f"{row[key]:.4f}" for row in rows if row.get(key) is not None} for key in ("loss", "val_loss")
    )
    steps = sorted(validation if len(validation) > 1 else validation | train)
    if not steps:
        return ""
    if len(steps) > _MAX_CURVE_ROWS:
        steps = [steps[i * (len(steps) - 1) // (_MAX_CURVE_ROWS - 1)] for i in range(_MAX_CURVE_ROWS)]
    cells = [(f"{step:,}", train.get(step, ""), validation.get(step, "")) for step in steps]
    table = _table("Curve", ("step", "training loss", "validation loss"), cells)
    return f"{table}\n![Loss against steps]({CURVE_FILE})\n" if has_picture else table


def _evaluation(run_folder: Path, sha256: str) -> str:
    cells: list[tuple[str, ...]] = []
    for path in sorted((run_folder / EVALUATION_FOLDER).glob("*.json")):
        with suppress(CheckpointError):  # after a crash, a file can be incomplete
            result = read_json_object(path)
            if result.get("weights_sha256") == sha256:
                values = {key.replace("_", " "): value for key, value in result.items() if isinstance(value, float)}
                cells += [(path.stem, key, f"{value:.4f}") for key, value in values.items()]
    return _table("Evaluation", ("task", "measure", "value"), cells) if cells else ""


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join([f"## {title}", "", *lines, ""])
