"""A calculator: if the model's turn ends with the line `calculate 48+24`, the reply is `72`."""

import re

ORDER = re.compile(r"^calculate\b(.*)\Z", re.MULTILINE)
EXPRESSION = re.compile(r"\s*(-?[0-9]{1,15})\s*([-+*/])\s*(-?[0-9]{1,15})\s*")
CANNOT = "cannot calculate this: write two whole numbers with + - * or / between them"


def reply(response: str, prompt: str, row: dict[str, object]) -> str | None:
    """Return the result of the calculation in the turn's last line, or an error text; None if that line is not a calculation.

    A quotient that is not an integer is rounded to six decimal places.
    """
    order = ORDER.search(response.rstrip())
    if order is None:
        return None
    found = EXPRESSION.fullmatch(order[1])
    if found is None or (found[2] == "/" and int(found[3]) == 0):
        return CANNOT
    left, right = int(found[1]), int(found[3])
    if found[2] == "/":
        return str(left // right) if left % right == 0 else f"{left / right:.6f}"
    return str({"+": left + right, "-": left - right, "*": left * right}[found[2]])
