"""Run users' own code, such as a reward or a tool, in worker processes.

A worker imports the user's module once, keeps its global state, and runs one call at a time, or many at once if the function is `async`.
A call that raises, calls `exit()`, crashes its process or takes too long is a failure of that call alone. Start at `pool.Workers`; `serve`
is what runs in the worker, and `calls` has the functions of users' code with the types of their results.
"""
