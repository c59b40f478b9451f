"""Making a model ready for a 4-bit cache: what is measured, what is fitted to it, and the file that engines load."""
