"""Checkpoints from the package, the disk and the Hub; the Hub is a server on this machine.

All cases run with the huggingface_hub that is installed. They run a second time with another one
where ``CHESTXRAY_COVID_OTHER_HUB`` names a folder that holds it, for example from
``pip install --target FOLDER huggingface-hub==1.33.0``.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chestxray_covid import hub
from chestxray_covid.checkpoint import ModelConfig, config_text
from chestxray_covid.errors import CheckpointNotFoundError, ConfigError
from chestxray_covid.hub import DEFAULT_MODEL, bundled_models, resolve
from conftest import Elsewhere
from hub_server import REPO, HubServer, hub_environment, run_python, sha256, with_other_hub
from servers import LocalServer, Reply, Request

CONFIG = ModelConfig(classes=("normal", "covid19"))
WEIGHTS = random.Random(0).randbytes(300_000)
GATE = random.Random(1).randbytes(100_000)
FILES = ("config.json", "gate.safetensors", "lungs.json", "model.safetensors")


def checkpoint(weights: bytes = WEIGHTS, gate: bytes = GATE, **changes: Any) -> dict[str, bytes]:
    """Return the files of a checkpoint; the weights are any bytes, as only their hash matters."""
    further = {"gate.safetensors": gate, "lungs.json": b"{}"}
    config = replace(
        CONFIG,
        weights_sha256=sha256(weights),
        attachments={name: sha256(data) for name, data in further.items()},
        **changes,
    )
    return {"config.json": config_text(config), "model.safetensors": weights, **further}


class Worker:
    """The process of ``hub_worker.py``."""

    def __init__(self, server: HubServer, home: Path, version: str, **environment: str) -> None:
        self.server = server
        more = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        if version == "other":
            more["PYTHONPATH"] = with_other_hub(more["PYTHONPATH"])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=hub_environment(server, home, **more, **environment),
        )

    def ask(self, command: str, wanted: Any = None) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, wanted]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def resolve(self, cache: Path, name: str = REPO, **options: Any) -> Path:
        answer = self.ask("resolve", {"name_or_path": name, "cache_dir": str(cache), **options})
        assert "path" in answer, answer
        return Path(answer["path"])

    def refused(self, cache: Path, name: str = REPO, **options: Any) -> tuple[set[str], str]:
        """Return the names of the error's classes, and its message."""
        answer = self.ask("resolve", {"name_or_path": name, "cache_dir": str(cache), **options})
        assert "error" in answer, answer
        assert len(answer["message"]) < 2000
        return set(answer["error"]), answer["message"]

    def close(self) -> None:
        self._process.communicate("", timeout=30)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module", params=["installed", "other"])
def worker(
    request: pytest.FixtureRequest, server: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    worker = Worker(server, tmp_path_factory.mktemp("home"), request.param)
    yield worker
    worker.close()


@pytest.fixture(scope="module", params=["installed", "other"])
def linkless(
    request: pytest.FixtureRequest, server: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """Return a process on a system without symbolic links, as Windows is for most users."""
    without = {"HF_HUB_DISABLE_SYMLINKS": "1", "HF_HUB_DISABLE_SYMLINKS_WARNING": "1"}
    worker = Worker(server, tmp_path_factory.mktemp("home"), request.param, **without)
    yield worker
    worker.close()


@pytest.fixture
def published(server: HubServer) -> HubServer:
    """Return the server with one sound checkpoint, and nothing asked yet."""
    server.publish(checkpoint())
    server.forget()
    return server


def left_over(cache: Path) -> list[str]:
    """Return the files of a cache that no finished download leaves."""
    blobs = [p for p in cache.glob("models--*/blobs/*") if len(p.name) not in (40, 64)]
    return [p.name for p in blobs]


def assert_sound(folder: Path, expected: dict[str, bytes] | None = None) -> None:
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert found == (expected or checkpoint())


# ---------------------------------------------------------------- bundled and local


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_folder: Path) -> Path:
    """Return a folder of bundled models that holds two."""
    for name in (DEFAULT_MODEL, "another-v2"):
        shutil.copytree(checkpoint_folder, tmp_path / "weights" / name)
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "weights")
    return tmp_path / "weights"


def test_bundled_models_are_found_by_name_and_the_default_without(bundle: Path) -> None:
    assert resolve() == resolve(DEFAULT_MODEL) == bundle / DEFAULT_MODEL
    assert resolve("another-v2") == bundle / "another-v2"
    models = bundled_models()
    assert list(models) == [DEFAULT_MODEL, "another-v2"]
    assert models[DEFAULT_MODEL].classes == ("normal", "pneumonia", "covid19")


