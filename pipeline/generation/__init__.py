"""Generate text with a trained model, and show it while it is generated."""
