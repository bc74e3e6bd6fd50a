"""Files from outside run no code and name nothing outside their folder; secrets stay where they are."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers import tiny_checkpoint
from hub import REPOSITORY, serve

from pavdm_dist import cli
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands import terminal
from pavdm_dist.commands.progress import ChunkProgress, setup_logging
from pavdm_dist.commands.sample import render_command
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import CheckpointError, ConfigError, MediaError
from pavdm_dist.io.latents import read_latents
from pavdm_dist.io.state import PREVIOUS, STATE, RecordingState, read_state, write_state
from pavdm_dist.models.loading import WEIGHT_NAMES, tensor_files
from pavdm_dist.models.source import Source
from pavdm_dist.redaction import hide_secrets
from pavdm_dist.train import save_reading
from pavdm_dist.train.ranks import World
from pavdm_dist.values.merging import load_config, to_yaml

SECRET = "Tr0ub4dor-and-three-more"
HUB_TOKEN = "hf_" + "aB3" * 11 + "x"


class Code:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists once code from a file was run."""
    pickle.loads(pickle.dumps(Code(tmp_path / "proof")))
    assert (tmp_path / "proof").exists(), "it would run"
    return tmp_path / "mark"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_pickled_weights_are_refused(mark: Path, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.unlink()
    torch.save({"x": Code(mark)}, folder / "transformer/diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no weights"):
        render_command(SampleConfig(prompt="a", model=str(folder), output=str(tmp_path)), False, ChunkProgress)
    torch.save({"x": Code(mark)}, weights)
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        _ = Checkpoint.open(folder).backbone
    assert not mark.exists()


def test_pickled_states_and_latents_are_refused(mark: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2):
        write_state(tmp_path, RecordingState({}, next_chunk=number))
    for dump in (torch.save, lambda code, path: path.write_bytes(pickle.dumps(code))):
        dump(Code(mark), tmp_path / STATE)
        found = read_state(tmp_path)
        assert found is not None and found.next_chunk == 1 and "is torn or not a state" in caplog.text
        dump(Code(mark), tmp_path / "latents.safetensors")
        with pytest.raises(MediaError, match="is not a readable safetensors file"):
            read_latents(tmp_path / "latents.safetensors")
    torch.save(Code(mark), tmp_path / PREVIOUS)
    assert read_state(tmp_path) is None and not mark.exists()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_training_checkpoint_with_code_is_passed_over(
    mark: Path, tmp_path: Path, listed: bool, protocol: int
) -> None:
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.zeros(2)}, "x": Code(mark)}, file, pickle_protocol=protocol)
    manifest: dict[str, Any] = {"files": {}, "identity": {}, "layout": {"zero_stage": 0, "processes": 1}}
    files = {file.name: save_reading.fingerprint(file)} if listed else {}
    (tmp_path / save_reading.MANIFEST).write_text(json.dumps({**manifest, "files": files}))
    found, fault = save_reading._checked(tmp_path, World(0, 1))
    assert found is not None and found.files == files and fault is not None
    assert f"{file.name} is no file of this program, it would run" in fault
    torch.save({"module": {"w": torch.zeros(2)}}, file)
    (tmp_path / save_reading.MANIFEST).write_text(json.dumps(manifest))
    assert save_reading._checked(tmp_path, World(0, 1))[1] is None
    assert not mark.exists()


