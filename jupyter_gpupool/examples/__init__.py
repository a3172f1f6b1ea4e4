"""Programs that show what the project is for; none of them knows that it exists."""