def test_the_licence_of_the_weights_names_every_file_with_weights() -> None:
    text = (hub.BUNDLED / "LICENSE").read_text()
    found = {path.name for path in hub.BUNDLED.rglob("*.safetensors")}
    assert len(found) == 4
    assert [name for name in found if name not in text] == []


def test_a_damaged_bundled_config_is_named(bundle: Path) -> None:
    (bundle / "another-v2" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="another-v2"):
        bundled_models()


def test_without_bundled_weights_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "nothing")
    assert bundled_models() == {}
    with pytest.raises(CheckpointNotFoundError, match=f"no bundled model '{DEFAULT_MODEL}'"):
        resolve()


def test_a_folder_is_itself_and_its_subfolder_a_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "user" / "model").mkdir(parents=True)
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path), subfolder="user/model") == tmp_path / "user" / "model"


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "/no/such/folder", "", "user/", "user/na me", Path("user/model")]
)
def test_what_is_no_folder_and_no_repository_is_not_found(name: Any) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is no checkpoint folder, no bundled model"):
        resolve(name)


def test_the_local_copy_of_an_address_is_no_checkpoint_folder(checkpoint_folder: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"^s3://bucket/model is no"):
        resolve(Elsewhere("s3://bucket/model", checkpoint_folder))


@pytest.mark.parametrize("name", [None, DEFAULT_MODEL])
@pytest.mark.parametrize("options", [{"revision": "v9"}, {"subfolder": "x"}])
def test_a_bundled_model_has_neither_revision_nor_subfolder(name: Any, options: Any) -> None:
    with pytest.raises(ValueError, match=f"revision and subfolder .* {DEFAULT_MODEL} is bundled"):
        resolve(name, **options)


@pytest.mark.parametrize("subfolder", ["../x", "/etc", "a//b", "a\\b"])
def test_a_subfolder_leads_nowhere_else(subfolder: str) -> None:
    with pytest.raises(ValueError, match="subfolder "):
        resolve(REPO, subfolder=subfolder)


@pytest.mark.parametrize(
    "revision",
    [
        "../../evil",
        "..",
        "a/../../b",
        "/etc/x",
        r"..\x",
        "a//b",
        "x\0",
        "\n",
        ".. /x",
        "C:x",
        "\udcff",
    ],
)
def test_a_revision_is_no_path_out_of_the_cache(revision: str) -> None:
    with pytest.raises(ValueError, match=r"^revision must be a branch, tag or commit"):
        resolve(REPO, revision=revision)


