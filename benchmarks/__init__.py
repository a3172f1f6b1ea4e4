"""What is fast and what is not, measured side by side; `make bench` runs it all."""
