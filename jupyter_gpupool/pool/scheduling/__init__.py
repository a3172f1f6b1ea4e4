"""Who is granted what: pure functions of values."""
