"""Preparing a model for a 4-bit cache: measuring K and V on text, fitting a calibration, and the file that holds it."""
