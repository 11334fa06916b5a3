from __future__ import annotations

import gzip
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from chestxray_covid.datasets.transfer import RemoteFile, fetch
from chestxray_covid.datasets.web import (
    Client,
    TransientError,
    chain,
    origin,
    redirect_target,
    refuse_offline,
)
from chestxray_covid.errors import DownloadError
from servers import LocalServer, Reply, Request

TOKEN = "ghp_dummySecret123"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(timeout_s=5, retries=3, backoff_s=0.001) as client:
        yield client


def replies(*given: Reply) -> Callable[[Request], Reply]:
    """Answer the first requests with these, all later ones with the last."""
    return lambda request: given[min(request.number, len(given)) - 1]


GOOD = Reply(body=b'{"answer": 42}')


def test_json_is_read(client: Client) -> None:
    with LocalServer(replies(GOOD)) as server:
        assert client.read_json(f"{server.url}/x") == {"answer": 42}
    assert server.requests[0].headers["Accept-Encoding"] == "identity"
    assert "Authorization" not in server.requests[0].headers
    assert "Range" not in server.requests[0].headers


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(client: Client, status: int) -> None:
    with LocalServer(replies(Reply(status=status), Reply(status=status), GOOD)) as server:
        assert client.read_json(f"{server.url}/x") == {"answer": 42}
    assert len(server.requests) == 3


def test_a_cut_answer_is_asked_again(client: Client) -> None:
    cut = Reply(body=b'{"answer": 42}', cut_after=5)
    with LocalServer(replies(cut, cut, GOOD)) as server:
        assert client.read_json(f"{server.url}/x") == {"answer": 42}


def test_patience_ends_after_the_wanted_number_of_repetitions(client: Client) -> None:
    with LocalServer(replies(Reply(status=503))) as server:
        with pytest.raises(DownloadError, match=r"status 503 \(4 times in a row"):
            client.read_json(f"{server.url}/x")
        assert len(server.requests) == 4


def test_thousands_of_repetitions_do_not_overflow_the_pause() -> None:
    with Client(retries=5000, backoff_s=1e-300) as client:
        assert 0 <= client._backoff(5000) <= 120
    with Client(retries=5000) as client:
        assert client._backoff(5000) == 120


def test_progress_gives_new_patience(client: Client) -> None:
    kept = 0

    def attempt() -> str:
        nonlocal kept
        if kept >= 20 * 16_384:
            return "done"
        kept += 16_384
        raise TransientError("cut")

    assert client.persist("url", attempt, lambda: kept) == "done"


def test_a_trickle_is_no_progress(client: Client) -> None:
    kept = 0

    def attempt() -> str:
        nonlocal kept
        kept += 10
        raise TransientError("cut")

    with pytest.raises(DownloadError, match=r"cut \(4 times in a row"):
        client.persist("url", attempt, lambda: kept)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_respected(client: Client, form: str) -> None:
    # a date has whole seconds: two of them ahead are more than one second to wait
    wait = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    busy = Reply(status=503, headers={"Retry-After": wait})
    with LocalServer(replies(busy, GOOD)) as server:
        assert client.read_json(f"{server.url}/x") == {"answer": 42}
    first, second = server.requests
    assert second.time_s - first.time_s >= 0.95


@pytest.mark.parametrize("value", ["soon", "-1", "", "99999999999", "Mon, 99 Foo 2020"])
def test_a_senseless_retry_after_is_no_pause(client: Client, value: str) -> None:
    busy = Reply(status=503, headers={"Retry-After": value})
    with LocalServer(replies(busy, GOOD)) as server:
        assert client.read_json(f"{server.url}/x") == {"answer": 42}


def test_a_long_retry_after_is_told_to_the_user(client: Client) -> None:
    busy = Reply(status=429, headers={"Retry-After": "3600"})
    with LocalServer(replies(busy)) as server:
        with pytest.raises(DownloadError, match="asks to wait 3600 s"):
            client.read_json(f"{server.url}/x")
        assert len(server.requests) == 1


def test_a_secondary_rate_limit_is_waited_for(client: Client) -> None:
    busy = Reply(status=403, headers={"Retry-After": "0", "X-RateLimit-Remaining": "0"})
    with LocalServer(replies(busy, GOOD)) as server:
        assert client.read_json(f"{server.url}/x") == {"answer": 42}


