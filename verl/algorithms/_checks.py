"""Checks of the keys that several preference losses have."""

from verl.errors import UserError


def check_positive(key: str, value: float) -> None:
    """Raises UserError: the value is not a positive number."""
    if not 0.0 < value < float("inf"):
        raise UserError(f"{value} is not positive", where=key, fix="give a positive number, such as 0.1")


def check_not_negative(key: str, value: float) -> None:
    """Raises UserError: the value is negative, or no number."""
    if not 0.0 <= value < float("inf"):
        raise UserError(f"{value} is not a number from 0", where=key, fix="give 0 or a positive number")


def check_smoothing(value: float) -> None:
    """Raises UserError: at a half, the labels would say nothing."""
    if not 0.0 <= value < 0.5:
        what, fix = f"{value} is not below a half", "give a share from 0 to below 0.5"
        raise UserError(what, where="label_smoothing", fix=fix)
