"""HTTP GET that repeats what may yet succeed and refuses what is not safe."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter

from chestxray_covid._version import __version__
from chestxray_covid.errors import DownloadError

#: A cut connection loses at most one chunk of what arrived, so chunks are small.
CHUNK_BYTES = 4096
#: Fewer new bytes than this are no progress, or a server could keep us for ever.
_PROGRESS_BYTES = 16_384
#: Larger answers are not read; GitHub lists at most 7 MB of a tree.
_MAX_JSON_BYTES = 32_000_000
_MAX_REDIRECTS = 5
_MAX_PAUSE_S = 120.0
_USER = re.compile(r"(?<=://)[^/?#\s]+@")
_BUSY = frozenset({429, 500, 502, 503, 504})
_TRANSIENT = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)

T = TypeVar("T")


class TransientError(Exception):
    """An attempt failed that may succeed when repeated, after ``wait_s`` seconds at least.

    :meth:`Client.persist` handles it, so that no caller of the library ever sees it.
    """

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that a traceback shows before it."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


@contextmanager
def without_password() -> Iterator[None]:
    """Take name and password, as an endpoint may have them, out of addresses in errors."""
    try:
        yield
    except Exception as error:
        for one in chain(error):
            one.args = tuple(_USER.sub("", a) if isinstance(a, str) else a for a in one.args)
        raise


class Client:
    """HTTP GET with bounded retries; several threads may use it at once.

    Passwords in a ``.netrc`` file are not used; proxies and certificates of the environment are.

    Args:
        timeout_s: Longest silence of a server, in seconds.
        retries: Repetitions after a failure that brought nothing new; progress resets the count.
        backoff_s: Pause after the first failure, in seconds, doubled with each further one and
            spread at random by half. A server's ``Retry-After`` is respected up to two minutes.
        connections: Connections kept open per server.
        tokens: Origin (see :func:`origin`) → bearer token, sent to that origin and no other.
        user_agent: What the client calls itself.

    Raises:
        ValueError: If a number or a token is impossible.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 30.0,
        retries: int = 5,
        backoff_s: float = 0.5,
        connections: int = 8,
        tokens: Mapping[str, str] | None = None,
        user_agent: str = f"chestxray-covid/{__version__}",
    ) -> None:
        numbers = (timeout_s, retries, backoff_s, connections)
        positive = timeout_s > 0 and retries >= 0 and backoff_s >= 0 and connections >= 1
        if not positive or not all(map(math.isfinite, numbers)):
            raise ValueError(
                "timeout_s and the number of connections must be positive, retries and backoff_s "
                "not negative, and all of them finite; got "
                f"{timeout_s}, {connections}, {retries} and {backoff_s}"
            )
        self._tokens = {where: clean_token(token) for where, token in (tokens or {}).items()}
        self._user_agent = user_agent
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._stopped = threading.Event()
        self._session = requests.Session()
        # with an auth of its own, requests adds no password from .netrc
        self._session.auth = lambda request: request
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._session.close()

    def stop(self) -> None:
        """Make all running and later work of this client end with a ``DownloadError``, soon."""
        self._stopped.set()

    @without_password()
    def read_json(self, url: str) -> Any:
        """Return the JSON data at a URL.

        Raises:
            DownloadError: If it cannot be fetched, is no JSON, or has more than 32 MB.
        """
        data = self.persist(url, lambda: self._read(url))
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DownloadError(
                f"{url} answers with something else than JSON ({error}). A proxy or a login page "
                "of the network may stand between; open the address in a browser."
            ) from error

    @without_password()
    def persist(
        self, url: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0
    ) -> T:
        """Return what ``attempt`` returns, repeated while it raises :class:`TransientError`.

        Args:
            url: Named in messages.
            attempt: One try.
            progress: Number of bytes kept so far; a growth gives new patience.

        Raises:
            DownloadError: If patience ends, or as ``attempt`` raises it.
        """
        failures = 0
        reached = progress()
        while True:
            try:
                return attempt()
            except TransientError as failure:
                failures += 1
                if progress() >= reached + _PROGRESS_BYTES:
                    reached = progress()
                    failures = 0
                if failures > self._retries or failure.wait_s > _MAX_PAUSE_S:
                    raise DownloadError(_gave_up(url, failure, failures)) from failure
                pause = max(failure.wait_s, self._backoff(failures))
            self._stopped.wait(pause)

    @contextmanager
    def open(self, url: str, *, start: int = 0) -> Iterator[requests.Response]:
        """Yield the answer to a GET, not yet read; its status is 200, 206 or 416.

        Args:
            url: Address; redirects are followed, except from https to http.
            start: First byte wanted. The server may ignore it (200) or refuse it (416).

        Raises:
            TransientError: If the connection fails or the server is busy, also within the body.
            DownloadError: If the server says no, or the environment asks for no network.
        """
        refuse_offline(url)
        try:
            with self._follow(url, start) as response:
                if not (start and response.status_code == 416):
                    _check_status(url, response)
                yield response
        except _TRANSIENT as error:
            raise TransientError(_reason(error)) from error
        except requests.RequestException as error:
            raise DownloadError(
                f"{url} cannot be fetched: {_reason(error)}. Check the address."
            ) from error

    def pieces(self, response: requests.Response) -> Iterator[bytes]:
        """Yield the body of an answer in chunks.

        Raises:
            DownloadError: If :meth:`stop` is called meanwhile.
        """
        for piece in response.iter_content(CHUNK_BYTES):
            if self._stopped.is_set():
                break
            yield piece
        self._refuse_stopped(origin(response.url))

    def _refuse_stopped(self, url: str) -> None:
        if self._stopped.is_set():
            raise DownloadError(f"{url} was stopped, because another download failed")

    def _read(self, url: str) -> bytes:
        data = bytearray()
        with self.open(url) as response:
            for piece in self.pieces(response):
                data += piece
                if len(data) > _MAX_JSON_BYTES:
                    raise DownloadError(
                        f"{url} answers with more than {_MAX_JSON_BYTES} bytes, expected a list "
                        "of files. Check the address."
                    )
        return bytes(data)

    def _backoff(self, failures: int) -> float:
        if not failures:
            return 0.0
        doubled = self._backoff_s * 2.0 ** min(failures - 1, 60)
        return min(doubled * random.uniform(0.5, 1.5), _MAX_PAUSE_S)

    def _follow(self, asked: str, start: int) -> requests.Response:
        url = asked  # and later where it leads, with a signature maybe, which no message may show
        for _ in range(_MAX_REDIRECTS + 1):
            self._refuse_stopped(asked)
            # identity: sizes and ranges count the bytes that the hash counts
            headers = {"Accept-Encoding": "identity", "User-Agent": self._user_agent}
            if start:
                headers["Range"] = f"bytes={start}-"
            if token := self._tokens.get(origin(url)):
                headers["Authorization"] = f"Bearer {token}"
            if (password := _basic(asked)) and origin(url) == origin(asked):
                headers["Authorization"] = password  # not the token: so does the Hub's library
            response = self._get(url, headers)
            if not response.is_redirect:
                return response
            response.close()
            url = redirect_target(url, response.headers["Location"])
        raise DownloadError(
            f"{asked} redirects more than {_MAX_REDIRECTS} times. Check the address."
        )

    def _get(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        try:
            return self._session.get(
                url, headers=headers, stream=True, timeout=self._timeout_s, allow_redirects=False
            )
        except requests.RequestException:
            raise
        except OSError as error:
            # how requests reports that REQUESTS_CA_BUNDLE or a proxy's certificate is missing
            raise DownloadError(
                f"{origin(url)} cannot be reached: {error}. Check the certificates that the "
                "environment names."
            ) from error
        except ValueError as error:
            # requests looks where a redirect leads even if it must not follow
            raise DownloadError(f"{origin(url)} redirects to no valid address") from error


def _basic(url: str) -> str:
    """Return the header's value for name and password in an address, ``""`` if it has none."""
    parts = urlsplit(url)
    user, password = (unquote(part or "") for part in (parts.username, parts.password))
    pair = f"{user}:{password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}" if user or password else ""


def _reason(error: BaseException) -> str:
    """Return what went wrong without an address: the class, and what the system says of it.

    The message of an error of requests holds the address, that of a redirect with its signature.
    """
    cause: BaseException | None = error
    while isinstance(cause, requests.RequestException) or not isinstance(cause, OSError | None):
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {cause}" if cause else type(error).__name__


def clean_token(token: str) -> str:
    r"""Return a token without the white space around it, such as the line end of its file.

    Raises:
        ValueError: If no header can hold it; the message does not show it.

    >>> clean_token("hf_abc\n")
    'hf_abc'
    """
    cleaned = token.strip()
    if not re.fullmatch(r"[!-~]+", cleaned):
        raise ValueError("token must be printable ASCII without spaces or line ends")
    return cleaned


def origin(url: str) -> str:
    """Return scheme, host and port of a URL: as far as a token may travel.

    >>> origin("https://API.github.com/repos"), origin("http://localhost:8000/")
    ('https://api.github.com:443', 'http://localhost:8000')
    """
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    return f"{parts.scheme}://{parts.hostname}:{port}"


def redirect_target(url: str, location: str) -> str:
    """Return where a redirect leads.

    Raises:
        DownloadError: If that is no web address, or leads from https to http.
    """
    try:
        target = urljoin(url, location)
        scheme, where = urlsplit(target).scheme, origin(target)
    except ValueError as error:
        raise DownloadError(f"{origin(url)} redirects to no valid address") from error
    if scheme not in {"http", "https"} or (urlsplit(url).scheme == "https" and scheme == "http"):
        # the origins alone: a query can hold a signature
        raise DownloadError(
            f"{origin(url)} redirects to {where}, which is not safe: expected https. The network "
            "may be interfering; try another one."
        )
    return target


def refuse_offline(what: str) -> None:
    """Do nothing where the network may be used.

    Raises:
        DownloadError: If ``HF_HUB_OFFLINE`` is 1, ON, YES or TRUE, as the Hub's library reads it.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise DownloadError(
            f"{what} is needed, but HF_HUB_OFFLINE is set. Unset it, or use data that is on disk."
        )


def _check_status(url: str, response: requests.Response) -> None:
    status, headers = response.status_code, response.headers
    if status in {200, 206}:
        return
    if "Retry-After" in headers and status in _BUSY | {403}:
        raise TransientError(f"HTTP status {status}", _seconds(headers["Retry-After"]))
    if headers.get("X-RateLimit-Remaining") == "0" and status in {403, 429}:
        raise DownloadError(
            f"{url}: the server's rate limit is used up{_reset(headers)} (HTTP status {status}). "
            "Wait until then, or pass token= (any GitHub token raises the limit)."
        )
    if status in _BUSY:
        raise TransientError(f"HTTP status {status}")
    raise DownloadError(
        f"{url} cannot be fetched: HTTP status {status}, expected 200. Check that the repository, "
        "the ref and the file exist, and that token=, where given, is valid."
    )


def _seconds(retry_after: str) -> float:
    """Return the pause that ``Retry-After`` asks for (RFC 9110, 10.2.3: seconds, or a date)."""
    if re.fullmatch(r"\d{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _reset(headers: Mapping[str, str]) -> str:
    when = headers.get("X-RateLimit-Reset", "")
    if not re.fullmatch(r"\d{1,10}", when):
        return ""
    return f" until {datetime.fromtimestamp(int(when), UTC):%Y-%m-%d %H:%M} UTC"


def _gave_up(url: str, failure: TransientError, failures: int) -> str:
    if failure.wait_s > _MAX_PAUSE_S:
        why = f"{failure}, and the server asks to wait {failure.wait_s:.0f} s"
    else:
        why = f"{failure} ({failures} times in a row without progress)"
    return f"{url} cannot be fetched: {why}. What has arrived is kept; run the same again later."
