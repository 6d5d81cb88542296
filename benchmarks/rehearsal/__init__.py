"""Rehearse runs on several hosts, and the loss of hosts and links, on one Linux machine."""
