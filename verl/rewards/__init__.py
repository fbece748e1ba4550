"""One file a grader, shared by the evaluator and by reinforcement learning.

A grader is a module with one function:

    score(prompt: str, response: str, row: dict) -> float

`prompt` is the question and `response` the answer, both as text; `row` is the data row, and `row["reference"]` its right answer as text,
whatever that column is called in the file. A grader of exact answers may also have these; the evaluator shows with them what was compared:

    extract_answer(text: str) -> str | None
    reference_answer(reference: str) -> str | None                       without it, extract_answer reads references too
    exact_match(response: str, reference: str, method: str) -> bool      method is "strict" or "flexible"

Keys of a grader are a dataclass `Settings` in its file, see verl.config.own_keys: `reward.KEY` on the command line. Each of the functions
above then takes them as one more argument behind the others, `score(prompt, response, row, settings)`.
"""
