"""Show runs, which may still be in progress, on one HTML page and as PNG files."""
