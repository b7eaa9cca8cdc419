"""One step of an optimizer: what it decides (step, state), what it reads (columns), and the two executors of it."""
