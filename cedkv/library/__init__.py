"""The library: select and generate, evaluate, compare, and read runs, by the code that the engine and the command line run."""
