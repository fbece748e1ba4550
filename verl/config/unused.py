"""Keys that have no effect."""

from dataclasses import fields

from verl.errors import UserError


def check_unused(given: object, plain: object, group: str, without: str) -> None:
    """Raise UserError if a key of `group` is not as in `plain`, its defaults, although the key that they belong to is not set."""
    for key in (field.name for field in fields(plain)):  # type: ignore[arg-type]
        if getattr(given, key) != getattr(plain, key):
            raise UserError(f"has no effect without {without}", where=f"{group}.{key}", fix=f"set {without}, or remove this key")
