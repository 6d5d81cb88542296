"""Describe and measure the device of this process. This package knows no other ranks."""
