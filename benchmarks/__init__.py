"""What is measured, and how: real runs, compared."""
