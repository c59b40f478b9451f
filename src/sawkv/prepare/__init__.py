"""Making a model ready for a 4-bit cache: centers, error feedback and balanced channels, and the file that engines load."""
