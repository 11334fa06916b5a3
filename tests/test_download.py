from __future__ import annotations

import json
import os
import random
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chestxray_covid.datasets.cohen import CohenCovidDataset, read_metadata
from chestxray_covid.datasets.download import (
    RECORD_NAME,
    GitHubEndpoints,
    download_cohen,
    download_kermany,
    recorded_commit,
)
from chestxray_covid.datasets.kermany import KermanyPneumoniaDataset
from chestxray_covid.errors import (
    ArchiveError,
    DatasetNotFoundError,
    DownloadError,
    IntegrityError,
    MissingExtraError,
)
from servers import (
    GitHubServer,
    LocalServer,
    Reply,
    Request,
    download_without_locks,
    forkserver,
    git_blob_sha1,
)

METADATA = """Patientid,finding, view,modality,folder, filename,
1,COVID-19,PA,X-ray,images,a.jpeg,
1,COVID-19,AP,X-ray,images,b (1) #2 %20.JPG,
2,No Finding,PA,X-ray,images,c.png,
2,No Finding,PA,X-ray,images,c.png,
3,SARS,L,X-ray,images,lost.png,
4,COVID-19,Axial,CT,volumes,d.nii.gz,
5,Streptococcus,PA,X-ray,,e.jpg,
"""
IMAGES = {
    f"images/{name}": random.Random(name).randbytes(size)
    for name, size in [("a.jpeg", 90_000), ("b (1) #2 %20.JPG", 50_000), ("c.png", 70_000)]
}
BESIDE = {
    "README.md": b"# COVID-19 image data collection\n",
    "SCHEMA.md": b"",
    "LICENSE.txt": b"licences differ by image\n",
    "annotations/lungVAE-masks/a_mask.png": b"mask",
}
UNWANTED = {
    "images/FAFA-tripwire.jpg": b"not to be fetched",
    "volumes/README.md": b"CT volumes are elsewhere",
    "annotations/scores.csv": b"1,2\n",
    "docs/README.md": b"other",
    "script.py": b"print()",
}
WANTED = {"metadata.csv": METADATA.encode(), "images/e.jpg": b"e", **IMAGES, **BESIDE}
QUICK = {"progress": False, "backoff_s": 0.001, "timeout_s": 5}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def github() -> Iterator[GitHubServer]:
    with GitHubServer({**WANTED, **UNWANTED}) as server:
        yield server


