"""The error of a name that is no plugin's."""

import difflib

from verl.errors import UserError

LEAST_SIMILAR = 0.75  # of names of which one may be a misspelling of the other


def unknown(kind: str, name: str, existing: list[str], where: str | None = None) -> UserError:
    """Return the error of a name that is no plugin's.

    Args:
        kind: such as "loggers".
        existing: the names that there are.
        where: the key that names it.
    """
    near = difflib.get_close_matches(name.lower(), existing, n=1, cutoff=LEAST_SIMILAR)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"no {kind} named {name!r}", where=where, fix=f"{hint}{', '.join(existing)}, or path/to/file.py")