def test_codec_training_goes_on_from_no_state_with_code(mark: Path, tmp_path: Path) -> None:
    from pavdm_dist.digits.codec_run import load_codec
    from pavdm_dist.digits.codec_training import STATE as CODEC_STATE

    torch.save(Code(mark), tmp_path / CODEC_STATE)
    with pytest.raises(CheckpointError, match="is damaged or not a state of this program"):
        load_codec(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["../weights.safetensors", "/etc/passwd", "a/../../x", "sub/w.safetensors", "..", ".", "", 7]
)
def test_an_index_names_files_beside_it_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    folder = tmp_path / "m" / "transformer"
    folder.mkdir(parents=True)
    (folder / f"{WEIGHT_NAMES[0]}.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(
        CheckpointError, match=r"w is placed in .*, which is no name of a file beside it|w=7: must be text"
    ):
        tensor_files(folder)
    if name == "../weights.safetensors":
        with serve(tmp_path / "m", tmp_path / "cache", monkeypatch) as hub:
            with pytest.raises(CheckpointError, match="which is no name of a file beside it"):
                tensor_files(Source.of(REPOSITORY).part("transformer"))
            assert hub.asked and not any("weights" in file for _, file, _ in hub.asked)


@pytest.mark.parametrize(
    "prompt",
    ["../../a", "/etc/a", "a/../../../a", "..", "~/a", "$(touch mark); a", "`touch mark`", "a\\..\\a", "é" * 300],
)
def test_names_from_prompts_stay_in_the_folder(tmp_path: Path, prompt: str) -> None:
    from pavdm_dist.commands.sample import _wanted

    (shot,) = _wanted(SampleConfig(prompt=prompt, output=str(tmp_path / "out")))
    path = Path(shot.output)
    assert path.parent == tmp_path / "out" and path.resolve().parent == tmp_path / "out"
    assert path.name.startswith("0000-") and len(path.name.encode()) < 100 and path.name.isascii()


SPOKEN = [
    ("s3://user:p@ss@host/x.mp4", "s3://***@host/x.mp4"),
    ("cannot reach 'https://me:pw@host/a b' now", "cannot reach 'https://***@host/a b' now"),
    ("https://host/x?X-Amz-Signature=abc&part=1&token=t", "https://host/x?X-Amz-Signature=***&part=1&token=***"),
    (HUB_TOKEN, "***"),
    ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
    ("{'Authorization': 'Basic eDp5'}", "{'Authorization': 'Basic ***'}"),
    (
        "https://host/x?AWSAccessKeyId=a&key=b&sig=c&api_key=d",
        "https://host/x?AWSAccessKeyId=***&key=***&sig=***&api_key=***",
    ),
    (f"the key {SECRET} is wrong", "the key *** is wrong"),
    ("one more with a comma, " + SECRET, "one more with a comma, ***"),
]
# Words that only look like secrets, or are part of another word.
HARMLESS = [
    "model=owner/name@main, a@b, ray://host:10001, x?y",
    "https://host/x?monkey=1&author=me&tokenizer=bert&keyframe=3&part=2",
    "runs/hf_20260101checkpoint001/model",
    "abfs://container@account.dfs.core.windows.net/v.mp4",
    "/mnt/research-profile/model",
    "/mnt/production/model",
    "tokens/of/all/kinds",
    f"x{SECRET}x",
    "Bearer of light",
]


@pytest.mark.parametrize(("said", "shown"), [*SPOKEN, *zip(HARMLESS, HARMLESS, strict=True)])
def test_secrets_are_hidden_in_whatever_is_said(monkeypatch: pytest.MonkeyPatch, said: str, shown: str) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("CREDENTIAL_PROFILE", "research-profile"),
        ("SECRET_STAGE", "production"),
        ("TOKEN_PATH", "tokens/of/all/kinds"),
    ):
        monkeypatch.setenv(name, value)
    assert hide_secrets(said) == shown
    assert str(ConfigError(said)) == shown


