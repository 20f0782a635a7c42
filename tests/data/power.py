"""Power loss: the states that a disk may be in afterwards, from a record of what a program did.

The model is that of ALICE (OSDI 2014) and of SQLite's crash tests. An fsync of a file puts its
content on the disk, an fsync of a folder the names in it, and neither puts anything else there.
What was not synced may be there or not: changes of names in any order, a rename as one change;
content as it was, cut, or with zeros in it. A state is drawn from a seed.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

_CHANGES = ("replace", "rename", "mkdir", "rmdir", "unlink", "remove")

Names = dict[int, dict[str, int]]  # by folder
Change = list[tuple[int, str, int | None]]  # of names at once: folder, name, what has it now


@dataclass
class _Tree:
    """What a running program sees. Files and folders have a number each, for life."""

    names: Names = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)


class Disk:
    """What of a tree is on the disk, followed through its history."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._seen = _Tree()
        self._names: Names = {}
        self._content: dict[int, bytes] = {}
        self._live: dict[int, bytes] = {}  # of removed files too: the removal may be lost
        self._pending: list[Change] = []

    def see(self, tree: _Tree) -> None:
        """The program has changed the tree, by one call of the system and what it wrote before."""
        gone: list[tuple[int, str, int]] = []
        come: list[tuple[int, str, int]] = []
        for folder in self._seen.names.keys() | tree.names.keys():
            before, now = self._seen.names.get(folder, {}), tree.names.get(folder, {})
            gone += [(folder, name, node) for name, node in before.items() if now.get(name) != node]
            come += [(folder, name, node) for name, node in now.items() if before.get(name) != node]
        moved = {node for _, _, node in gone} & {node for _, _, node in come}
        for node in moved:
            away: Change = [(folder, name, None) for folder, name, n in gone if n == node]
            there: Change = [entry for entry in come if entry[2] == node]
            self._pending.append(away + there)
        replaced = {(folder, name) for folder, name, _ in come}
        changes: list[Change] = [[entry] for entry in come if entry[2] not in moved]
        for folder, name, node in gone:
            if node not in moved and (folder, name) not in replaced:
                changes.append([(folder, name, None)])
        self._pending += changes
        self._seen = tree
        self._live |= tree.content

    def synced(self, node: int) -> None:
        if node in self._seen.content:
            self._content[node] = self._seen.content[node]
            return
        for change in [c for c in self._pending if any(entry[0] == node for entry in c)]:
            _apply(self._names, change)
            self._pending.remove(change)

    def crash(self, chance: random.Random) -> tuple[Names, dict[int, bytes]]:
        """Names and content after the power was cut now."""
        names = {folder: dict(entries) for folder, entries in self._names.items()}
        share = chance.choice([0.0, 0.5, 0.9, 1.0])
        kept = [change for change in self._pending if chance.random() < share]
        if chance.random() < 0.3:  # a journal that keeps the order
            kept = self._pending[: chance.randint(0, len(self._pending))]
        for change in kept:
            _apply(names, change)
        return names, {node: self._torn(node, chance) for node in self._live}

    def _torn(self, node: int, chance: random.Random) -> bytes:
        live, safe = self._live[node], self._content.get(node)
        if safe == live:
            return live
        start = len(safe) if safe is not None and live.startswith(safe) else 0
        cut = chance.randint(start, len(live))
        zeros = live[:cut] + bytes(len(live) - cut)
        return chance.choice([safe or b"", live, live[:cut], zeros])

    def write(self, state: tuple[Names, dict[int, bytes]], target: Path) -> None:
        """Make a folder of what a crash left of the root."""
        names, content = state

        def make(folder: int, path: Path) -> None:
            path.mkdir()
            for name, node in names.get(folder, {}).items():
                if node in content:
                    (path / name).write_bytes(content[node])
                else:
                    make(node, path / name)

        make(self._root, target)


def _apply(names: Names, change: Change) -> None:
    for folder, name, node in change:
        if node is None:
            names.get(folder, {}).pop(name, None)
        else:
            names.setdefault(folder, {})[name] = node


class Killed(BaseException):
    """The program ends here, as by SIGKILL."""


@dataclass
class Record:
    """Trees, what was synced (a number), and what the program was promised, in order."""

    root: Path
    events: list[_Tree | int | tuple[str, str]] = field(default_factory=list)
    # Calls of the system until the program is killed; it does nothing more then, not even clean up.
    left: int | None = None
    _numbers: dict[int, int] = field(default_factory=dict)
    _count: int = 0

    def promise(self, kind: str, what: str) -> None:
        self.events.append((kind, what))

    def called(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed

    def observe(self) -> None:
        tree, numbers = _Tree(), {}

        def walk(path: Path) -> int:
            inode = path.stat().st_ino
            if inode not in self._numbers:
                self._count += 1
            number = numbers[inode] = self._numbers.get(inode, self._count)
            if path.is_dir():
                tree.names[number] = {child.name: walk(child) for child in path.iterdir()}
            else:
                tree.content[number] = path.read_bytes()
            return number

        walk(self.root)
        self._numbers = numbers
        if not self.events or tree != self.events[-1]:
            self.events.append(tree)

    def number(self, descriptor: int) -> int | None:
        return self._numbers.get(os.fstat(descriptor).st_ino)

    def states(self, count: int, seed: int) -> Iterator[tuple[Disk, Any, list[tuple[str, str]]]]:
        """Disks, what is on them after a crash, and what had been promised by then."""
        chance = random.Random(seed)
        (first,) = [event for event in self.events[:1] if isinstance(event, _Tree)]
        chosen = sorted(chance.randint(1, len(self.events)) for _ in range(count))
        # The folder around the store is on the disk since long.
        disk, promised = Disk(min(first.names)), []
        for at, event in enumerate(self.events, 1):
            if isinstance(event, _Tree):
                disk.see(event)
            elif isinstance(event, int):
                disk.synced(event)
            else:
                promised.append(event)
            while chosen and chosen[0] == at:
                chosen.pop(0)
                yield disk, disk.crash(chance), list(promised)


@contextmanager
def recorded(root: Path) -> Iterator[Record]:
    """Record what this process does to a folder through `os`."""
    root.mkdir(exist_ok=True)
    record = Record(root)

    def changed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        record.observe()
        record.called()
        done = call(*args, **kwargs)
        record.observe()
        return done

    def synced(call: Callable[[int], None], descriptor: int) -> None:
        record.observe()
        record.called()
        call(descriptor)
        if (number := record.number(descriptor)) is not None:
            record.events.append(number)

    with pytest.MonkeyPatch.context() as patch:
        for name in _CHANGES:
            patch.setattr(os, name, partial(changed, getattr(os, name)))
        patch.setattr(os, "fsync", partial(synced, os.fsync))
        record.observe()
        yield record
        record.observe()
