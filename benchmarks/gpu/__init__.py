"""Everything that is to be shown on a real GPU, in ten minutes: `make gpu`."""
