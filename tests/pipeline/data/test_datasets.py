"""The datasets of a run fit the model and each other, and a checkpoint recognizes them."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.errors import DataError
from data_tools.shards.contents import gpt2_tokenizer_record
from data_tools.shards.manifest import load_manifest
from data_tools.shards.reader import open_split
from pipeline.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig, RunConfig
from pipeline.data.datasets import TokenDataset, check_same_vocabulary, data_sha256, open_datasets, verify_datasets
from pipeline.distributed.world import World
from pipeline.errors import ConfigError
from tests.pipeline.conftest import END_OF_TEXT, tiny_model_config, write_shards

MODEL = tiny_model_config()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Write a dataset with both splits, one without validation, and one with another vocabulary of the same size."""
    tokens = np.arange(100) % 80
    return [
        write_shards(tmp_path / "both", {"train": [tokens, tokens], "val": [tokens]}),
        write_shards(tmp_path / "train_only", {"train": [tokens[::-1]]}),
        write_shards(tmp_path / "foreign", {"train": [tokens]}, vocabulary_sha256="1" * 64),
    ]


def mixture(*components: tuple[Path, float]) -> DataConfig:
    return DataConfig.model_validate(
        {"mixture": [{"path": str(path), "weight": weight} for path, weight in components]}
    )


def opened(data: DataConfig, model: ModelConfig = MODEL, working_dir: Path | None = None) -> tuple[TokenDataset, ...]:
    run = RunConfig(working_dir=working_dir and str(working_dir))
    return open_datasets(Config.model_construct(run=run, data=data, model=model))


def test_open_one_data_set(folders: list[Path]) -> None:
    (dataset,) = opened(DataConfig(path=str(folders[0])))
    assert dataset.train.tokens == 200
    assert dataset.validation is not None and dataset.validation.tokens == 100


def test_a_sample_needs_gpt2s_tokenizer(folders: list[Path]) -> None:
    config = Config.model_construct(
        data=DataConfig(path=str(folders[2])), model=MODEL, evaluation=EvaluationConfig(sample=True)
    )
    with pytest.raises(ConfigError, match=r"evaluation.sample needs .*foreign was tokenized with 'test' \(voc"):
        open_datasets(config)


