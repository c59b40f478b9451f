"""The accuracy lab: what each way of storing K and V costs on a model. See docs/accuracy.md."""
