"""Show finished and running runs as one HTML page and PNG files."""
