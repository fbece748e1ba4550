"""One file per grader, shared by the evaluator and reinforcement learning.

A grader is a module with one function:

    score(prompt: str, response: str, row: dict) -> float

`prompt` is the question and `response` the answer, both as text. `row` is the data row; `row["reference"]` is its right answer as text,
whatever the name of the column in the file. A grader of exact answers may also have these functions; the evaluator uses them to show what
was compared:

    extract_answer(text: str) -> str | None
    reference_answer(reference: str) -> str | None                       default: extract_answer reads references too;
                                                                         None: no answer can be right, so a run does not begin
    exact_match(response: str, reference: str, method: str) -> bool      method is "strict" or "flexible"

A grader that compares answers side by side may also have

    score_batch(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict]) -> list[float]

which gives the same scores as `score`, one by one.

A grader may have keys of its own, `reward.KEY` on the command line: the fields of a dataclass `Settings` in its file, see
verl.config.plugin_settings. Each of the functions above then takes the settings as its last argument, as in
`score(prompt, response, row, settings)`.
"""
