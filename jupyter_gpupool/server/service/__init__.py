"""The running pool: a manager, its engine and those who wait for them."""
