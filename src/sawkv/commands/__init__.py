"""The subcommands of `sawkv`, one module each: `SUMMARY`, `add_arguments(parser)`, and `run(args)`, which returns the
exit status.

A module imports what its work needs inside `run`, so that help is shown at once.
"""
