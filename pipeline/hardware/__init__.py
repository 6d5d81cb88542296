"""Describe and measure the device of this process. No module here communicates with other ranks."""
