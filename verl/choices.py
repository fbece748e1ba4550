"""What is said where a key has a value that is none of those it can have."""


def refusal(value: object, allowed: tuple[object, ...]) -> tuple[str, str]:
    """Return what was found, and what to write: true and false in small letters, texts beside them in quotes, and without null."""
    is_quoted = True in allowed or False in allowed
    *others, last = [_written(one, is_quoted=is_quoted) for one in allowed if one is not None]
    choice = f"one of {', '.join(others)} or {last}" if others else last
    return f"found {str(value).lower() if isinstance(value, bool) else repr(value)}", f"write {choice}"


def _written(value: object, *, is_quoted: bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if is_quoted and isinstance(value, str) else str(value)
