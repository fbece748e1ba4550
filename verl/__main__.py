"""`python -m verl` is `verl`."""

from verl.cli import main

main()