def test_a_data_set_is_found_where_the_run_was_started(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (dataset,) = opened(DataConfig(path="both"), working_dir=folders[0].parent)
    assert dataset.path == str(folders[0]) and dataset.train.tokens == 200


def test_data_sets_are_named_after_their_folders(folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first, second = opened(mixture((folders[0], 0.7), (folders[1], 0.3)))
    assert (first.name, first.weight, first.path) == ("both", 0.7, str(folders[0]))
    assert (second.name, second.weight, second.validation) == ("train_only", 0.3, None)
    assert "train_only has no validation split" in caplog.text


def test_a_vocabulary_that_is_not_the_model_s_is_refused(folders: list[Path]) -> None:
    stream = open_split(folders[0], "train")
    check_same_vocabulary(stream, MODEL, "data/x")
    message = r"vocab_size \(90\) is not the vocabulary size of data/x \(test: 89\); .* with model\.vocab_size=89"
    with pytest.raises(ConfigError, match=message):
        check_same_vocabulary(stream, tiny_model_config(vocab_size=90), "data/x")
    with pytest.raises(ConfigError, match=r"data/x was tokenized with 'test' .* trained on tokens of 'gpt2'"):
        check_same_vocabulary(stream, MODEL, "data/x", gpt2_tokenizer_record())


def test_an_end_of_text_token_that_is_not_the_model_s_is_refused(folders: list[Path]) -> None:
    stream = open_split(folders[0], "train")
    check_same_vocabulary(stream, tiny_model_config(reset_positions_at=END_OF_TEXT), "data/x")
    message = r"model\.reset_positions_at \(7\) is not the end-of-text token of data/x \(test: 88\); .*=88, or null"
    with pytest.raises(ConfigError, match=message):
        check_same_vocabulary(stream, tiny_model_config(reset_positions_at=7), "data/x")


def test_data_sets_of_different_vocabularies_are_refused(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"foreign was tokenized with another vocabulary, .* than .*both") as caught:
        opened(mixture((folders[0], 1.0), (folders[2], 1.0)))
    assert "\n" not in str(caught.value)
    (dataset,) = opened(mixture((folders[2], 1.0)))
    assert dataset.name == "foreign"


def test_the_hash_of_one_data_set_is_that_of_its_manifest(folders: list[Path]) -> None:
    manifest = load_manifest(folders[0]).content_sha256()
    assert data_sha256(opened(DataConfig(path=str(folders[0])))) == manifest
    assert data_sha256(opened(mixture((folders[0], 5.0)))) == manifest


def test_the_hash_of_a_mixture_includes_what_decides_its_samples(folders: list[Path], tmp_path: Path) -> None:
    a, b = folders[:2]
    original = data_sha256(opened(mixture((a, 0.7), (b, 0.3))))
    moved = tmp_path / "moved"
    a.rename(moved)
    assert data_sha256(opened(mixture((moved, 7.0), (b, 3.0)))) == original, "same shares of the same data"
    others: list[tuple[tuple[Path, float], ...]] = [((b, 0.3), (moved, 0.7)), ((moved, 0.6), (b, 0.4)), ((moved, 1.0),)]
    hashes = {data_sha256(opened(mixture(*other))) for other in others}
    assert len(hashes) == 3
    assert original not in hashes


def test_all_shards_of_all_data_sets_are_verified(folders: list[Path], world: World) -> None:
    datasets = opened(mixture((folders[0], 1.0), (folders[1], 1.0)))
    verify_datasets(datasets, world)
    shard = folders[1] / "train_00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train_only/train_00000\.npy: its SHA-256"):
        verify_datasets(datasets, world)


def test_hosts_with_their_own_copies_verify_all_shards(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two ranks would verify only the last of three shards if both hosts shared the data."""
    monkeypatch.setattr(World, "call_on_main", lambda world, function: function())
    shard = folders[0] / "train_00000.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    datasets = opened(DataConfig(path=str(folders[0])))
    for is_shared in (True, False):
        monkeypatch.setattr(World, "gather", lambda world, item, shared=is_shared: [item if shared else None, item])
        with pytest.raises(DataError, match="^rank 1 on .*train_00000") if not is_shared else nullcontext():
            verify_datasets(datasets, World(1, 2, 0, torch.device("cpu")))


class TestConfig:
    @staticmethod
    def mistake(**data: Any) -> str:
        with pytest.raises(ValueError) as caught:
            DataConfig.model_validate(data)
        return str(caught.value)

    def test_path_alone_is_the_default(self) -> None:
        assert DataConfig().path == "data/fineweb-edu"
        assert [component.path for component in DataConfig().components] == ["data/fineweb-edu"]

    def test_a_mixture_takes_the_place_of_the_default(self) -> None:
        config = DataConfig.model_validate({"mixture": [{"path": "data/a/", "weight": 2}]})
        assert config.path is None
        assert [(c.name, c.path, c.weight) for c in config.components] == [("a", "data/a/", 2.0)]
        assert DataConfig.model_validate(config.model_dump(mode="json")) == config

    def test_one_of_both(self) -> None:
        part = {"path": "data/a", "weight": 1.0}
        assert "set one of data.path, data.mixture to null" in self.mistake(path="data/x", mixture=[part])
        assert "set one of data.path, data.mixture" in self.mistake(path=None)
        assert DataConfig.model_validate({"path": None, "mixture": [part]}).path is None

    def test_parts_need_weights_above_zero_and_names_of_their_own(self) -> None:
        assert "mixture.0.weight" in self.mistake(mixture=[{"path": "a"}])
        for weight in (0, -1, float("inf"), float("nan"), "1"):
            assert "mixture.0.weight" in self.mistake(mixture=[{"path": "a", "weight": weight}])
        twins = [{"path": "a/data", "weight": 1}, {"path": "b/data", "weight": 1}]
        assert "two datasets have the name data" in self.mistake(mixture=twins)
        assert "two datasets have the path a/data" in self.mistake(mixture=[twins[0], {**twins[0], "name": "other"}])
        assert "mixture.0.name" in self.mistake(mixture=[{"path": "/", "weight": 1}])
        named = DataConfig.model_validate({"mixture": [{**twins[0], "name": "a"}, {**twins[1], "name": "b"}]})
        assert [component.name for component in named.components] == ["a", "b"]
        assert "mixture" in self.mistake(mixture=[])
