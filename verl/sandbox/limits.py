"""What a program may use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of a program.

    Attributes:
        seconds: of wall time for a piece of code.
        cpu_seconds: of processor time for a piece of code.
        memory_bytes: of its address space, with Python itself.
        folder_bytes: that it may keep in its folder.
        files: and folders that it may keep there.
        output_bytes: that a piece of code may print.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 2**29
    folder_bytes: int = 2**26
    files: int = 1000
    output_bytes: int = 2**14