@pytest.mark.parametrize("status", [403, 429])
def test_a_used_up_rate_limit_is_explained(client: Client, status: int) -> None:
    headers = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1893456000"}
    with LocalServer(replies(Reply(status=status, headers=headers))) as server:
        with pytest.raises(DownloadError, match=r"rate limit.*until 2030-01-01 00:00 UTC.*token="):
            client.read_json(f"{server.url}/x")
        assert len(server.requests) == 1


def test_a_rate_limit_without_a_time_is_explained_too(client: Client) -> None:
    reply = Reply(status=403, headers={"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "x"})
    with (
        LocalServer(replies(reply)) as server,
        pytest.raises(DownloadError, match=r"rate limit is used up \(HTTP status 403\)"),
    ):
        client.read_json(f"{server.url}/x")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 451, 501])
def test_a_refusal_is_final(client: Client, status: int) -> None:
    with LocalServer(replies(Reply(status=status))) as server:
        with pytest.raises(DownloadError, match=f"HTTP status {status}, expected 200"):
            client.read_json(f"{server.url}/x")
        assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"<!DOCTYPE html><html>", b"", b"\xff\xfe", b"[" * 100_000])
def test_an_answer_that_is_no_json_is_told(client: Client, body: bytes) -> None:
    with (
        LocalServer(replies(Reply(body=body))) as server,
        pytest.raises(DownloadError, match=r"something else than JSON.*login page"),
    ):
        client.read_json(f"{server.url}/x")


def test_an_endless_answer_is_not_read_to_its_end(client: Client) -> None:
    bomb = gzip.compress(b" " * 100_000_000)
    reply = Reply(body=bomb, headers={"Content-Encoding": "gzip"})
    with (
        LocalServer(replies(reply)) as server,
        pytest.raises(DownloadError, match="more than 32000000 bytes"),
    ):
        client.read_json(f"{server.url}/x")


def test_a_server_that_is_not_there_is_told(client: Client) -> None:
    with LocalServer(replies(GOOD)) as server:
        pass
    with pytest.raises(DownloadError, match=r"refused.*4 times in a row"):
        client.read_json(f"{server.url}/x")


def test_a_silent_server_is_given_up(client: Client) -> None:
    with (
        LocalServer(lambda request: time.sleep(0.5) or GOOD) as server,
        Client(timeout_s=0.05, retries=1, backoff_s=0) as hasty,
        pytest.raises(DownloadError, match="timed out"),
    ):
        hasty.read_json(f"{server.url}/x")


@pytest.mark.parametrize("url", ["nonsense", "http://", "ftp://127.0.0.1/x"])
def test_an_impossible_address_is_told(client: Client, url: str) -> None:
    with pytest.raises(DownloadError, match="Check the address"):
        client.read_json(url)


