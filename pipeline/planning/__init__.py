"""Memory and speed before anything is bought: see ``docs/planning.md``."""
