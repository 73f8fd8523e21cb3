"""Many videos by many processes: what to make, who makes it, receipts, tables of results."""
