"""Compare predicted with measured step times, for several processes and for slow links."""