def get(github: GitHubServer, root: Path, **options: Any) -> Path:
    return download_cohen(root, endpoints=github.endpoints, **{**QUICK, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files but the record and the lock."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    ours = {RECORD_NAME, ".download.lock"}
    return {name: path.read_bytes() for name, path in files.items() if name not in ours}


def test_metadata_papers_masks_and_the_listed_images_arrive(
    github: GitHubServer, tmp_path: Path
) -> None:
    root = get(github, tmp_path / "cohen")
    assert root == tmp_path / "cohen"
    assert contents(root) == WANTED
    assert set(github.fetched()) == set(WANTED) - {"SCHEMA.md"}  # which is empty
    assert set(github.fetched().values()) == {1}


def test_the_record_says_where_the_files_are_from(github: GitHubServer, tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    record = json.loads((get(github, tmp_path) / RECORD_NAME).read_bytes())
    assert record["repository"] == "owner/covid-data"
    assert record["commit"] == github.commit
    assert record["ref"] == "master"
    assert record["count"] == len(WANTED)
    assert before <= datetime.fromisoformat(record["date"]) <= datetime.now(UTC)
    assert record["tree"]["images/a.jpeg"] == [90_000, git_blob_sha1(IMAGES["images/a.jpeg"])]


def test_a_second_run_asks_for_the_commit_alone(github: GitHubServer, tmp_path: Path) -> None:
    record = (get(github, tmp_path) / RECORD_NAME).read_bytes()
    github.requests.clear()
    get(github, tmp_path)
    assert [r.path for r in github.requests] == ["/api/repos/owner/covid-data/commits/master"]
    assert (tmp_path / RECORD_NAME).read_bytes() == record


@pytest.mark.parametrize("form", [str.lower, str.upper])
def test_a_known_commit_needs_no_network(
    github: GitHubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: Callable[[str], str],
) -> None:
    get(github, tmp_path)
    github.requests.clear()
    get(github, tmp_path, ref=form(github.commit))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    get(github, tmp_path, ref=form(github.commit))
    assert github.requests == []


def test_offline_data_that_are_not_there_are_an_error(
    github: GitHubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "YES")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        get(github, tmp_path)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        get(github, tmp_path, ref=github.commit)
    assert github.requests == []


def test_a_full_commit_is_not_looked_up(github: GitHubServer, tmp_path: Path) -> None:
    get(github, tmp_path, ref=github.commit)
    assert not any("/commits/" in request.path for request in github.requests)
    assert contents(tmp_path) == WANTED


@pytest.mark.parametrize("damage", ["lost", "flipped", "cut"])
def test_damaged_files_are_healed_alone(github: GitHubServer, tmp_path: Path, damage: str) -> None:
    get(github, tmp_path)
    path = tmp_path / "images" / "c.png"
    data = path.read_bytes()
    path.unlink()
    if damage != "lost":
        path.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "flipped" else b""))
    github.requests.clear()
    get(github, tmp_path, ref=github.commit)
    assert contents(tmp_path) == WANTED
    assert github.fetched() == {"images/c.png": 1}


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"[" * 100_000, b'{"repository": "owner/covid-data"}', b"\xff"]
)
def test_a_damaged_record_is_written_anew(
    github: GitHubServer, tmp_path: Path, damage: bytes
) -> None:
    get(github, tmp_path)
    (tmp_path / RECORD_NAME).write_bytes(damage)
    get(github, tmp_path)
    assert json.loads((tmp_path / RECORD_NAME).read_bytes())["commit"] == github.commit


@pytest.mark.parametrize(
    "change",
    [{"commit": 5}, {"commit": "a..b"}, {"count": float("inf")}, {"count": "1"}, {"tree": []}],
)
def test_a_record_with_impossible_values_is_as_none(tmp_path: Path, change: dict[str, Any]) -> None:
    record = {"repository": "ieee8023/covid-chestxray-dataset", "commit": "0" * 40}
    record |= {"ref": "master", "count": 1, "tree": {}}  # type: ignore[dict-item]
    (tmp_path / RECORD_NAME).write_text(json.dumps(record))
    assert recorded_commit(tmp_path) == "0" * 40
    (tmp_path / RECORD_NAME).write_text(json.dumps({**record, **change}))
    assert recorded_commit(tmp_path) is None


def test_a_record_cannot_lead_out_of_the_folder(github: GitHubServer, tmp_path: Path) -> None:
    root = get(github, tmp_path / "root")
    record = json.loads((root / RECORD_NAME).read_bytes())
    record["tree"]["../evil"] = record["tree"].pop("README.md")
    (root / RECORD_NAME).write_text(json.dumps(record))
    get(github, root)
    assert not (tmp_path / "evil").exists()
    assert "../evil" not in json.loads((root / RECORD_NAME).read_bytes())["tree"]


def test_a_record_of_another_repository_is_not_believed(
    github: GitHubServer, tmp_path: Path
) -> None:
    get(github, tmp_path)
    record = json.loads((tmp_path / RECORD_NAME).read_bytes())
    (tmp_path / RECORD_NAME).write_text(json.dumps({**record, "repository": "other/other"}))
    github.requests.clear()
    get(github, tmp_path)
    assert sum("/trees/" in request.path for request in github.requests) == 1


def test_a_new_commit_replaces_what_changed(github: GitHubServer, tmp_path: Path) -> None:
    get(github, tmp_path)
    changed = {**WANTED, "README.md": b"new", "images/a.jpeg": b"new"}
    github.publish(changed)
    github.requests.clear()
    get(github, tmp_path)
    assert contents(tmp_path) == changed
    assert github.fetched() == {"README.md": 1, "images/a.jpeg": 1}
    assert json.loads((tmp_path / RECORD_NAME).read_bytes())["commit"] == github.commit


