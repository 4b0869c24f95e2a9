"""Reduces one partition: its merged groups go to the reduce function, the items that it returns to parts."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

from mrcore import task
from mrcore.engine.disk_list import DiskList
from mrcore.engine.disk_sort import DiskSort, group_too_large
from mrcore.engine.functions import Function
from mrcore.engine.memory import MemoryWatch
from mrcore.engine.output import BATCH_ITEMS, BATCH_NODES, PartWriter
from mrcore.engine.records import NUMBERISH, BadItem, Key, Snapshot, Value, check_item, describe, nodes_of
from mrcore.engine.user_errors import NOTHING, flaw_of, user_fault
from mrcore.errors import JobFault
from mrcore.messages.tasks import MAX_HEAVY, HeavyGroup, Part
from mrcore.system import forks

_UNCHECKED = object()  # stands for the value of an item that is not simply (this key, something)
GROUPS_PER_NOTE = 256
LARGE_GROUP = 4096  # values: whether they fit is checked, and noted
PAIR_BYTES = 72  # a (key, value) tuple and its place in the group's list


class Reduce:
    """Reduces one partition: `sort()` makes the spills ready to be merged, `reduce()` calls the function per group.

    `disk_based_input` gives the function a DiskList as group; with `disk_based_output` its second argument becomes
    `(empty DiskList, auxiliary)` and it returns the list that it filled.
    """

    def __init__(
        self,
        function: Function,
        name: str,
        auxiliary: Any,
        sorter: DiskSort,
        parts: PartWriter,
        watch: MemoryWatch,
        folder: Path,
        *,
        disk_based_input: bool = False,
        disk_based_output: bool = False,
    ) -> None:
        self._function, self._name, self._auxiliary = function, name, auxiliary
        self._sorter, self._parts, self._watch, self._folder = sorter, parts, watch, folder
        self._disk_based_input, self._disk_based_output = disk_based_input, disk_based_output
        self._snapshot = Snapshot()
        self._batch: list[tuple[Key, Value]] = []
        self._large = 0
        self._key: Key = None  # of the group in work
        self._heavy: list[tuple[int, int, str]] = []  # a heap: values, number of the group, its key described
        self._least_heavy = 1  # a group of more values is one of the heavy ones so far
        self.groups = self.values = self.items = 0
        self.keys_kept = True  # every item carries its group's key, in ascending order: `merge_output` relies on it

    def sort(self) -> None:
        """Bring the spills to a number that can be merged within the memory budget."""
        self._sorter.prepare()

    def reduce(self) -> list[Part]:
        """Reduce all groups and return the finished parts. Raises JobFault naming function and key."""
        for key, values in self._sorter.groups(self._disk_based_input):
            self._key, count = key, len(values)
            if self.groups % GROUPS_PER_NOTE == 0 or count > LARGE_GROUP:
                task.in_hand(self._in_hand(), self._in_hand)
            self.groups += 1
            self.values += count
            if count > self._least_heavy:
                self._note_heavy(key, count)
            if isinstance(values, list):
                if count > LARGE_GROUP and not self._watch.fits(count * PAIR_BYTES):
                    raise group_too_large(key, count, self._watch.budget_bytes)
                self._reduce_group(key, [(key, value) for value in values])
            else:
                self._reduce_group(key, values)
            if self._watch.due:
                self._flush(key)
                self._watch.release()  # its new floor keeps this from happening at every group
        self._flush(None)
        return self._parts.close()

    def _in_hand(self) -> str:
        what = f"the groups from key {describe(self._key)} on of partition {task.partition}"
        return f"reduce function {self._name}, {what}"

    def _note_heavy(self, key: Key, count: int) -> None:
        heapq.heappush(self._heavy, (count, self.groups, describe(key)))
        if len(self._heavy) > MAX_HEAVY:
            heapq.heappop(self._heavy)
            self._least_heavy = self._heavy[0][0]

    def heavy(self) -> list[HeavyGroup]:
        """Return the groups with the most values, these first; of groups with one value none."""
        return [HeavyGroup(key=key, values=count) for count, _, key in sorted(self._heavy, reverse=True)]

    def _reduce_group(self, key: Key, group: Any) -> None:
        auxiliary = (DiskList(self._folder), self._auxiliary) if self._disk_based_output else self._auxiliary
        item, items, key_nodes = None, NOTHING, nodes_of(key)
        try:
            items = self._function(group, auxiliary)
            for item in items:
                value = item[1] if item.__class__ is tuple and len(item) == 2 and item[0] is key else _UNCHECKED
                if value.__class__ in NUMBERISH:  # what cannot be written shows when it is encoded
                    self._batch.append(item)
                    self._large += key_nodes
                elif value.__class__ is str:
                    self._batch.append(item)
                    self._large += key_nodes + len(value)
                else:
                    checked = check_item(item, self._snapshot)
                    self._large += self._snapshot.nodes + nodes_of(checked[0])
                    self.keys_kept = self.keys_kept and checked[0] == key
                    self._batch.append(checked)
                if len(self._batch) >= BATCH_ITEMS or self._large > BATCH_NODES:
                    self._flush(key)
            if forks.in_child:
                forks.check()
        except BaseException as error:
            raise self._fault(error, key, item, items) from error

    def _flush(self, key: Key | None) -> None:
        try:
            self._parts.write(self._batch)
        except (ValueError, OverflowError, TypeError) as error:
            for item in self._batch:  # find it, to name it
                try:
                    check_item(item, self._snapshot)
                except BadItem as bad:
                    raise self._fault(bad, item[0], item, self._batch) from error
            raise
        self.items += len(self._batch)
        self._batch, self._large = [], 0

    def _fault(self, error: BaseException, key: Key, item: Any, items: Any) -> JobFault:
        """Return what went wrong on a group: the function raised, or returned what is no item."""
        where = {"function": self._name, "key": describe(key)}
        what, place = f"reduce function {self._name}", f"on the group of key {where['key']}"
        flaw = flaw_of(error, item, items)
        if flaw is None:
            return user_fault(error, f"{what} failed {place}", **where)
        is_bad = issubclass(type(flaw), BadItem)
        return JobFault(
            f"{what} returned {'a bad item' if is_bad else 'no iterable of pairs'} {place}: {flaw}", **where
        )
