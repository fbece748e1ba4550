"""Checks of single values. Each raises a UserError that names the key."""

from verl.errors import UserError


def one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UserError(f"found {value!r}", where=key, fix=f"one of {', '.join(str(a) for a in allowed)}")


def at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not (isinstance(value, (int, float)) and least <= value < float("inf")):
        raise UserError(f"found {value!r}", where=key, fix=f"give a number of at least {least}")


def is_share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{value} is not a share", where=key, fix="give a number from 0 to 1")