def test_an_interrupted_change_leaves_no_record_of_the_old_commit(
    github: GitHubServer, tmp_path: Path
) -> None:
    get(github, tmp_path)
    github.publish({**WANTED, "README.md": b"new"})
    github.faults["README.md"] = lambda request, reply: Reply(status=404)
    with pytest.raises(DownloadError, match=r"README.md cannot be fetched: HTTP status 404"):
        get(github, tmp_path)
    assert not (tmp_path / RECORD_NAME).exists()


def test_images_can_be_chosen_by_name(github: GitHubServer, tmp_path: Path) -> None:
    get(github, tmp_path, images=iter(["c.png", "FAFA-tripwire.jpg", "c.png"]))
    chosen = {"images/c.png", "images/FAFA-tripwire.jpg"}
    assert {name for name in contents(tmp_path) if name.startswith("images/")} == chosen
    record = json.loads((tmp_path / RECORD_NAME).read_bytes())
    assert record["count"] == 2 + len(BESIDE) + 1


def test_no_image_is_a_choice_too(github: GitHubServer, tmp_path: Path) -> None:
    get(github, tmp_path, images=[])
    assert contents(tmp_path) == {"metadata.csv": WANTED["metadata.csv"], **BESIDE}


def test_images_can_be_chosen_by_their_row(github: GitHubServer, tmp_path: Path) -> None:
    rows: list[dict[str, str]] = []

    def include(row: dict[str, str]) -> bool:
        rows.append(row)
        return row["finding"] == "COVID-19" and row["view"] == "PA"

    get(github, tmp_path, include=include)
    assert {n for n in contents(tmp_path) if n.startswith("images/")} == {"images/a.jpeg"}
    # the same rows as the data set reads, without those that have no file
    expected = read_metadata(tmp_path / "metadata.csv")
    assert rows == [row for row in expected if row["filename"][0] in "abce"]


@pytest.mark.parametrize("name", ["missing.png", "../README.md", ""])
def test_a_name_that_the_repository_lacks_is_told_before_anything_is_fetched(
    github: GitHubServer, tmp_path: Path, name: str
) -> None:
    with pytest.raises(DownloadError, match=rf"has no images/{name} at commit {github.commit}"):
        get(github, tmp_path, images=["a.jpeg", name])
    assert set(github.fetched()) == {"metadata.csv"}


def test_another_repository_is_told(tmp_path: Path) -> None:
    with (
        GitHubServer({"README.md": b"x"}) as github,
        pytest.raises(DownloadError, match=r"owner/covid-data has no metadata.csv at commit"),
    ):
        get(github, tmp_path)


def test_metadata_that_are_no_csv_are_told(github: GitHubServer, tmp_path: Path) -> None:
    github.publish({**WANTED, "metadata.csv": b"filename\n" + b"x" * 200_000})
    with pytest.raises(DownloadError, match=r"metadata.csv cannot be read as CSV: field larger"):
        get(github, tmp_path)
    github.publish({**WANTED, "metadata.csv": b'filename,view\na.jpeg,"PA\nc.png,PA\n'})
    with pytest.raises(DownloadError, match=r"as CSV: unexpected end of data, in .* line 2"):
        get(github, tmp_path)


def test_empty_metadata_mean_no_images(github: GitHubServer, tmp_path: Path) -> None:
    github.publish({**WANTED, "metadata.csv": b""})
    get(github, tmp_path)
    assert contents(tmp_path) == {**BESIDE, "metadata.csv": b""}


def test_an_unknown_ref_is_told(github: GitHubServer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"commits/main cannot be fetched: HTTP status 404"):
        get(github, tmp_path, ref="main")


def test_refs_and_names_are_quoted() -> None:
    endpoints = GitHubEndpoints(api="https://a.org/", raw="https://b.org")
    repository = "ieee8023/covid-chestxray-dataset"
    assert (
        endpoints.commit_url("a/b?c#d") == f"https://a.org/repos/{repository}/commits/a%2Fb%3Fc%23d"
    )
    assert endpoints.file_url("f" * 40, "images/a b#?%.jpg") == (
        f"https://b.org/{repository}/{'f' * 40}/images/a%20b%23%3F%25.jpg"
    )


