"""``docs/config.md`` agrees with the schema."""

from __future__ import annotations

from pipeline.config.reference import config_reference
from tests.support.runs import REPOSITORY


def test_the_page_is_up_to_date() -> None:
    """If this fails, run ``python -m pipeline.config.reference > docs/config.md``."""
    assert (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8") == config_reference()


def test_every_key_has_a_meaning() -> None:
    assert "| None |" not in config_reference()
    assert "| `run.precision` |" in config_reference()
    assert "| `backend.fsdp.reshard_after_forward` |" in config_reference()