def test_secrets_are_hidden_in_logs_and_tracebacks(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    setup_logging()
    try:
        raise ValueError(f"no answer from ftp://me:pw@host with {SECRET}")
    except ValueError as error:
        logging.getLogger("pavdm_dist.x").exception("wrote %s", "ftp://me:pw@host/v.mp4")
        sys.excepthook(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert said.count("ftp://***@host") >= 3 and "me:pw" not in said and SECRET not in said and "Traceback" in said
    assert terminal.complain(f"interrupted: {SECRET}", 130) == 130
    assert SECRET not in capsys.readouterr().err


def test_a_fault_in_another_thread_or_while_one_is_cleaned_up_loses_secrets_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Careless:
        def __del__(self) -> None:
            raise ValueError("cannot close sftp://me:pw@host")

    def fail() -> None:
        raise ValueError("no answer from ftp://me:pw@host")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    setup_logging()
    thread = threading.Thread(target=fail, name="upload")
    thread.start()
    thread.join()
    Careless()
    gc.collect()
    threading.Thread(target=sys.exit).start()
    said = capsys.readouterr().err
    assert "Exception in thread upload:\nTraceback" in said and "ValueError: no answer from ftp://***@host" in said
    assert "ValueError: cannot close sftp://***@host" in said and "me:pw" not in said and "SystemExit" not in said

    def mine(_: object) -> None:
        """Of a program that uses this one."""

    monkeypatch.setattr(threading, "excepthook", mine)
    setup_logging()
    assert threading.excepthook is mine


def test_settings_lose_what_opens_addresses_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    path = tmp_path / "c.yaml"
    kept = SampleConfig(prompt="http://a:b@c", model=f"/mnt/{SECRET}/{HUB_TOKEN}", output="s3://b/v.mp4?author=me")
    path.write_text(to_yaml(kept))
    assert load_config(SampleConfig, path) == kept
    path.write_text(to_yaml(replace(kept, ray_address="ray://me:pw@head:10001", trace="s3://b/t?sig=abc")))
    assert "ray://***@head:10001" in path.read_text() and "s3://b/t?sig=***" in path.read_text()
    again = ["ray_address=ray://you:pw@head:10001", "trace=t.json"]
    for given, name in ((again[:1], "trace"), (again[1:], "ray_address")):
        with pytest.raises(ConfigError, match=rf"{name}=.*\*\*\* stands for a secret.*; give {name}=\.\.\. again"):
            load_config(SampleConfig, path, given)
    assert load_config(SampleConfig, path, again).trace == "t.json"


def test_no_secret_is_in_what_a_command_leaves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tokens in its environment and in an address that it writes to; looked at half-way, and at the end."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    store = MemoryFileSystem()
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    words = ["sample", "a red three", f"model={model}", "num_frames=21", "chunks_per_segment=1", "save_latents=true"]
    address = f"memory://me:{SECRET}@host/out/v.mp4"

    def left() -> dict[str, bytes]:
        return {Path(name).name: store.cat_file(name) for name in store.find("/")}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ChunkProgress, "chunk", interrupt)
        assert cli.main([*words, f"output={address}"]) == 130
    begun = left()
    assert b"memory://***@host/out/v.mp4" in begun["settings.yaml"] and "state.safetensors" in begun
    assert cli.main([*words, f"output={address}"]) == 0
    made = left()
    assert set(made) == {"v.mp4", "v.json", "v.safetensors"} and b"memory://***@host/out/v.mp4" in made["v.json"]
    assert cli.main([*words, "output=nosuch://me:pw@host/v.mp4"]) == 2
    said = "".join(capsys.readouterr())
    assert "nosuch://***@host" in said and "wrote memory://***@host/out/v.mp4" in said
    for content in [*begun.values(), *made.values(), said.encode()]:
        assert not any(secret in content for secret in (SECRET.encode(), b"hf_aaaa", b"me:pw"))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_cluster_that_asks_for_a_token_gets_it(model: Path, tmp_path: Path) -> None:
    """Ray's own variables reach the cluster that a command starts; the token is in nothing that is left."""
    token = "5" * 64
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    words = ["a red three", f"model={model}", "output=v.mp4", "num_frames=5", "num_stages=1", "trace=t.json"]
    run = [sys.executable, "-m", "pavdm_dist", "sample", "--verbose", *words]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for content in [done.stderr.encode(), *(path.read_bytes() for path in tmp_path.iterdir())]:
        assert token.encode() not in content
