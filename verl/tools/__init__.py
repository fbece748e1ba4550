"""Tools that a model may use while it answers (`rollout.tool`), one per file.

A tool is a module with one function:

    reply(response: str, prompt: str, row: dict) -> str | None

`response` is the text of the model's turn, `prompt` the question, and `row` the data row. The result is appended to the chat as a tool
turn, and the model continues; None ends the answer. With `ROLE = "user"` in the module, the result is a user turn.

A user's own tool runs in worker processes (see verl.workers), and its `reply` may be `async`.
"""