def test_the_defaults_are_githubs_own() -> None:
    endpoints = GitHubEndpoints()
    assert endpoints.tree_url("f" * 40) == (
        "https://api.github.com/repos/ieee8023/covid-chestxray-dataset/git/trees/"
        f"{'f' * 40}?recursive=1"
    )


@pytest.mark.parametrize("answer", [[], {}, {"sha": None}, {"sha": "abc"}, {"sha": "g" * 40}, 1])
def test_a_ref_without_a_commit_is_told(
    github: GitHubServer, tmp_path: Path, answer: object
) -> None:
    github.faults["commit"] = lambda request, reply: Reply(body=json.dumps(answer).encode())
    with pytest.raises(DownloadError, match="commits/master names no commit"):
        get(github, tmp_path)


@pytest.mark.parametrize("answer", [[], {}, {"tree": None}, {"tree": {}}])
def test_a_tree_without_files_is_told(github: GitHubServer, tmp_path: Path, answer: object) -> None:
    github.faults["tree"] = lambda request, reply: Reply(body=json.dumps(answer).encode())
    with pytest.raises(DownloadError, match="holds no list of files"):
        get(github, tmp_path)


def test_a_truncated_tree_is_refused(github: GitHubServer, tmp_path: Path) -> None:
    github.truncated = True
    with pytest.raises(DownloadError, match="lists only a part of the files"):
        get(github, tmp_path)


SHA = "0" * 40


def entry(path: object, mode: object = "100644", **more: object) -> dict[str, object]:
    return {"path": path, "mode": mode, "type": "blob", "sha": SHA, "size": 1, **more}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("images/../../evil"), "has a part that is empty, '.' or '..'"),
        (entry("images//evil"), "has a part that is empty"),
        (entry("images/a\\..\\evil"), "backslash"),
        (entry("images/evil\0.png"), "NUL"),
        (entry("images/C:evil"), "colon"),
        (entry("annotations/lungVAE-masks/../../../evil"), "'..'"),
        (entry("images/link", "120000"), "is no regular file"),
        (entry("README.rst", "120000"), "is no regular file"),
        (entry("images/module", "160000", type="commit"), "is no regular file"),
        (entry("images/x", None), "is no regular file"),
        (entry("images/x", size=-1), "with size -1"),
        (entry("images/x", size=1.5), r"with size 1\.5"),
        (entry("images/x", size=True), "with size True"),
        (entry("images/x", size=None), "with size None"),
        (entry("images/x", sha="abc"), "and hash 'abc'"),
        (entry("images/x", sha=None), "and hash None"),
        (entry(None), "an entry without a path"),
        ([], "an entry without a path"),
    ],
)
def test_a_hostile_tree_is_refused_before_anything_is_written(
    tmp_path: Path, bad: object, message: str
) -> None:
    with GitHubServer(WANTED, [bad]) as github, pytest.raises(DownloadError, match=message):
        get(github, tmp_path / "root")
    assert {path.name for path in tmp_path.rglob("*")} == {"root", ".download.lock"}


def test_odd_entries_elsewhere_do_not_matter(tmp_path: Path) -> None:
    odd = [entry("/etc/passwd"), entry("docs/link", "120000"), entry("a\\b"), entry("x", size=-1)]
    with GitHubServer(WANTED, odd) as github:
        assert contents(get(github, tmp_path)) == WANTED


def test_wrong_bytes_are_fetched_once_more_and_then_told(
    github: GitHubServer, tmp_path: Path
) -> None:
    page = b"<!DOCTYPE html>".ljust(90_000)
    github.faults["images/a.jpeg"] = lambda request, reply: Reply(body=page)
    with pytest.raises(IntegrityError, match=r"a\.jpeg gave other bytes.*twice"):
        get(github, tmp_path)
    assert github.fetched()["images/a.jpeg"] == 2
    assert not (tmp_path / RECORD_NAME).exists()
    del github.faults["images/a.jpeg"]
    get(github, tmp_path)
    assert contents(tmp_path) == WANTED