def test_a_missing_certificate_bundle_is_told(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(DownloadError, match=r"/nowhere/ca.pem.*certificates"):
        client.read_json("https://127.0.0.1:9/x")


def test_redirects_are_followed(client: Client) -> None:
    def answer(request: Request) -> Reply:
        if request.path == "/end":
            return GOOD
        return Reply(status=301, headers={"Location": "/end"})

    with LocalServer(answer) as server:
        assert client.read_json(f"{server.url}/start") == {"answer": 42}


def test_endless_redirects_are_refused(client: Client) -> None:
    with LocalServer(replies(Reply(status=302, headers={"Location": "/x"}))) as server:
        with pytest.raises(DownloadError, match="redirects more than 5 times"):
            client.read_json(f"{server.url}/x")
        assert len(server.requests) == 6


def test_the_signature_of_a_redirect_is_in_no_message(client: Client) -> None:
    with LocalServer(replies(GOOD)) as gone:
        pass
    with LocalServer(replies(Reply(body=bytes(50_000), cut_after=9))) as cut:
        for place, reason in ((gone, "ConnectionError: .*refused"), (cut, "ChunkedEncodingError")):
            away = Reply(status=302, headers={"Location": f"{place.url}/x?Signature=SECRET"})
            with (
                LocalServer(replies(away)) as server,
                pytest.raises(DownloadError, match=rf"{server.url}/start.*{reason}") as caught,
            ):
                client.read_json(f"{server.url}/start")
            assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("location", ["/x?Signature=SECRET", "http://[::1/?SECRET"])
def test_redirects_from_a_signed_address_do_not_show_it(client: Client, location: str) -> None:
    with (
        LocalServer(replies(Reply(status=302, headers={"Location": location}))) as server,
        pytest.raises(DownloadError, match="redirects ") as caught,
    ):
        client.read_json(f"{server.url}/start")
    assert "SECRET" not in str(caught.value)
    with pytest.raises(DownloadError, match=r"^https://a\.org:443 redirects to ") as caught:
        redirect_target("https://a.org/x?Signature=SECRET", "http://b.org")
    assert "SECRET" not in str(caught.value)


def test_a_stopped_client_does_not_show_where_it_was_sent(client: Client) -> None:
    away = Reply(status=302, headers={"Location": "/big?Signature=SECRET"})
    big = Reply(body=bytes(100_000))
    with LocalServer(lambda request: away if request.path == "/start" else big) as server:

        def stopped() -> None:
            with client.open(f"{server.url}/start") as response:
                client.stop()
                list(client.pieces(response))

        with pytest.raises(DownloadError, match="was stopped") as caught:
            stopped()
    assert "SECRET" not in str(caught.value)


def test_a_token_is_sent_to_its_origin_and_to_no_other() -> None:
    with LocalServer(replies(GOOD)) as other:

        def answer(request: Request) -> Reply:
            status = (301, 302, 303, 307, 308)[request.number % 5]
            return Reply(status=status, headers={"Location": f"{other.url}/stolen"})

        with (
            LocalServer(answer) as server,
            Client(timeout_s=5, tokens={origin(server.url): TOKEN}) as client,
        ):
            for _ in range(20):
                client.read_json(f"{server.url}/x")
    sent = [request.headers.get("Authorization") for request in server.requests]
    assert sent == [f"Bearer {TOKEN}"] * 20
    assert len(other.requests) == 20
    assert not any("Authorization" in request.headers for request in other.requests)


def test_a_password_in_an_address_goes_to_its_server_alone(client: Client) -> None:
    with LocalServer(replies(GOOD)) as other:
        away = Reply(status=302, headers={"Location": f"{other.url}/y"})
        here = Reply(status=302, headers={"Location": "/y"})
        with LocalServer(lambda r: away if r.path == "/y" else here) as server:
            client.read_json(f"{server.url}/x".replace("://", "://me:secret@"))
    sent = [request.headers.get("Authorization") for request in server.requests]
    assert sent == ["Basic bWU6c2VjcmV0"] * 2
    assert [r.headers.get("Authorization") for r in other.requests] == [None]


@pytest.mark.parametrize(
    ("user", "sent"),
    [("me", "Basic bWU6"), (":s%3At", "Basic OnM6dA=="), ("m%40e:", "Basic bUBlOg==")],
)
def test_a_name_or_a_password_alone_is_sent_as_it_is_meant(
    client: Client, user: str, sent: str
) -> None:
    with LocalServer(replies(GOOD)) as server:
        client.read_json(f"{server.url}/x".replace("://", f"://{user}@"))
    assert server.requests[0].headers["Authorization"] == sent


def test_a_password_in_an_address_is_in_no_message(tmp_path: Path) -> None:
    nobody, gone = "http://me:secret@127.0.0.1:9/x", Reply(status=404)
    with LocalServer(replies(gone, Reply(body=b"<html>"), gone)) as server:
        asked = f"{server.url}/x".replace("://", "://me:secret@")
        file = RemoteFile(url=asked, target=tmp_path / "x", size=1, oid="0" * 40)
        with Client(timeout_s=5, retries=0) as own:
            for ask in (
                lambda: own.read_json(nobody),
                lambda: own.read_json(asked),
                lambda: own.read_json(asked),
                lambda: fetch(own, file),
            ):
                with pytest.raises(DownloadError, match=r"127\.0\.0\.1") as caught:
                    ask()
                assert all("secret" not in str(one) for one in chain(caught.value))


def test_a_password_in_netrc_is_not_sent(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    away = Reply(status=302, headers={"Location": "/y"})
    with LocalServer(lambda r: GOOD if r.path == "/y" else away) as server:
        client.read_json(f"{server.url}/x")
    assert not any("Authorization" in request.headers for request in server.requests)


@pytest.mark.parametrize("location", ["http://127.0.0.1/x", "HTTP://example.org/?token=abc"])
def test_a_redirect_from_https_to_http_is_refused(location: str) -> None:
    with pytest.raises(DownloadError, match="not safe: expected https") as caught:
        redirect_target("https://example.org/a", location)
    assert "token=abc" not in str(caught.value)


@pytest.mark.parametrize("location", ["ftp://example.org/x", "file:///etc/passwd", "javascript:1"])
def test_a_redirect_out_of_the_web_is_refused(location: str) -> None:
    with pytest.raises(DownloadError, match="not safe"):
        redirect_target("http://example.org/a", location)


@pytest.mark.parametrize("location", ["http://[::1/x", "http://a:99999/x"])
def test_a_redirect_to_nonsense_is_refused(location: str) -> None:
    with pytest.raises(DownloadError, match="no valid address"):
        redirect_target("http://example.org/a", location)


def test_other_redirects_lead_where_they_say() -> None:
    assert redirect_target("https://a.org/b/c", "../d?e=1") == "https://a.org/d?e=1"
    assert redirect_target("https://a.org/b", "https://c.org/d") == "https://c.org/d"
    assert redirect_target("http://a.org/b", "https://a.org/b") == "https://a.org/b"


def test_a_real_https_server_cannot_send_us_to_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = tmp_path / "server.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {pem} -out {tmp_path}/ca.pem"
    )
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("openssl is not installed, or too old for -addext")
    pem.write_text(pem.read_text() + (tmp_path / "ca.pem").read_text())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with LocalServer(replies(GOOD)) as plain:
        answer = replies(GOOD, Reply(status=302, headers={"Location": f"{plain.url}/x"}))
        with (
            LocalServer(answer, certificate=str(pem)) as secure,
            Client(timeout_s=5, retries=0, tokens={origin(secure.url): TOKEN}) as client,
        ):
            assert client.read_json(f"{secure.url}/x") == {"answer": 42}
            with pytest.raises(DownloadError, match="not safe: expected https"):
                client.read_json(f"{secure.url}/x")
            monkeypatch.delenv("REQUESTS_CA_BUNDLE")
            with pytest.raises(DownloadError, match=r"(?i)certificate"):
                client.read_json(f"{secure.url}/x")
    assert plain.requests == []


@pytest.mark.parametrize("value", ["1", "on", "Yes", "TRUE"])
def test_offline_means_no_request(
    client: Client, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with LocalServer(replies(GOOD)) as server:
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
            client.read_json(f"{server.url}/x")
        assert server.requests == []


@pytest.mark.parametrize("value", ["", "0", "no", "false"])
def test_other_values_do_not_mean_offline(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    refuse_offline("x")


def test_a_stopped_client_ends_its_pauses_and_its_reading(client: Client) -> None:
    big = Reply(body=bytes(1_000_000), pause_s=0.01)
    errors: list[str] = []

    def work(path: str) -> None:
        try:
            patient.read_json(f"{server.url}{path}")
        except DownloadError as error:
            errors.append(str(error))

    def answer(request: Request) -> Reply:
        return big if request.path == "/big" else Reply(status=503, headers={"Retry-After": "100"})

    with LocalServer(answer) as server, Client(timeout_s=5) as patient:
        threads = [threading.Thread(target=work, args=(path,)) for path in ("/big", "/busy")]
        for thread in threads:
            thread.start()
        while len(server.requests) < 2:
            time.sleep(0.01)
        patient.stop()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
    assert len(errors) == 2
    assert all("another download failed" in error for error in errors)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"backoff_s": float("inf")},
        {"retries": -1},
        {"backoff_s": -0.1},
        {"connections": 0},
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Client(**options)


@pytest.mark.parametrize("token", ["", "\n", "with space", "line\r\nend", "ü"])
def test_an_impossible_token_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ValueError, match="token must be printable ASCII") as caught:
        Client(tokens={"https://a.org:443": token})
    assert not token or token not in str(caught.value)


def test_white_space_around_a_token_is_no_part_of_it() -> None:
    with LocalServer(replies(GOOD)) as server:
        tokens = {origin(server.url): f" {TOKEN}\r\n"}
        with Client(timeout_s=5, tokens=tokens) as client:
            client.read_json(f"{server.url}/x")
    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_origins_tell_ports_and_schemes_apart() -> None:
    urls = ["http://a", "https://a", "http://a:81", "http://b", "https://a:80"]
    assert len({origin(url) for url in urls}) == 5
    assert origin("https://A.org/x?y") == origin("https://a.org:443")
    assert re.fullmatch(r"https://a\.org:443", origin("https://user@a.org/"))