@pytest.mark.parametrize(
    "revision", ["refs/pr/1", "feature/#2+cpu", "aux", 'a|"b"<c>', "v1.0", "ü"]
)
def test_a_revision_may_have_any_name_of_a_branch(revision: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is no checkpoint folder"):
        resolve(tmp_path / "none", revision=revision)


@pytest.mark.parametrize("option", [{"revision": 1.0}, {"subfolder": Path("sub")}])
@pytest.mark.parametrize("name", [None, REPO])
def test_a_revision_and_a_subfolder_are_text(name: str | None, option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^(revision|subfolder) must be a string, got "):
        resolve(name, **option)


# ---------------------------------------------------------------- from the Hub


def test_a_checkpoint_comes_whole_and_its_config_first(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    folder = worker.resolve(tmp_path)
    assert_sound(folder)
    assert left_over(tmp_path) == []
    gets = [line for line in published.asked() if line.startswith("GET")]
    assert [line.rpartition("/")[2] for line in gets] == [
        *("config.json", "model.safetensors"),
        *("gate.safetensors", "lungs.json"),
    ]
    version = worker.ask("version")["version"]
    agents = {r.headers.get("User-Agent", r.headers.get("user-agent")) for r in published.requests}
    assert all(f"hf_hub/{version}" in str(agent) for agent in agents)
    assert any(str(agent).startswith("chestxray_covid/") for agent in agents)


def test_a_cached_branch_costs_one_request_and_a_commit_none(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    folder = worker.resolve(tmp_path)
    published.forget()
    assert worker.resolve(tmp_path) == folder
    assert published.asked() == ["HEAD /user/model/resolve/main/config.json"]
    published.forget()
    assert worker.resolve(tmp_path, revision=folder.name) == folder
    assert worker.resolve(tmp_path, local_files_only=True) == folder
    assert published.asked() == []
    assert worker.resolve(tmp_path, force_download=True) == folder
    assert published.payloads() == 1


def test_a_forced_download_that_fails_leaves_what_was_cached(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    folder = worker.resolve(tmp_path)
    published.faults["GET", "model.safetensors"] = lambda request, good: Reply(status=404)
    worker.refused(tmp_path, force_download=True)
    assert worker.resolve(tmp_path, local_files_only=True) == folder
    assert_sound(folder)
    assert left_over(tmp_path) == []


def test_an_update_that_fails_halfway_leaves_the_older_checkpoint(
    worker: Worker, linkless: Worker, published: HubServer, tmp_path: Path
) -> None:
    newer = checkpoint(random.Random(3).randbytes(300_000))
    for number, process in enumerate((worker, linkless)):
        cache = tmp_path / str(number)
        published.publish(checkpoint())
        folder = process.resolve(cache)
        published.publish(newer)
        published.faults["GET", "model.safetensors"] = lambda request, good: Reply(status=404)
        process.refused(cache)
        assert process.resolve(cache, local_files_only=True) == folder
        assert_sound(folder)
        published.faults.clear()
        updated = process.resolve(cache)
        assert process.resolve(cache, local_files_only=True) == updated
        assert_sound(updated, newer)


def test_what_is_cached_serves_others_while_it_is_fetched_again(
    worker: Worker, linkless: Worker, published: HubServer, tmp_path: Path
) -> None:
    for number, process in enumerate((worker, linkless)):
        cache, seen = tmp_path / str(number), []
        folder = process.resolve(cache)

        def look(request: Any, good: Reply, folder: Path = folder, seen: Any = seen) -> None:
            found = folder / "model.safetensors"
            seen.append(found.is_file() and found.read_bytes() == WEIGHTS)

        published.faults["GET", "model.safetensors"] = look
        child = process.ask("start", {"name_or_path": REPO, "cache_dir": str(cache), **FORCED})
        assert process.ask("finish", child)["path"] == str(folder)
        assert seen == [True]
        assert_sound(folder)
        assert left_over(cache) == []


FORCED = {"force_download": True}


def test_branches_tags_commits_and_subfolders_are_told_apart(
    worker: Worker, server: HubServer, tmp_path: Path
) -> None:
    server.forget()
    older = checkpoint(threshold=0.25)
    first = server.publish(older, "user/many", "v1")
    both = {**checkpoint(), **{f"small/x/{k}": v for k, v in older.items()}}
    server.publish(both, "user/many")
    assert_sound(worker.resolve(tmp_path, "user/many", revision="v1"), older)
    assert_sound(worker.resolve(tmp_path, "user/many", revision=first), older)
    assert worker.resolve(tmp_path, "user/many").name == server.heads["user/many", "main"]
    inner = worker.resolve(tmp_path, "user/many", subfolder="small/x")
    assert_sound(inner, older)
    server.forget()
    commit = server.heads["user/many", "main"]
    assert worker.resolve(tmp_path, "user/many", subfolder="small/x", revision=commit) == inner
    assert server.asked() == []


def test_a_branch_that_moved_to_a_cached_commit_is_there_without_the_network(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    older = worker.resolve(tmp_path)
    newer = published.publish(checkpoint(threshold=0.3))
    worker.resolve(tmp_path, revision=newer)
    assert worker.resolve(tmp_path, local_files_only=True) == older
    assert worker.resolve(tmp_path).name == newer
    assert worker.resolve(tmp_path, local_files_only=True).name == newer


def test_a_branch_that_moved_is_followed(worker: Worker, server: HubServer, tmp_path: Path) -> None:
    server.forget()
    for threshold in (0.3, 0.6):
        files = checkpoint(threshold=threshold)
        server.publish(files, "user/moves")
        assert_sound(worker.resolve(tmp_path, "user/moves"), files)
    assert server.payloads() == 1  # the weights are the same


@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("user/nothing", {}, "RepositoryNotFoundError"),
        (REPO, {"revision": "v9"}, "RevisionNotFoundError"),
        (REPO, {"revision": "0" * 40}, "RevisionNotFoundError"),
        ("user/gated", {"token": False}, "GatedRepoError"),
        (REPO, {"subfolder": "nothing"}, "RemoteEntryNotFoundError"),
        ("user/no--name", {}, "HFValidationError"),
        (REPO, {"local_files_only": True}, "LocalEntryNotFoundError"),
        (REPO, {"token": True}, "LocalTokenNotFoundError"),
    ],
)
def test_errors_that_users_of_the_hub_know_keep_their_names(
    worker: Worker, published: HubServer, tmp_path: Path, name: str, options: Any, family: str
) -> None:
    published.publish(checkpoint(), "user/gated")
    published.gated = {"user/gated"}
    families, message = worker.refused(tmp_path, name, **options)
    assert family in families
    assert families & {"OSError", "ValueError"}
    told = f"There is no folder {name} either; paths are relative to " in message
    without = {"RepositoryNotFoundError", "LocalEntryNotFoundError", "HFValidationError"}
    assert told == bool(families & without)
    assert published.payloads() == 0


def test_a_gated_repository_opens_for_the_right_token(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    published.publish(checkpoint(), "user/gated")
    published.gated = {"user/gated"}
    assert_sound(worker.resolve(tmp_path, "user/gated", token=published.token))


OTHER_KINDS: dict[str, tuple[dict[str, bytes], str]] = {
    "BERT": ({"config.json": b'{"model_type": "bert"}'}, "format_version is 'None'"),
    "timm": (
        {"config.json": b'{"architecture": "densenet121", "num_classes": 2}'},
        "format_version is 'None'",
    ),
    "a page": ({"config.json": b"<html></html>"}, "cannot be read as JSON"),
    "a later format": ({"config.json": b'{"format_version": 9}'}, "expected 2"),
    "two MB": ({"config.json": b" " * 2_000_000}, "expected at most 500000"),
    "weights too large": ({"model.safetensors": bytes(100_000_001)}, "expected at most 100000000"),
    "attachment too large": ({"gate.safetensors": bytes(20_000_001)}, "expected at most 20000000"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_checkpoint_of_another_kind_is_refused_before_its_weights_come(
    worker: Worker, server: HubServer, tmp_path: Path, kind: str
) -> None:
    server.forget()
    files, reason = OTHER_KINDS[kind]
    server.publish({**checkpoint(), **files}, "user/other")
    families, message = worker.refused(tmp_path, "user/other")
    assert {"CheckpointError", "ChestXrayError", "ValueError"} <= families
    assert "user/other is no checkpoint of chestxray-covid" in message
    assert reason in message
    # an attachment is looked at after the weights have come
    assert server.payloads() == (1 if kind == "attachment too large" else 0)


def test_a_repository_without_safetensors_is_not_searched_for_pickles(
    worker: Worker, server: HubServer, tmp_path: Path
) -> None:
    server.forget()
    files = checkpoint()
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    server.publish(files, "user/pickled")
    families, message = worker.refused(tmp_path, "user/pickled")
    assert "RemoteEntryNotFoundError" in families
    assert "model.safetensors" in message
    assert not [line for line in server.asked() if ".bin" in line]


@pytest.mark.parametrize("name", ["model.safetensors", "lungs.json"])
def test_a_repository_whose_config_names_other_bytes_contradicts_itself(
    worker: Worker, server: HubServer, tmp_path: Path, name: str
) -> None:
    server.forget()
    server.publish(checkpoint() | {name: b"others"}, "user/torn")
    families, message = worker.refused(tmp_path, "user/torn")
    assert {"IntegrityError", "ChestXrayError", "OSError", "ValueError"} <= families
    assert f"user/torn contradicts itself: {name}" in message
    assert server.payloads() == (0 if name == "model.safetensors" else 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Repo-Commit": "../../../etc"},
        {"X-Repo-Commit": ""},
        {"ETag": '"../../x"', "X-Linked-Etag": '"../../x"'},
        {"ETag": '"' + "0" * 41 + '"', "X-Linked-Etag": ""},
    ],
)
def test_a_server_that_is_no_hub_cannot_choose_where_its_bytes_go(
    worker: Worker, published: HubServer, tmp_path: Path, headers: dict[str, str]
) -> None:
    published.faults["HEAD", "config.json"] = lambda request, good: replace(
        good, headers={**good.headers, **headers}
    )
    families, message = worker.refused(tmp_path / "cache")
    assert "DownloadError" in families
    assert "this is no Hub" in message
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_a_password_in_the_endpoint_is_in_no_error(published: HubServer, tmp_path: Path) -> None:
    place = published.url.replace("://", "://me:secret@")
    worker = Worker(published, tmp_path / "home", "installed", HF_ENDPOINT=place)
    said = []
    try:
        published.faults["HEAD", "config.json"] = lambda request, good: replace(
            good, headers={**good.headers, "X-Repo-Commit": ""}
        )
        said += [worker.refused(tmp_path / "cache")[1]]
        for status in (401, 403, 404, 500):
            published.faults["HEAD", "config.json"] = lambda *_, s=status: Reply(status=s)
            said += [worker.refused(tmp_path / "cache")[1]]
        del published.faults["HEAD", "config.json"]
        published.faults["GET", "config.json"] = lambda request, good: Reply(status=403)
        said += [worker.refused(tmp_path / "cache")[1]]
    finally:
        worker.close()
    assert f"{published.url} answers for {REPO}, config.json" in said[0]
    assert all(published.url in one and "secret" not in one for one in said), said


def test_a_password_in_the_endpoint_is_sent_to_it(published: HubServer, tmp_path: Path) -> None:
    place = published.url.replace("://", "://me:s%20t@")
    expected = f"Basic {b64encode(b'me:s t').decode()}"

    def knows(request: Request, good: Reply) -> Reply:
        sent = request.headers.get("Authorization", request.headers.get("authorization"))
        return good if sent == expected else Reply(status=401)

    for method in ("HEAD", "GET"):
        for name in FILES:
            published.faults[method, name] = knows
    for number, token in enumerate(("", published.token)):
        more = {"HF_TOKEN": token} if token else {}
        worker = Worker(published, tmp_path / "home", "installed", HF_ENDPOINT=place, **more)
        try:
            assert_sound(worker.resolve(tmp_path / str(number)))
        finally:
            worker.close()


def test_a_current_folder_that_is_gone_is_no_reason_for_another_error(
    server: HubServer, tmp_path: Path
) -> None:
    code = """
import os, pathlib, sys
from chestxray_covid import hub
os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])
try: hub.resolve("user/nothing", cache_dir=sys.argv[2], local_files_only=True)
except Exception as error: print(f'["{type(error).__name__}"]')
"""
    gone = tmp_path / "gone"
    gone.mkdir()
    environment = hub_environment(server, tmp_path / "home")
    assert run_python(code, environment, gone, tmp_path / "cache") == ["LocalEntryNotFoundError"]


def test_a_lack_of_open_files_is_no_fault_of_the_network_or_of_a_file(
    published: HubServer, tmp_path: Path
) -> None:
    pytest.importorskip("resource", reason="needs the limits of POSIX")
    code = """
import json, os, resource, sys
from chestxray_covid import hub
def resolved(**options):
    try: return str(hub.resolve(sys.argv[2], cache_dir=sys.argv[1], **options))
    except Exception as error: return type(error).__name__
os.environ["HF_TOKEN"] = "hf_x"  # no file is asked for one
first = resolved()
last = os.open(os.devnull, os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, last + 1))
asked = ({"local_files_only": True}, {}, {"force_download": True})
print(json.dumps([first, *(resolved(**options) for options in asked)]))
"""
    environment = hub_environment(published, tmp_path / "home")
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), REPO]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, *others = json.loads(done.stdout)
    assert Path(first, "model.safetensors").read_bytes() == WEIGHTS
    assert others == ["ResourceError"] * 3


# ---------------------------------------------------------------- row 1: cut downloads


@pytest.mark.slow
@pytest.mark.parametrize("cut", [65_536, 1_000_000, 9_000_000])
def test_a_download_that_is_cut_again_and_again_finishes(
    worker: Worker, server: HubServer, tmp_path: Path, cut: int
) -> None:
    server.forget()
    weights = random.Random(2).randbytes(30_000_000)
    server.publish(checkpoint(weights), "user/large")
    server.faults["GET", "model.safetensors"] = lambda request, good: replace(good, cut_after=cut)
    folder = worker.resolve(tmp_path, "user/large")
    assert (folder / "model.safetensors").read_bytes() == weights
    sent = sum(count for path, count in server.sent.items() if path.endswith("/model.safetensors"))
    assert sent <= 1.1 * len(weights)
    assert left_over(tmp_path) == []


# ---------------------------------------------------------------- row 2: wrong bytes


@pytest.mark.parametrize(
    ("name", "good"), [("gate.safetensors", GATE), ("model.safetensors", WEIGHTS)]
)
def test_one_wrong_byte_is_fetched_again_once_and_then_refused(
    worker: Worker, published: HubServer, tmp_path: Path, name: str, good: bytes
) -> None:
    positions = random.Random(3).sample(range(len(good)), 20)
    for number, position in enumerate(positions):
        published.forget()
        wrong = bytearray(good)
        wrong[position] ^= 1 << (position % 8)
        for_ever = number % 2 == 0
        published.faults["GET", name] = lambda request, right, w=bytes(wrong), f=for_ever: (
            replace(right, body=w) if f or request.number == 1 else right
        )
        cache = tmp_path / str(number)
        if for_ever:
            families, message = worker.refused(cache)
            assert "IntegrityError" in families
            assert f"{name} gave other bytes than the published ones, twice" in message
            assert not list(cache.rglob(name))
        else:
            assert_sound(worker.resolve(cache))
        assert published.payloads(name) == 2
        assert left_over(cache) == []
        assert sha256(good) not in {p.name for p in cache.rglob("*")} or not for_ever


# ---------------------------------------------------------------- row 3: damaged later

DAMAGES = {
    "cut": lambda data: data[:-1],
    "cut to half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b" ",
    "page": lambda data: b"<html></html>",
    "zeros within": lambda data: data[:100] + bytes(50) + data[150:],
    "missing": lambda data: None,
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "lungs.json"])
def test_a_damaged_cache_heals_with_the_network_and_is_told_without(
    worker: Worker, published: HubServer, tmp_path: Path, name: str
) -> None:
    folder = worker.resolve(tmp_path)
    good = (folder / name).read_bytes()
    healed = 0
    for damage in DAMAGES.values():
        changed = damage(good)
        if changed == good:
            continue
        blob = (folder / name).resolve()
        if changed is None:
            blob.unlink()
        else:
            blob.write_bytes(changed)
        families, message = worker.refused(tmp_path, local_files_only=True)
        assert families & {"IntegrityError", "LocalEntryNotFoundError"}
        assert name in message
        published.forget()
        # by commit, too: what is cached is not simply believed
        revision = folder.name if healed % 2 else None
        assert_sound(worker.resolve(tmp_path, revision=revision))
        assert published.payloads(name) == 1
        assert left_over(tmp_path) == []
        healed += 1
    assert healed >= 9


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "lungs.json"])
def test_a_damaged_copy_heals_where_there_are_no_links(
    linkless: Worker, published: HubServer, tmp_path: Path, name: str
) -> None:
    folder = linkless.resolve(tmp_path)
    copy = folder / name
    assert not copy.is_symlink()
    good = copy.read_bytes()
    changes = [damage(good) for damage in DAMAGES.values()]
    changes.append(good.replace(b'"threshold": 0.5,', b'"threshold": 0.4,'))  # still a config
    healed = 0
    for number, changed in enumerate(changes):
        if changed == good:
            continue
        if changed is None:
            copy.unlink()
        else:
            copy.write_bytes(changed)
        if number % 3 == 0 and changed is not None:
            for blob in tmp_path.glob("models--*/blobs/*"):
                blob.write_bytes(b"damaged, too")
        families, message = linkless.refused(tmp_path, local_files_only=True)
        assert families & {"IntegrityError", "LocalEntryNotFoundError"}
        assert name in message
        published.forget()
        revision = folder.name if healed % 2 else None
        assert_sound(linkless.resolve(tmp_path, revision=revision))
        assert linkless.resolve(tmp_path, local_files_only=True) == folder
        healed += 1
    assert healed >= 9
    published.forget()
    assert linkless.resolve(tmp_path, revision=folder.name) == folder
    assert published.asked() == []


def test_a_copy_of_another_library_is_compared_with_the_hub_once(
    linkless: Worker, published: HubServer, tmp_path: Path
) -> None:
    folder = linkless.resolve(tmp_path)
    for blob in tmp_path.glob("models--*/blobs/*"):
        blob.unlink()  # huggingface_hub moves the bytes, and keeps no hash of small files
    assert linkless.resolve(tmp_path, local_files_only=True) == folder
    published.forget()
    assert linkless.resolve(tmp_path, revision=folder.name) == folder
    assert published.asked() == [f"HEAD /user/model/resolve/{folder.name}/config.json"]
    published.forget()
    assert linkless.resolve(tmp_path, revision=folder.name) == folder
    assert published.asked() == []
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"threshold": 0.5', '"threshold": 0.4')
    )
    families, message = linkless.refused(tmp_path, local_files_only=True)
    assert "IntegrityError" in families
    assert "config.json is damaged" in message


