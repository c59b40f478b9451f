"""The accuracy lab: measures how methods of storing K and V change a model's predictions. See docs/accuracy.md."""
