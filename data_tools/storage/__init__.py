"""Work with local and remote files and folders: durable writes, hashes and locks."""