def test_what_was_damaged_is_refused_where_the_hub_is_out_of_reach(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    folder = worker.resolve(tmp_path)
    for method in ("HEAD", "GET"):
        for name in FILES:
            published.faults[method, name] = lambda request, good: Reply(status=503)
    assert worker.resolve(tmp_path) == folder  # the cache is sound, so it serves
    (folder / "model.safetensors").resolve().write_bytes(b"damaged")
    families, message = worker.refused(tmp_path)
    assert "IntegrityError" in families
    assert "model.safetensors is damaged" in message


# ---------------------------------------------------------------- row 4: kill -9


def test_a_killed_download_never_leaves_a_partial_file_in_use(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    slow = dict.fromkeys(("model.safetensors", "gate.safetensors"), 0.003)
    delays = random.Random(4)
    killed = number = 0
    while killed < 50:
        assert number < 200, "most downloads ended before they could be killed"
        cache = tmp_path / str(number // 5)  # five kills in a row, then a run to the end
        published.faults = {
            ("GET", name): (lambda request, good, p=pause: replace(good, pause_s=p))
            for name, pause in slow.items()
        }
        child = worker.ask("start", {"name_or_path": REPO, "cache_dir": str(cache)})
        time.sleep(delays.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        answer = worker.ask("finish", child)
        killed += answer is None
        published.faults = {}
        assert len(left_over(cache)) <= 1
        if cache.exists():  # and after each of them, of a copy
            copy = Path(shutil.copytree(cache, tmp_path / f"copy {number}", symlinks=True))
            assert_sound(worker.resolve(copy))
            shutil.rmtree(copy)
        if number % 5 == 4:
            assert_sound(worker.resolve(cache))
            assert left_over(cache) == []
        number += 1


def test_parts_that_nobody_wants_any_more_go_after_a_day(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    blobs = tmp_path / "models--user--model" / "blobs"
    blobs.mkdir(parents=True)
    old, young = (blobs / f".{n * 16}-00000000.part" for n in "ab")
    for part in (old, young):
        part.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)
    worker.resolve(tmp_path)
    assert left_over(tmp_path) == [young.name]


# ---------------------------------------------------------------- row 5: at the same time


@pytest.mark.parametrize("locks", [True, False])
def test_eight_processes_at_once_all_get_a_sound_checkpoint(
    worker: Worker, published: HubServer, tmp_path: Path, locks: bool
) -> None:
    for number in range(5):
        published.forget()
        cache = tmp_path / str(number)
        wanted = {"name_or_path": REPO, "cache_dir": str(cache), "locks": locks}
        answers = worker.ask("together", [wanted] * 8)
        assert all("path" in answer for answer in answers), answers
        assert len({answer["path"] for answer in answers}) == 1
        assert_sound(Path(answers[0]["path"]))
        if locks:
            assert published.payloads() <= 2
            assert left_over(cache) == []


# ---------------------------------------------------------------- row 6: read-only cache


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that every user of the machine may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_cache_serves_what_it_has_and_tells_what_it_has_not(
    worker: Worker, published: HubServer, open_folder: Path
) -> None:
    folder = worker.resolve(open_folder / "full")
    (open_folder / "empty").mkdir()
    for path in open_folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o555)
    # without a token: the folder where it would be stored is closed to others
    wanted = {"name_or_path": REPO, "as_nobody": True, "token": False}
    full = {**wanted, "cache_dir": str(open_folder / "full")}
    empty = {**wanted, "cache_dir": str(open_folder / "empty")}
    sound, missing = worker.ask("together", [full, empty])
    assert sound.get("path") == str(folder), sound
    assert "DownloadError" in missing["error"]
    assert "HF_HOME or HF_HUB_CACHE" in missing["message"]
    published.publish(checkpoint(threshold=0.9))
    (moved,) = worker.ask("together", [full])
    assert "DownloadError" in moved["error"]
    assert "cache cannot be written" in moved["message"]
    assert "HF_HOME or HF_HUB_CACHE" in moved["message"]


# ---------------------------------------------------------------- row 8: strange replies

PAGE = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"
STRANGE: dict[str, dict[str, Any]] = {
    "a page": {"body": PAGE},
    "404": {"status": 404, "body": PAGE},
    "403": {"status": 403, "body": PAGE},
    "429 for ever": {"status": 429, "headers": {"Retry-After": "0"}},
    "500 for ever": {"status": 500},
    "empty": {"body": b""},
    "too short a length": {"headers": {"Content-Length": "10"}},
    "too long a length": {"headers": {"Content-Length": "99999999"}},
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_reply_is_never_taken_for_the_file(
    worker: Worker, published: HubServer, tmp_path: Path, kind: str, name: str
) -> None:
    published.faults["GET", name] = lambda request, good: replace(good, **STRANGE[kind])
    families, message = worker.refused(tmp_path)
    assert {"DownloadError", "ChestXrayError", "OSError"} <= families
    assert name in message
    assert not list(tmp_path.rglob(name))
    published.forget()
    assert_sound(worker.resolve(tmp_path))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("kind", ["chunked", "gzip", "429 once", "500 once"])
def test_a_reply_that_is_right_after_all_is_used(
    worker: Worker, published: HubServer, tmp_path: Path, kind: str
) -> None:
    def answer(request: Any, good: Reply) -> Reply:
        if kind == "chunked":
            return replace(good, chunked=True)
        if kind == "gzip":
            packed = gzip.compress(good.body)
            return replace(good, body=packed, headers={"Content-Encoding": "gzip"})
        if request.number == 1:
            return Reply(status=int(kind[:3]), headers={"Retry-After": "0"})
        return good

    for name in FILES:
        published.faults["GET", name] = answer
    assert_sound(worker.resolve(tmp_path))


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_hub_that_does_not_say_what_it_has_is_an_error_of_the_download(
    worker: Worker, published: HubServer, tmp_path: Path, status: int
) -> None:
    published.faults["HEAD", "config.json"] = lambda request, good: Reply(status=status)
    families, message = worker.refused(tmp_path)
    assert {"DownloadError", "OSError"} <= families
    assert str(status) in message
    assert f"There is no folder {REPO} either" in message


@pytest.mark.parametrize("version", ["installed", "other"])
@pytest.mark.parametrize("proxy", ["http://[::1", "socks5://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_an_error_of_the_download(
    published: HubServer, tmp_path: Path, version: str, proxy: str
) -> None:
    worker = Worker(published, tmp_path, version, ALL_PROXY=proxy)
    try:
        families, message = worker.refused(tmp_path / "cache")
        assert {"DownloadError", "OSError"} <= families
        assert "Check the network, its proxies" in message
    finally:
        worker.close()


def test_of_a_path_that_could_be_no_repository_it_is_said_that_there_is_no_folder() -> None:
    with pytest.raises(ValueError, match="Repo id must use") as caught:
        resolve("../nothing")
    assert "There is no folder ../nothing either; paths are" in caught.value.__notes__[0]


# ---------------------------------------------------------------- row 9: the token


def test_a_token_that_the_hub_does_not_know_is_what_the_error_speaks_of(
    published: HubServer, worker: Worker, tmp_path: Path
) -> None:
    unknown = Reply(
        status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}
    )
    published.faults["HEAD", "config.json"] = lambda request, reply: (
        unknown if "authorization" in {name.lower() for name in request.headers} else None
    )
    names, message = worker.refused(tmp_path, token="hf_revoked")
    assert "DownloadError" in names
    assert "Check the token: token=, HF_TOKEN" in message
    assert "hf_revoked" not in message
    assert_sound(worker.resolve(tmp_path, token=False))


@pytest.mark.parametrize("token", ["hf_se\x01cret", "hf_se cret", "hf_secr\u00e9t", " \n"])
def test_a_token_that_no_header_can_hold_is_refused_unseen(token: str) -> None:
    with pytest.raises(ValueError, match=r"^token must be printable ASCII") as caught:
        resolve(REPO, token=token)
    assert caught.value.__cause__ is None


def test_a_token_may_end_as_the_line_of_its_file_does(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    published.publish(checkpoint(), "user/gated")
    published.gated = {"user/gated"}
    assert_sound(worker.resolve(tmp_path, "user/gated", token=f"{published.token}\n"))


@pytest.mark.parametrize("version", ["installed", "other"])
@pytest.mark.parametrize("stored", ["file", "HF_TOKEN"])
def test_a_stored_token_that_no_header_can_hold_is_not_shown(
    published: HubServer, tmp_path: Path, version: str, stored: str
) -> None:
    token = "hf_se\x01cret"
    (tmp_path / "token").write_text(token)
    environment = {"HF_TOKEN": token} if stored == "HF_TOKEN" else {}
    worker = Worker(published, tmp_path, version, **environment)
    try:
        families, message = worker.refused(tmp_path / "cache")
        assert {"DownloadError", "OSError"} <= families
        assert "The token must be printable ASCII" in message
        assert "hf auth login" in message
        assert "cret" not in message
        assert_sound(worker.resolve(tmp_path / "cache", token=False))
        assert_sound(worker.resolve(tmp_path / "cache", local_files_only=True))
    finally:
        worker.close()


def test_the_token_never_reaches_another_server(
    worker: Worker, published: HubServer, tmp_path: Path
) -> None:
    with LocalServer(lambda request: Reply(body=WEIGHTS)) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")  # another port is enough for us
        away = {"Location": f"{elsewhere}/signed/model.safetensors"}
        for method in ("HEAD", "GET"):
            published.faults[method, "model.safetensors"] = lambda request, good: replace(
                good, status=302, headers={**good.headers, **away}, body=b""
            )
        for number in range(20):
            folder = worker.resolve(tmp_path / str(number), token=published.token)
            assert_sound(folder)
        assert other.count("/signed/model.safetensors") == 20
        seen = [k for r in other.requests for k in r.headers if k.lower() == "authorization"]
        assert seen == []
    mine = [
        r.headers.get("Authorization", r.headers.get("authorization")) for r in published.requests
    ]
    assert f"Bearer {published.token}" in mine


# ---------------------------------------------------------------- the environment


@pytest.mark.parametrize("version", ["installed", "other"])
def test_the_variables_of_the_hub_are_honoured(
    published: HubServer, tmp_path: Path, version: str
) -> None:
    def ask(**environment: str) -> Any:
        worker = Worker(published, tmp_path / "home", version, **environment)
        try:
            return worker.ask("resolve", {"name_or_path": REPO})
        finally:
            worker.close()

    folder = Path(ask()["path"])  # HF_ENDPOINT
    assert folder.is_relative_to(tmp_path / "home" / "hub")  # HF_HOME
    published.forget()
    assert ask(HF_HUB_OFFLINE="1")["path"] == str(folder)
    missing = ask(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "other"))
    assert "LocalEntryNotFoundError" in missing["error"]
    assert "model" in missing["message"]
    assert published.asked() == []
    (folder / "model.safetensors").resolve().write_bytes(b"")
    damaged = ask(HF_HUB_OFFLINE="1")
    assert "IntegrityError" in damaged["error"]
    assert "is damaged" in damaged["message"]
