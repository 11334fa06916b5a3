"""Files by path or by address: of this machine, or in object storage through pyarrow."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from chestxray_covid.datasets.loading import image_files
from chestxray_covid.errors import DatasetNotFoundError, require_extra
from chestxray_covid.files import is_folder, write_files
from chestxray_covid.image import IMAGE_SUFFIXES


def is_address(place: str) -> bool:
    """Return whether this is an address such as ``s3://bucket/folder``, not a path."""
    return "://" in place


def no_image_file(where: str) -> DatasetNotFoundError:
    """Return the error for paths among and below which there is no image file."""
    return DatasetNotFoundError(
        f"No image file in {where}. Check the path. In folders files are known by the ends of "
        "their names, such as .png, .jpg or .dcm; list others, such as a PACS exports, in a CSV."
    )


class Places:
    """Lists, reads, writes and deletes files, wherever they lie.

    An address begins as ``pyarrow.fs.FileSystem.from_uri`` takes it: ``s3://``, ``gs://``,
    ``abfs://``, ``hdfs://``, ``file://``; it ends as the name of the file or folder, not quoted,
    without options. Credentials and region come from the environment. Every method raises
    ``OSError`` where a file or folder cannot be reached, ``ValueError`` where the kind of an
    address is unknown or it has options, and :class:`MissingExtraError` without pyarrow.
    """

    def __init__(self) -> None:
        self._systems: dict[str, tuple[Any, str]] = {}

    def images(self, place: str) -> Iterator[str]:
        """Yield the image files below a folder, sorted, not hidden ones; anything else itself."""
        if not is_address(place):
            yield from (map(os.fspath, image_files(Path(place))) if is_folder(place) else [place])
            return
        fs, path = self._opened(place)
        pyarrow = require_extra("pyarrow.fs", "parquet")
        if fs.get_file_info(path).type != pyarrow.FileType.Directory:
            yield place
            return
        selector = pyarrow.FileSelector
        head = place.rstrip("/")
        found = (i.path for i in fs.get_file_info(selector(path, recursive=True)) if i.is_file)
        below = (n.removeprefix(path.rstrip("/")) for n in found)
        images = (n for n in below if Path(n).suffix.lower() in IMAGE_SUFFIXES and "/." not in n)
        yield from sorted(head + n for n in images)

    def names(self, folder: str) -> set[str]:
        """Return the names of what lies in a folder; nothing where there is none."""
        if not is_address(folder):
            return set(os.listdir(folder)) if is_folder(folder) else set()  # noqa: PTH208
        fs, path = self._opened(folder)
        selector = require_extra("pyarrow.fs", "parquet").FileSelector
        return {i.base_name for i in fs.get_file_info(selector(path, allow_not_found=True))}

    def read(self, place: str) -> bytes:
        """Return the content of a file."""
        if not is_address(place):
            return Path(place).read_bytes()
        fs, path = self._opened(place)
        with fs.open_input_stream(path) as file:
            return bytes(file.read())

    def write(self, folder: str, name: str, data: bytes) -> None:
        """Write a file, complete or not at all; the folder is made."""
        if not is_address(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_files(Path(folder), {name: data})
            return
        fs, path = self._opened(folder)
        fs.create_dir(path, recursive=True)
        # An object appears when its stream is closed. A file system needs a rename for that, of a
        # file that no other writer has: a worker that was replaced may still run.
        final, own = f"{path}/{name}", f"{path}/.{name}.{secrets.token_hex(4)}.partial"
        partial = final if fs.type_name in _OBJECT_STORES else own
        try:
            with fs.open_output_stream(partial) as file:
                file.write(data)
            if partial != final:
                fs.move(partial, final)
        except OSError:
            if partial != final:
                with suppress(OSError):
                    fs.delete_file(partial)
            raise

    def remove(self, folder: str, name: str) -> None:
        """Delete a file, if it is there."""
        if not is_address(folder):
            Path(folder, name).unlink(missing_ok=True)
            return
        fs, path = self._opened(folder)
        with suppress(FileNotFoundError):
            fs.delete_file(f"{path}/{name}")

    def _opened(self, address: str) -> tuple[Any, str]:
        """Return file system and path; a client is made once per bucket."""
        if _OPTIONS.search(address) and not address.startswith("file:"):
            raise ValueError(
                f"an address must have no options, got some after {address.partition('?')[0]}. "
                "Leave out the question mark and what follows; the region, for example, comes "
                "from AWS_DEFAULT_REGION, the address of a store of your own from AWS_ENDPOINT_URL."
            )
        scheme, _, rest = address.partition("://")
        host, _, key = rest.partition("/")
        root = f"{scheme}://{host}" if host else f"{scheme}:///"
        if root not in self._systems:
            pyarrow = require_extra("pyarrow.fs", "parquet")
            try:
                # Of the bucket alone: the name of an object may hold what no URI may.
                self._systems[root] = pyarrow.FileSystem.from_uri(root)
            except ValueError as error:
                raise ValueError(
                    f"{error}. Expected an address that begins with s3://, gs://, abfs://, hdfs:// "
                    "or file://; fetch what lies on a web server to this machine first."
                ) from error
        fs, path = self._systems[root]
        return fs, f"{path.rstrip('/')}/{key}".rstrip("/") or "/"


#: How ``from_uri`` takes options; an object may have any name, but hardly one such as this.
_OPTIONS = re.compile(r"\?\w+=[^/]*$")
#: Names that pyarrow gives the file systems whose objects appear complete.
_OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