def test_the_token_goes_to_the_api_alone(tmp_path: Path) -> None:
    token = "ghp_dummySecret456"
    with GitHubServer(WANTED) as github:

        def answer(request: Request) -> Reply | None:
            path = request.path.removeprefix("/raw")
            return github.answer(Request(f"/raw{path}", request.headers, 1, 0))

        with LocalServer(answer) as raw:
            endpoints = GitHubEndpoints(
                api=github.endpoints.api, raw=raw.url, owner="owner", repo="covid-data"
            )
            download_cohen(tmp_path, endpoints=endpoints, token=token, **QUICK)
    assert contents(tmp_path) == WANTED
    sent = [request.headers.get("Authorization") for request in github.requests]
    assert sent == [f"Bearer {token}"] * 2
    assert raw.requests
    assert not any("Authorization" in request.headers for request in raw.requests)
    assert token not in (tmp_path / RECORD_NAME).read_text()


def test_a_used_up_rate_limit_tells_what_to_do(github: GitHubServer, tmp_path: Path) -> None:
    limit = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1893456000"}
    github.faults["commit"] = lambda request, reply: Reply(status=403, headers=limit)
    with pytest.raises(DownloadError, match=r"2030-01-01 00:00 UTC.*pass token="):
        get(github, tmp_path, token="dummy")


