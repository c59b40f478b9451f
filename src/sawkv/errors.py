"""Errors that users see. Each message says what was expected and what was given."""


class SawkvError(ValueError):
    """Base of all errors about bad input."""


class FormatError(SawkvError):
    """The name of a cache format is not valid, or the format does not fit the model's shape."""


class LayoutError(SawkvError):
    """A tensor has a shape, dtype, device or stride that does not fit the cache."""


class UnsupportedError(SawkvError):
    """The configuration is valid, but this version of sawkv cannot run it."""


class CalibrationError(SawkvError):
    """A calibration file is damaged, or was made for another model or format."""
