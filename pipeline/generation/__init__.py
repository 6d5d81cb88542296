"""Generate text with a trained model. The text is shown while it is generated."""
