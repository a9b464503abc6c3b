"""What is left of a folder when the power goes: a model of a disk that keeps what was synced and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.faults.shim import Operation


@dataclass(slots=True)
class Node:
    """A file; `content` is on the platter, `pending` is what was written since."""

    content: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # offset and bytes; None: cut off there

    def settled(self, writes: Iterable[tuple[int, bytes | None]]) -> bytes:
        """Return the content with some writes done."""
        content = bytearray(self.content)
        for offset, data in writes:
            _put(content, offset, data)
        return bytes(content)

    def sync(self) -> None:
        """Everything that was written is on the platter."""
        for offset, data in self.pending:
            _put(self.content, offset, data)
        self.pending.clear()


def _put(content: bytearray, offset: int, data: bytes | None) -> None:
    end = offset + len(data or b"")
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if data is None:
        del content[offset:]
    else:
        content[offset:end] = data


Names = dict[str, Node | None]
"""Path to file; None is a folder."""
Change = tuple[str, Node | None, bool]
"""A name, what it means, and whether it is there from now on."""


class Disk:
    """Follows a journal, strict as POSIX: bytes last after fsync of their file, names after fsync of their folder."""

    def __init__(self) -> None:
        self.names: Names = {}  # as the running system sees them
        self.durable: Names = {}
        self._changes: list[list[Change]] = []  # of names, not synced yet; each list happens as a whole
        self._nodes: dict[int, Node] = {}

    def follow(self, operation: Operation) -> None:
        """Do what was done."""
        getattr(self, f"_{operation.name}")(operation)

    def _create(self, operation: Operation) -> None:
        node = self._nodes[operation.inode] = Node()
        self._change((operation.path, node, True))

    def _tmpfile(self, operation: Operation) -> None:
        self._nodes[operation.inode] = Node()

    def _write(self, operation: Operation) -> None:
        self._node(operation).pending.append((operation.offset, operation.data))

    def _truncate(self, operation: Operation) -> None:
        node = self._node(operation)
        size = len(node.settled(node.pending))
        if operation.offset > size:
            node.pending.append((operation.offset, b""))
        else:
            node.pending.append((operation.offset, None))

    def _allocate(self, operation: Operation) -> None:
        self._node(operation).pending.append((operation.offset, b""))

    def _fsync(self, operation: Operation) -> None:
        self._node(operation).sync()

    def _fsyncdir(self, operation: Operation) -> None:
        """What was done to names in this folder lasts, and no other half of it is left out."""
        left = []
        for change in self._changes:
            if any(_folder(path) == operation.path for path, _, _ in change):
                _apply(self.durable, change)
            else:
                left.append(change)
        self._changes = left

    def _rename(self, operation: Operation) -> None:
        node = self.names.get(operation.path, self._nodes.get(operation.inode))
        self._change((operation.path, node, False), (operation.other, node, True))

    def _link(self, operation: Operation) -> None:
        self._change((operation.other, self._nodes[operation.inode], True))

    def _unlink(self, operation: Operation) -> None:
        self._change((operation.path, None, False))

    def _mkdir(self, operation: Operation) -> None:
        self._change((operation.path, None, True))

    def _node(self, operation: Operation) -> Node:
        return self._nodes.setdefault(operation.inode, Node())

    def _change(self, *change: Change) -> None:
        _apply(self.names, list(change))
        self._changes.append(list(change))

    # -- the power goes -------------------------------------------------------------------------------------

    def after_power_cut(self, chance: random.Random | None = None) -> dict[str, bytes | None]:
        """Return the files that are left, and the folders as None.

        Without `chance` nothing is left that was not synced. With it, of what was not synced some names are left (a
        prefix, as a journalling file system does it) and of each file some writes, in any order.
        """
        names = dict(self.durable)
        if chance is not None:
            for change in self._changes[: chance.randint(0, len(self._changes))]:
                _apply(names, change)
        return {
            path: None if node is None else node.settled(_some(node.pending, chance))
            for path, node in names.items()
            if all(str(parent) in names for parent in list(PurePosixPath(path).parents)[:-1])
        }


def _some(writes: list[tuple[int, bytes | None]], chance: random.Random | None) -> list[tuple[int, bytes | None]]:
    return [write for write in writes if chance.random() < 0.5] if chance else []


def _apply(names: Names, change: list[Change]) -> None:
    for path, node, is_there in change:
        if is_there:
            names[path] = node
        else:
            names.pop(path, None)


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)


def restore(left: dict[str, bytes | None], folder: Path) -> None:
    """Make `folder` what the power cut left."""
    folder.mkdir(parents=True)
    for path, content in sorted(left.items()):
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
