"""The subcommands of `sawkv`, one module each, with `SUMMARY`, `add_arguments(parser)` and `run(args)`, which returns
the exit status.

Modules import heavy packages inside `run`, so that help appears at once.
"""