def test_progress_is_shown_only_when_wanted(
    github: GitHubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get(github, tmp_path, images=["a.jpeg"])
    assert capsys.readouterr() == ("", "")
    get(github, tmp_path, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "210k/210k" in shown.err


def test_old_parts_are_removed_and_other_files_are_not(
    github: GitHubServer, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    old, mine = tmp_path / "images/.0123456789abcdef-01234567.part", tmp_path / "images/mine.part"
    for path in (old, mine):
        path.touch()
        os.utime(path, (0, 0))
    get(github, tmp_path)
    assert contents(tmp_path) == {**WANTED, "images/mine.part": b""}


def test_a_root_that_is_a_file_is_told(github: GitHubServer, tmp_path: Path) -> None:
    (tmp_path / "root").touch()
    with pytest.raises(DownloadError, match="root cannot be written"):
        get(github, tmp_path / "root")


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere"
)
def test_complete_data_may_be_read_only(github: GitHubServer, tmp_path: Path) -> None:
    get(github, tmp_path)
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        get(github, tmp_path, ref=github.commit)
        get(github, tmp_path)
        with pytest.raises(DownloadError, match="cannot be written"):
            get(github, tmp_path, images=["FAFA-tripwire.jpg"])
    finally:
        for folder in folders:
            folder.chmod(0o700)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"retries": -1}, "retries"),
        ({"backoff_s": -1}, "backoff_s"),
        ({"token": "a b"}, "token must be printable ASCII"),
        ({"ref": ""}, "ref must be a branch"),
        ({"ref": "a/../b"}, "ref must be a branch"),
        ({"ref": "a\nb"}, "ref must be a branch"),
        ({"images": ["a"], "include": bool}, "include= or images=, not both"),
    ],
)
def test_impossible_arguments_are_refused(
    github: GitHubServer, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get(github, tmp_path / "root", **options)
    assert github.requests == []
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", [b"a.png", Path("a.png"), None])
def test_names_of_images_are_text(tmp_path: Path, name: Any) -> None:
    with pytest.raises(TypeError, match="images must be file names, got "):
        download_cohen(tmp_path, images=["b.png", name])


def test_a_row_that_ends_early_has_empty_cells(github: GitHubServer, tmp_path: Path) -> None:
    github.publish({**WANTED, "metadata.csv": b"filename,folder,license\na.jpeg,images\nc.png\n\n"})
    licences: list[str] = []
    get(github, tmp_path, include=lambda row: licences.append(row["license"]) or True)
    assert licences == ["", ""]


def test_a_single_name_is_no_list_of_images(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"images must be file names, got the string 'a\.png'"):
        download_cohen(tmp_path, images="a.png")


@pytest.mark.parametrize(
    "url", ["", "api.github.com", "ftp://a.org", "https://", "https://u:p@a.org"]
)
@pytest.mark.parametrize("which", ["api", "raw"])
def test_endpoints_must_be_web_addresses_without_a_password(url: str, which: str) -> None:
    with pytest.raises(ValueError, match="must be https:// URLs"):
        GitHubEndpoints(**{which: url})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a?b"])
@pytest.mark.parametrize("which", ["owner", "repo"])
def test_owner_and_repository_must_be_names(name: str, which: str) -> None:
    with pytest.raises(ValueError, match="owner and repo must be names"):
        GitHubEndpoints(**{which: name})


@pytest.mark.parametrize("every", [5_000, 20_000, 64_000])
def test_cuts_everywhere_are_survived(github: GitHubServer, tmp_path: Path, every: int) -> None:
    for path in WANTED:
        github.faults[path] = lambda request, reply: Reply(body=reply.body, cut_after=every)
    get(github, tmp_path, retries=20)
    assert contents(tmp_path) == WANTED
    assert sum(github.sent[github.raw_path(path)] for path in WANTED) <= 1.1 * sum(
        len(data) for data in WANTED.values()
    ) + 4096 * len(WANTED)


def test_all_faults_at_once_are_survived(github: GitHubServer, tmp_path: Path) -> None:
    def fault(request: Request, reply: Reply) -> Reply:
        faults = [
            Reply(status=500),
            Reply(status=503, headers={"Retry-After": "0"}),
            Reply(body=reply.body, cut_after=len(reply.body) // 3),
            Reply(body=reply.body, cut_after=len(reply.body) // 2, ranges=False),
            Reply(status=429, headers={"Retry-After": "0"}),
        ]
        return faults[request.number - 1] if request.number <= len(faults) else reply

    github.faults = dict.fromkeys([*WANTED, "commit", "tree"], fault)
    get(github, tmp_path)
    assert contents(tmp_path) == WANTED


def downloading(github: GitHubServer, root: Path, **options: Any) -> BaseProcess:
    # the library's function itself: what a process must import costs time
    options = {"ref": github.commit, "endpoints": github.endpoints, **QUICK, **options}
    return forkserver().Process(target=download_cohen, args=(root,), kwargs=options)


@pytest.mark.slow
def test_whenever_it_is_killed_the_next_run_succeeds(tmp_path: Path) -> None:
    rng = random.Random(0)
    names = [f"{i}.png" for i in range(6)]
    files = {f"images/{name}": rng.randbytes(100_000) for name in names}
    table = "filename\n" + "".join(f"{name}\n" for name in names)
    files["metadata.csv"] = table.encode()
    with GitHubServer(files) as github:
        github.faults = dict.fromkeys(
            files, lambda request, reply: Reply(body=reply.body, pause_s=0.002)
        )
        killed = continued = 0
        for round_ in range(50):
            root = tmp_path / str(round_)
            github.sent.clear()
            process = downloading(github, root, workers=2)
            process.start()
            until = rng.randrange(600_000)
            while github.sent.total() < until and process.is_alive():
                time.sleep(0.001)
            process.kill()
            process.join()
            killed += process.exitcode != 0
            found = contents(root) if root.exists() else {}
            parts = [name for name in found if name.endswith(".part")]
            record = [name for name in found if name.endswith(".tmp")]
            whole = {n: data for n, data in found.items() if n not in (*parts, *record)}
            assert whole.items() <= files.items()
            assert len(parts) <= 2  # one for each worker
            assert len(record) <= (whole == files)
            for name in record:  # as if it were tried again two days later
                os.utime(root / name, (time.time() - 172_800,) * 2)
            assert not (root / RECORD_NAME).exists() or whole == files
            github.requests.clear()
            get(github, root, ref=github.commit)
            continued += any("Range" in request.headers for request in github.requests)
            assert contents(root) == files
            assert not set(github.fetched()) & set(whole)
    assert killed >= 25
    assert continued >= 10


@pytest.fixture
def small_github() -> Iterator[GitHubServer]:
    files = {
        "metadata.csv": b"filename\na.png\n",
        "images/a.png": random.Random(0).randbytes(400_000),
    }
    with GitHubServer(files) as server:
        server.faults["images/a.png"] = lambda request, reply: Reply(body=reply.body, pause_s=0.002)
        yield server


def run_all(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.mark.slow
def test_eight_processes_fetch_every_file_once(small_github: GitHubServer, tmp_path: Path) -> None:
    for round_ in range(5):
        root = tmp_path / str(round_)
        small_github.requests.clear()
        run_all([downloading(small_github, root) for _ in range(8)])
        assert contents(root) == small_github.files
        assert small_github.fetched() == {"metadata.csv": 1, "images/a.png": 1}


def test_eight_processes_without_working_locks_do_no_harm(
    small_github: GitHubServer, tmp_path: Path
) -> None:
    options = {"ref": small_github.commit, "endpoints": small_github.endpoints, **QUICK}
    process, args = forkserver().Process, (tmp_path, options)
    run_all([process(target=download_without_locks, args=args) for _ in range(8)])
    assert contents(tmp_path) == small_github.files


@pytest.mark.real_data
def test_the_real_collection_arrives_as_the_data_set_reads_it(
    real_data: Path, tmp_path: Path
) -> None:
    source = real_data / "covid-chestxray-dataset"
    files = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in source.rglob("*")
        if path.is_file()
    }
    with GitHubServer(files) as github:
        root = get(github, tmp_path / "cohen")
    expected = CohenCovidDataset(source, classes=("normal", "pneumonia", "covid19"))
    found = CohenCovidDataset(root, classes=("normal", "pneumonia", "covid19"))
    assert found.metadata.drop(columns=["path", "lung_mask"]).equals(
        expected.metadata.drop(columns=["path", "lung_mask"])
    )
    assert found.metadata["lung_mask"].notna().sum() == expected.metadata["lung_mask"].notna().sum()
    images = {path.name for path in (root / "images").iterdir()}
    assert images <= {path.name for path in (source / "images").iterdir()}
    assert len(images) == 638 - 5  # five names occur in two rows


def make_zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


KAGGLE = [
    f"chest_xray/{nested}{split}/{name}"
    for nested in ("", "chest_xray/")
    for split in ("train", "val", "test")
    for name in ("NORMAL/IM-0001-0001.jpeg", "PNEUMONIA/person1_virus_6.jpeg", ".DS_Store")
] + ["chest_xray/__MACOSX/chest_xray/train/NORMAL/._IM-0001-0001.jpeg", "chest_xray/.DS_Store"]
MENDELEY = [name for name in KAGGLE if "chest_xray/chest_xray/" not in name and "/val/" not in name]


@pytest.mark.parametrize("names", [KAGGLE, MENDELEY])
def test_one_copy_of_the_kermany_archive_is_unpacked(tmp_path: Path, names: list[str]) -> None:
    archive = make_zip(tmp_path / "archive.zip", names)
    root = download_kermany(tmp_path / "kermany", archive=archive, progress=False)
    files = {p.relative_to(root).as_posix() for p in root.rglob("*.jpeg")}
    assert files == {
        name
        for name in names
        if name.endswith(".jpeg") and "chest_xray/chest_xray" not in name and "._" not in name
    }


def test_an_archive_with_the_nested_copy_alone_is_unpacked(tmp_path: Path) -> None:
    nested = [name for name in KAGGLE if name.startswith("chest_xray/chest_xray/")]
    archive = make_zip(tmp_path / "archive.zip", nested)
    root = download_kermany(tmp_path / "kermany", archive=archive, progress=False)
    assert len(list(root.rglob("chest_xray/chest_xray/*/*/*.jpeg"))) == 6


@pytest.mark.parametrize(
    "names",
    [
        ["cats/1.jpeg"],
        ["OCT2017/train/NORMAL/1.jpeg", "OCT2017/train/CNV/1.jpeg"],
        ["OCT2017/train/NORMAL/1.jpeg"],
        ["Data/train/NORMAL/1.jpeg", "Data/train/COVID19/1.jpeg"],
        ["train/NORMAL/1.jpeg", "test/COVID19/1.jpeg"],
        ["chest_xray/train/NORMAL/1.jpeg", "chest_xray/train/COVID19/1.jpeg"],
    ],
)
def test_another_archive_is_not_unpacked(tmp_path: Path, names: list[str]) -> None:
    archive = make_zip(tmp_path / "cats.zip", names)
    with pytest.raises(ArchiveError, match=r"cats\.zip is not the Kermany collection"):
        download_kermany(tmp_path / "kermany", archive=archive)


@pytest.mark.parametrize("place", ["CellData/chest_xray/", "chest_xray/", ""])
def test_of_mendeleys_later_archive_the_chest_radiographs_are_unpacked(
    tmp_path: Path, place: str
) -> None:
    images = [f"{place}train/{name}.jpeg" for name in ("NORMAL/NORMAL-1-1", "PNEUMONIA/VIRUS-1-1")]
    oct_images = [
        "CellData/OCT/train/NORMAL/NORMAL-1-1.jpeg",
        "CellData/OCT/train/CNV/CNV-1-1.jpeg",
    ]
    archive = make_zip(tmp_path / "archive.zip", [*oct_images, *images])
    root = download_kermany(tmp_path / "kermany", archive=archive, progress=False)
    assert {p.relative_to(root).as_posix() for p in root.rglob("*.jpeg")} == set(images)
    assert len(KermanyPneumoniaDataset(root)) == 1


def test_a_missing_kermany_archive_is_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        download_kermany(tmp_path, archive=tmp_path / "archive.zip")


def test_an_unpacked_archive_is_not_fetched_again(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "archive.zip", KAGGLE)
    root = download_kermany(tmp_path / "kermany", archive=archive, progress=False)
    assert download_kermany(tmp_path / "kermany") == root


def test_kermany_offline_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download_kermany(tmp_path)


def test_without_kagglehub_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(MissingExtraError, match=r'pip install "chestxray-covid\[kaggle\]"'):
        download_kermany(tmp_path)


class _StrangeError(Exception):
    """As kagglehub's own: no ancestor but ``Exception``."""


def fake_kagglehub(monkeypatch: pytest.MonkeyPatch, download: Callable[[str], str]) -> None:
    """Stand in for the package, which reaches for Kaggle and cannot be led elsewhere."""
    package, exceptions = ModuleType("kagglehub"), ModuleType("kagglehub.exceptions")
    vars(package)["dataset_download"] = download
    vars(exceptions)["StrangeError"] = _StrangeError
    monkeypatch.setitem(sys.modules, "kagglehub", package)
    monkeypatch.setitem(sys.modules, "kagglehub.exceptions", exceptions)


def test_kagglehub_gives_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kagglehub(monkeypatch, lambda handle: str(tmp_path / "cache" / handle))
    expected = tmp_path / "cache" / "paultimothymooney" / "chest-xray-pneumonia"
    assert download_kermany(tmp_path / "kermany") == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError, ValueError, zipfile.BadZipFile, _StrangeError])
def test_what_kagglehub_raises_is_translated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(handle: str) -> str:
        raise error("401 Client Error")

    fake_kagglehub(monkeypatch, fail)
    with pytest.raises(DownloadError, match=r"401 Client Error.*pass archive=") as caught:
        download_kermany(tmp_path)
    assert isinstance(caught.value.__cause__, error)


def test_the_real_kagglehub_fails_as_a_download_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kagglehub", reason="the extra 'kaggle' is not installed")
    for name in ("HTTPS_PROXY", "https_proxy"):  # nobody listens at port 9
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    with pytest.raises(DownloadError, match="kagglehub could not fetch paultimothymooney"):
        download_kermany(tmp_path / "kermany")
