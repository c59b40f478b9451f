"""What the bytes of the cache mean: format names, page layout, rotation, codecs, error feedback. docs/format.md is the
law.
"""
