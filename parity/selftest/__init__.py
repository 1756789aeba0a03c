"""The harness on trial: the table of faults, how each is planted, and the controls."""
