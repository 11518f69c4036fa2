"""A text that counts the work done with it: linear time is checked without a clock."""

from __future__ import annotations


class Counted(str):
    """A text that counts the characters which slices hand out and `find` walks over."""

    work: int

    def __new__(cls, text: str) -> Counted:
        made = super().__new__(cls, text)
        made.work = 0
        return made

    def __getitem__(self, key: object) -> str:
        part = str.__getitem__(self, key)  # type: ignore[index]
        self.work += len(part)
        return part

    def find(self, *args: object) -> int:  # type: ignore[override]
        found = super().find(*args)  # type: ignore[arg-type]
        self.work += (found if found >= 0 else len(self)) - int(args[1])  # type: ignore[call-overload]
        return found
