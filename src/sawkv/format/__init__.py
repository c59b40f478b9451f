"""The format: names, page layout, rotation, codecs, error feedback, counters. docs/format.md specifies it."""
