# SPDX-License-Identifier: Apache-2.0
"""The bundle on disk: archives, one behind the other, cut into parts of equal size.

``manifest.json`` says where each archive begins in the stream of all parts, and the
size and checksum of each part. Standard library alone: this runs on a bare machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PART_BYTES = 58 << 20
"""With the working tree, less than 64 MiB: what some machines receive at once."""
MANIFEST = "manifest.json"
REMAKE = "remake the bundle with `make gpu-bundle`"
_CHUNK = 1 << 20


class BundleError(Exception):
    """One line on what is wrong with a bundle, and what to do."""


@dataclass(frozen=True)
class Part:
    """A file of the bundle."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """A ``tar.xz`` in the stream of all parts."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Manifest:
    """What the bundle consists of, in order."""

    parts: tuple[Part, ...]
    archives: tuple[Archive, ...]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a bundle's manifest.

        Raises:
            BundleError: there is none, or it is not one.
        """
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                tuple(Part(**part) for part in found["parts"]),
                tuple(Archive(**archive) for archive in found["archives"]),
            )
        except OSError:
            raise BundleError(f"{path}: is missing; {REMAKE}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path}: cannot be read ({error}); {REMAKE}") from None

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def archive(self, name: str) -> Archive:
        """Find an archive.

        Raises:
            BundleError: the bundle has none of this name.
        """
        for archive in self.archives:
            if archive.name == name:
                return archive
        raise BundleError(f"the bundle has no archive {name!r}; {REMAKE}")

    def parts_of(self, name: str) -> list[tuple[Part, int]]:
        """Parts that an archive lies in, with the offset of each in the stream."""
        archive, start, found = self.archive(name), 0, []
        for part in self.parts:
            end = start + part.size
            if start < archive.offset + archive.size and end > archive.offset:
                found.append((part, start))
            start = end
        return found


def cut(archives: Sequence[Path], folder: Path, limit: int = PART_BYTES) -> Manifest:
    """Cut archives into parts below ``folder``, and write the manifest."""
    placed, offset = [], 0
    for path in archives:
        size = path.stat().st_size
        placed.append(Archive(path.name.removesuffix(".tar.xz"), offset, size))
        offset += size
    stream, parts = _Concatenated([(path, 0) for path in archives]), []
    while block := stream.read(limit):
        name = f"part-{len(parts) + 1}"
        (folder / name).write_bytes(block)
        parts.append(Part(name, len(block), hashlib.sha256(block).hexdigest()))
    manifest = Manifest(tuple(parts), tuple(placed))
    manifest.write(folder)
    return manifest


def check(part: Part, path: Path) -> None:
    """Compare a part's size and checksum.

    Raises:
        BundleError: it is missing or torn.
    """
    if not path.is_file():
        raise BundleError(f"{path}: is missing; send it, or {REMAKE}")
    size = path.stat().st_size
    if size != part.size:
        raise BundleError(
            f"{path}: is torn ({size} of {part.size} bytes); send it again, or {REMAKE}"
        )
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
            raise BundleError(
                f"{path}: is torn (its checksum is another); send it again, or {REMAKE}"
            )


def unpack(manifest: Manifest, name: str, folder: Path, target: Path) -> None:
    """Unpack one archive, once: a second call does nothing.

    Raises:
        BundleError: a part is missing or torn.
    """
    done = target / f".unpacked-{name}"
    archive, parts = manifest.archive(name), manifest.parts_of(name)
    mark = "".join(part.sha256 for part, _ in parts)
    if done.is_file() and done.read_text() == mark:
        return
    for part, _ in parts:
        check(part, folder / part.name)
    first = archive.offset - parts[0][1]
    files = [(folder / part.name, 0) for part, _ in parts]
    files[0] = files[0][0], first
    stream = _Concatenated(files, archive.size)
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=stream, mode="r|xz") as tar:
        tar.extractall(target, filter="data")
    done.write_text(mark)


class _Concatenated(io.RawIOBase):
    """Files read as one.

    Args:
        files: paths, and the byte of each to begin with.
        size: bytes after which it ends; ``None``: with the last file.
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], size: int | None = None
    ) -> None:
        self._files, self._left = list(files), size
        self._open: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Read ``size`` bytes, fewer only at the end."""
        blocks = []
        if self._left is not None:
            size = self._left if size < 0 else min(size, self._left)
        while size:
            block = self._some(size)
            if not block:
                break
            blocks.append(block)
            size -= len(block)
            if self._left is not None:
                self._left -= len(block)
        return b"".join(blocks)

    def _some(self, size: int) -> bytes:
        """Read from the first file that has something left."""
        while self._open or self._files:
            if self._open is None:
                path, first = self._files.pop(0)
                self._open = path.open("rb")
                self._open.seek(first)
            if block := self._open.read(size if size > 0 else _CHUNK):
                return block
            self._open.close()
            self._open = None
        return b""
