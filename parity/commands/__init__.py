"""What `mixtral-parity` can be told to do, a module each; they load JAX and torch when they run, not before."""
