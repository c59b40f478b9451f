"""Errors that users see. Each message says what was expected and what was got."""


class SawkvError(ValueError):
    """Base of all errors raised on bad input."""


class FormatError(SawkvError):
    """A cache format's name, or its combination with a model's shape, is not valid."""


class LayoutError(SawkvError):
    """A tensor has a shape, dtype, device or stride that does not fit the cache."""


class UnsupportedError(SawkvError):
    """The configuration is valid, but this version of sawkv cannot run it."""


class CalibrationError(SawkvError):
    """A calibration file is damaged, or was made for another model or format."""
