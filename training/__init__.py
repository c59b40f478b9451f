"""How the shipped model was made: `python -m training.train`, then `python -m training.evaluate`."""
