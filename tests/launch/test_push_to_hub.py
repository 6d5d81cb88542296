"""``launch/export.py --push-to-hub`` uploads an export to a stand-in for the hub, which is a real HTTP server."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import launch.export
from tests.pipeline.interop.hugging_face.conftest import random_text_model, save_in_pieces, text_config
from tests.support.commands import Done, command_runner
from tests.support.hub_server import READ_TOKEN, TOKEN, Hub, Model, hub_server
from tests.support.runs import REPOSITORY, child_environment


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "run"
    return save_in_pieces(random_text_model(text_config()), text_config(folder), folder)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture
def run_export(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, hub: Hub
) -> Callable[..., Done]:
    """Return a function that runs ``launch/export.py`` in this process, with a token, against the stand-in."""
    run_export = command_runner(launch.export, monkeypatch, capsys)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))

    def run(*arguments: object, token: str = TOKEN) -> Done:
        monkeypatch.setenv("HF_TOKEN", token)
        return run_export(*arguments)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_arrives_with_its_card(run_folder: Path, tmp_path: Path, hub: Hub) -> None:
    """Start a process, as a user does. The variables are those that the client of the hub reads."""
    environment = {**child_environment(), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    options = ["--checkpoint", run_folder, "--out", tmp_path / "out", "--push-to-hub", "me/mine", "--private"]
    command = [sys.executable, REPOSITORY / "launch" / "export.py", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {hub.endpoint}/me/mine" in done.stdout
    model = hub.models["me/mine"]
    assert model.private
    assert model.files == contents(tmp_path / "out")
    assert b"library_name: transformers" in model.files["README.md"]
    assert len(hub.blobs) >= 1, "the weights are sent as a blob"


def test_a_second_export_goes_into_the_same_model(
    run_folder: Path, tmp_path: Path, hub: Hub, run_export: Callable[..., Done]
) -> None:
    hub.models["me/mine"] = Model(private=False, files={"notes.txt": b"kept", "config.json": b"{}"})
    common = ["--checkpoint", run_folder, "--push-to-hub", "mine"]
    status, output, errors = run_export(*common, "--out", tmp_path / "out")
    assert status == 0, errors
    assert f"pushed to {hub.endpoint}/me/mine" in output
    assert hub.models["me/mine"].files == {"notes.txt": b"kept", **contents(tmp_path / "out")}

    status, _, errors = run_export(*common, "--out", tmp_path / "m.gguf", "--format", "gguf", "--dtype", "float16")
    assert status == 0, errors
    assert hub.models["me/mine"].files["m.gguf"] == (tmp_path / "m.gguf").read_bytes()


def test_a_mistake_before_the_export_is_one_line(
    run_folder: Path, tmp_path: Path, hub: Hub, run_export: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(expected: str, *arguments: object, token: str = TOKEN) -> None:
        status, _, errors = run_export(*arguments, token=token)
        assert status == 2, errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("error: ") and expected in errors, errors

    export = ["--checkpoint", run_folder, "--out", tmp_path / "out"]
    refuse("--private: only with --push-to-hub", *export, "--private")
    refuse("--push-to-hub: only for exporting", "--from-hf", "x", "--out", tmp_path / "out", "--push-to-hub", "mine")
    refuse("--push-to-hub a/b/c: not a name of a model; expected MODEL or USER", *export, "--push-to-hub", "a/b/c")
    refuse("mine: no token; log in with: hf auth login", *export, "--push-to-hub", "mine", token="")
    refuse("mine: the hub does not accept the token", *export, "--push-to-hub", "mine", token="hf_old")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen, so that connections are refused
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        refuse("mine: the hub cannot be reached", *export, "--push-to-hub", "mine")
    assert list(tmp_path.iterdir()) == [] and hub.models == {}


def test_a_refused_upload_keeps_the_export(
    run_folder: Path, tmp_path: Path, hub: Hub, run_export: Callable[..., Done]
) -> None:
    hub.models["me/public"] = Model(private=False)

    def refuse(expected: str, name: str, *arguments: object, token: str = TOKEN) -> None:
        out = tmp_path / f"of {name.replace('/', '_')}"
        options = ["--checkpoint", run_folder, "--out", out, "--push-to-hub", name, *arguments]
        status, _, errors = run_export(*options, token=token)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1, errors
        assert expected in lines[0] and lines[0].endswith(f"upload it later with: hf upload {name} '{out}'"), errors
        assert (out / "model.safetensors").is_file()

    refuse("the token may not write there", "me/mine", token=READ_TOKEN)
    refuse("the token may not write there", "others/mine")
    refuse("this model exists and is public", "me/public", "--private")
    assert hub.models == {"me/public": Model(private=False)}
    hub.refused = "/commit/"
    refuse("the hub cannot be reached or refuses the upload", "me/full")
    assert hub.models["me/full"].files == {}
