"""Files and folders, local and remote: durable writes, hashes, locks."""
