"""One file a tool that a model may use while it answers: `rollout.tool`.

A tool is a module with one function:

    reply(response: str, prompt: str, row: dict) -> str | None

`response` is a turn of the model as text, `prompt` the question, and `row` the data row. What it gives is appended to the chat as the
turn of a tool, and the model goes on; with None the answer is complete. With `ROLE = "user"` in the module it is the user's turn.
"""
