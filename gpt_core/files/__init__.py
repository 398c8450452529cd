"""What is written and read: names that are taken whole or not at all, leases, hashes, bounded reading."""
