"""One file per grader, shared by the evaluator and reinforcement learning.

A grader is a module with one of two functions:

    score(prompt: str, response: str, row: dict) -> float
    score_group(prompt: str, responses: list[str], row: dict) -> list[float]     all answers to one prompt; it wins if both are there

`prompt` is the question and `response` the answer, both as text. `row` is the data row; `row["reference"]` is its right answer as text,
whatever the name of the column in the file. A number is whatever `float()` takes and is finite, except text. A grader of exact answers may
also have these functions; the evaluator uses them to show what was compared:

    extract_answer(text: str) -> str | None
    reference_answer(reference: str) -> str | None                       default: extract_answer reads references too
    exact_match(response: str, reference: str, method: str) -> bool      method is "strict" or "flexible"

`reference_answer` reads all right answers before training and evaluation; None stops the run with the row. A grader that has more to say
also has `check_reference(reference: str) -> None`, which raises ValueError with what is wrong.

A grader may have keys of its own, `reward.KEY` on the command line: the fields of a dataclass `Settings` in its file, see
verl.config.plugin_settings. Each of the functions above then takes the settings as its last argument, as in
`score(prompt, response, row, settings)`.

A user's own grader runs in worker processes (see verl.workers), and its functions may be `async`. The graders in this folder run in the
trainer's process, and may have `score_batch(prompts, responses, rows) -> list[float]`, which then scores all answers of a step at once, or
`score_groups(prompts, groups, rows) -> list[list[float]]` in the same way beside `score_group`.
"""
